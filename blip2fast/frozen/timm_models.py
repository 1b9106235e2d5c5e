"""Vision models of timm as frozen encoders, in the form of those of transformers.

They are named `timm:NAME` (`timm:vit_small_patch16_224.augreg_in21k`, `timm:hf-hub:OWNER/NAME`), or
are a local folder with timm's `config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from blip2fast._imports import needs

_PREFIX = "timm:"
# timm's names -> PIL's numbers
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def is_timm(encoder: str) -> bool:
    """Whether an encoder is timm's: by its prefix, or by the config of its folder."""
    return encoder.startswith(_PREFIX) or "architecture" in _folder_config(encoder)


def _folder_config(name: str) -> dict[str, Any]:
    path = Path(name.removeprefix(_PREFIX), "config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and "pretrained_cfg" in values else {}


def _timm_name(encoder: str) -> str:
    name = encoder.removeprefix(_PREFIX)
    return f"local-dir:{name}" if Path(name).is_dir() else name


class TimmConfig(SimpleNamespace):
    """What the rest of the library reads of a model's configuration."""

    def to_dict(self) -> dict[str, Any]:
        """All values."""
        return dict(vars(self))


class TimmVision(nn.Module):
    """A timm model whose call gives tokens, in the form of a vision model of transformers.

    Attributes:
        vision_model: timm's model.
        config: its sizes.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.vision_model = model
        known = (_folder_config(name), _pretrained_config(model))
        named = [str(each["architecture"]) for each in known if each.get("architecture")]
        registers = int(getattr(model, "num_reg_tokens", 0) or 0)
        self.config = TimmConfig(
            model_type="timm",
            architecture=named[0] if named else name.removeprefix(_PREFIX),
            hidden_size=int(model.num_features),  # type: ignore[arg-type]
            image_size=_image_size(model),
            num_hidden_layers=len(getattr(model, "blocks", ())),
            num_register_tokens=registers,
            num_class_tokens=int(getattr(model, "num_prefix_tokens", registers)) - registers,
        )

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """`last_hidden_state` [B, S, E] of images [B, 3, h, w]."""
        features: Any = self.vision_model.forward_features
        return SimpleNamespace(last_hidden_state=features(pixel_values))


def load_timm(encoder: str, pretrained: bool = True) -> TimmVision:
    """Load a model of timm.

    Args:
        encoder: `timm:NAME`, or a folder.
        pretrained: with its weights.

    Raises:
        ValueError: timm does not know it or cannot load it.
    """
    with needs("run a vision model of timm", "timm"):
        import timm
    try:
        model = timm.create_model(_timm_name(encoder), pretrained=pretrained, num_classes=0)
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"image encoder {encoder!r}: timm cannot load it ({reason}); give a name of "
            "timm.list_models(pretrained=True), or a folder with its config.json and weights"
        ) from error
    return TimmVision(model, encoder)


def timm_preprocessing(encoder: str) -> dict[str, Any]:
    """Size, mean, deviation and resampling of a model of timm."""
    values = _folder_config(encoder).get("pretrained_cfg", {})
    if not values:
        with needs("run a vision model of timm", "timm"):
            import timm
        found = timm.get_pretrained_cfg(_timm_name(encoder))
        values = {} if found is None else found.to_dict()
    stated = {
        "mean": tuple(values["mean"]) if values.get("mean") else None,
        "std": tuple(values["std"]) if values.get("std") else None,
        "resample": _RESAMPLING.get(values.get("interpolation", "")),
    }
    return {name: value for name, value in stated.items() if value is not None}


def _pretrained_config(model: nn.Module) -> dict[str, Any]:
    values = getattr(model, "pretrained_cfg", None) or {}
    return dict(values)


def _image_size(model: nn.Module) -> int:
    """The side that the model was built for, or was trained with."""
    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built is not None:
        return int(built[0])
    return int(_pretrained_config(model).get("input_size", (3, 224, 224))[-1])
