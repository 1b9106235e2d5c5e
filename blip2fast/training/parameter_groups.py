"""The optimizer's parameter groups: weight decay, learning-rate scales, and what they freeze.

A group holds the parameters of one weight decay and one scale of the learning rate, and has a
`name` for logs: `decay`, `no_decay`, `image_encoder.block3.decay`, `decay_x0.1`, ...
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from blip2fast.frozen.image_encoders import FrozenImageEncoder

# the class token and the positions of ViTs, for which they, like queries, are no matrices
_ENCODER_TABLES = ("class_embedding", "cls_token", "position_embedding", "position_embeddings")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases, norms, temperature and queries.

    Nor to the class token and the position embeddings of the image encoder.
    """
    parts = name.split(".")
    if "image_encoder" in parts and any(part in _ENCODER_TABLES for part in parts):
        return False
    return parameter.ndim > 1 and parts[-1] != "query_tokens"


def lr_scale(name: str, scales: Mapping[str, float]) -> float:
    """The factor of a parameter's learning rate: that of the last pattern that matches, else 1."""
    found = 1.0
    for pattern, scale in scales.items():
        if fnmatchcase(name, pattern):
            found = scale
    return found


def check_scales(names: Sequence[str], scales: Mapping[str, float]) -> None:
    """Refuse patterns that match no parameter, and patterns that freeze all of them.

    Args:
        names: of the trained parameters.
        scales: factors of the learning rate, by pattern.

    Raises:
        ValueError: names the pattern, and names that are near it.
    """
    for pattern in scales:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"optim.lr_scales {pattern!r} matches no trained parameter; near it are "
                f"{', '.join(map(repr, _near(pattern, names)))}"
            )
    if names and not any(lr_scale(name, scales) for name in names):
        raise ValueError("optim.lr_scales freezes every parameter: nothing is left to train")


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Patterns that match something and are spelled like `pattern`."""
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            candidates[".".join(parts[:end]) + ".*"] = None
        candidates[name] = None
    wanted = re.sub(r"[*?]+$", "", pattern).strip(".") + ".*"
    return difflib.get_close_matches(wanted, candidates, 3, 0.0)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Trained parameters in groups of `name`, `weight_decay` and `lr_scale`; without frozen ones.

    With `layer_decay` d, block i of N of the image encoder has the scale d^(N + 1 - i), and what is
    before the blocks d^(N + 1), as in LAVIS. Scales of patterns multiply them.

    Args:
        model: `Blip2Stage1`, `Blip2Stage2`, or a module with one as its `model`.
        weight_decay: that of the parameters that `is_decayed` names.
        scales: factors of the learning rate, by pattern.
        layer_decay: d.

    Raises:
        ValueError: the model has no trained parameters.
    """
    inner = getattr(model, "model", model)
    trained = [(name, p) for name, p in inner.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(inner).__name__} has no parameter that requires a gradient")
    encoder = getattr(inner, "image_encoder", None)
    depths: dict[str, int] = {}
    count = 0
    if isinstance(encoder, FrozenImageEncoder):
        depths = {f"image_encoder.{name}": depth for name, depth in encoder.depths()}
        count = len(encoder.blocks)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained:
        decayed = is_decayed(name, parameter)
        scale, place = lr_scale(name, scales or {}), ""
        label = f"_x{scale:g}" if scale != 1 else ""
        if name in depths:
            depth = depths[name]
            place = "image_encoder."
            if layer_decay != 1:
                scale *= layer_decay ** (count + 1 - depth)
                place += f"block{depth}." if depth else "embeddings."
        group = groups.setdefault(
            f"{place}{'decay' if decayed else 'no_decay'}{label}",
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
    found = [{"name": name, **group} for name, group in groups.items()]
    return sorted(found, key=lambda group: "no_decay" in group["name"])


def freeze_names(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Freeze parameters that belong to the trained part; returns their values, on the CPU in fp32.

    They are stored with the trained ones, although an engine may round its own copy.
    """
    held: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
            held[name] = parameter.detach().float().cpu().clone()
    return held
