"""Reads LAVIS's `.pth` files, and renames their image encoder from and to transformers' names.

LAVIS's encoder is EVA-CLIP's ViT-g. transformers' `Blip2VisionModel` computes the same function: it
has one bias for queries, keys and values where LAVIS has `q_bias` and `v_bias`, and its
`post_layernorm` is LAVIS's `ln_vision`, which belongs to the trained part and is not handled here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

_SUFFIXES = (".pth", ".pt")
PREFIX = "visual_encoder."
# (LAVIS's name, transformers' name), below the encoder and below a block
_TABLES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_BLOCK = {
    "norm1.weight": "layer_norm1.weight",
    "norm1.bias": "layer_norm1.bias",
    "norm2.weight": "layer_norm2.weight",
    "norm2.bias": "layer_norm2.bias",
    "attn.qkv.weight": "self_attn.qkv.weight",
    "attn.proj.weight": "self_attn.projection.weight",
    "attn.proj.bias": "self_attn.projection.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_QKV_BIAS = "self_attn.qkv.bias"
# ViT-g has 40 blocks, of which BLIP-2 runs 39
_MOST_BLOCKS = 39
# the width of its heads, which no tensor shows
_HEAD = 88


@dataclass(frozen=True)
class VisionWeights:
    """The weights of a `Blip2VisionModel`, without its last norm.

    Attributes:
        config: its configuration.
        tensors: by transformers' names, such as `encoder.layers.0.mlp.fc1.weight`.
    """

    config: Blip2VisionConfig
    tensors: dict[str, Tensor]

    def model(self, post_layernorm: Mapping[str, Tensor] | None = None) -> Blip2VisionModel:
        """A model in fp32 with these weights.

        Args:
            post_layernorm: `weight` and `bias` of the last norm; by default it is new.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        norm = {f"post_layernorm.{name}": value for name, value in (post_layernorm or {}).items()}
        with torch.device("meta"):
            model = Blip2VisionModel(self.config)
        model.to_empty(device="cpu")
        width = self.config.hidden_size
        norm = norm or {
            "post_layernorm.weight": torch.ones(width),
            "post_layernorm.bias": torch.zeros(width),
        }
        try:
            model.load_state_dict(self.tensors | norm)
        except RuntimeError as error:
            raise ValueError(f"the image encoder is not whole: {error}") from error
        return model.eval()

    def resized(self, image_size: int) -> VisionWeights:
        """The weights for images of another size: bicubic interpolation of the positions.

        Args:
            image_size: side of the images, in pixels.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size.
        """
        patch = int(self.config.patch_size)
        if image_size < patch or image_size % patch:
            raise ValueError(f"image size {image_size}: expected a multiple of the patch, {patch}")
        if image_size == self.config.image_size:
            return self
        name = "embeddings.position_embedding"
        table = self.tensors[name]
        values = self.config.to_dict() | {"image_size": image_size}
        positions = resize_positions(table, image_size // patch).to(table.dtype)
        return VisionWeights(Blip2VisionConfig(**values), self.tensors | {name: positions})


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + n * n, E] of the class token and n x n patches, for side x side patches.

    Bicubic interpolation in fp32, as LAVIS and transformers do it.
    """
    first, patches = table[:, :1].float(), table[:, 1:].float()
    old = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False
    )
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def is_lavis_file(name: str | Path) -> bool:
    """Whether `name` is a file of a kind that LAVIS writes; it is not read."""
    path = Path(name).expanduser()
    return path.suffix in _SUFFIXES and path.is_file()


def read_lavis_file(path: str | Path) -> dict[str, Tensor]:
    """The parameters in a LAVIS file, under LAVIS's names; mapped, not read, where possible.

    Nothing but tensors and plain values is unpickled (`weights_only`).

    Raises:
        ValueError: damaged, or of another kind.
    """
    path = Path(path).expanduser()
    try:
        values = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path}: not a file of PyTorch weights, or damaged ({reason})") from error
    state = values.get("model", values) if isinstance(values, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path}: expected LAVIS's dictionary with its parameters under 'model', got "
            f"{type(values).__name__}"
        )
    return {str(name): value for name, value in state.items()}


def _load(path: Path) -> Any:
    settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path, mmap=True, **settings)
    except RuntimeError as error:
        # files of PyTorch before 1.6 cannot be mapped
        if "mmap" not in str(error):
            raise
        return torch.load(path, **settings)


def vision_from_lavis(state: Mapping[str, Tensor], source: str) -> VisionWeights | None:
    """The image encoder among LAVIS's parameters; None without one.

    Args:
        state: A checkpoint's parameters, or those of the encoder's own file (`eva_vit_g.pth`).
        source: The file, for messages.

    Raises:
        ValueError: an encoder of another kind, or one that is not whole.
    """
    inner = {n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX)}
    if not inner and "patch_embed.proj.weight" in state:
        inner = dict(state)
    if not inner:
        return None
    if "conv1.weight" in inner:
        raise ValueError(
            f"{source}: its image encoder is CLIP's ViT-L in LAVIS's layout; give "
            "openai/clip-vit-large-patch14 as the image encoder"
        )
    missing = [name for name in _TABLES if name not in inner]
    if missing:
        raise ValueError(f"{source}: its image encoder lacks {missing[0]}")
    numbers = {int(n.split(".")[1]) for n in inner if n.startswith("blocks.")}
    count = min(len(numbers), _MOST_BLOCKS)
    tensors = {ours: inner[theirs] for theirs, ours in _TABLES.items()}
    for number in range(count):
        there, here = f"blocks.{number}.", f"encoder.layers.{number}."
        names = [*_BLOCK, "attn.q_bias", "attn.v_bias"]
        lost = next((there + name for name in names if there + name not in inner), None)
        if lost is not None:
            raise ValueError(f"{source}: its image encoder lacks {lost}")
        tensors |= {here + ours: inner[there + theirs] for theirs, ours in _BLOCK.items()}
        query, value = inner[f"{there}attn.q_bias"], inner[f"{there}attn.v_bias"]
        tensors[here + _QKV_BIAS] = torch.cat([query, torch.zeros_like(value), value])
    return VisionWeights(_config(tensors, count, source), tensors)


def _config(tensors: Mapping[str, Tensor], blocks: int, source: str) -> Blip2VisionConfig:
    kernel = tensors["embeddings.patch_embedding.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    side = round((tensors["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    if blocks == 0 or width % _HEAD:
        raise ValueError(
            f"{source}: its image encoder has {blocks} blocks of width {width}; expected a ViT-g "
            f"of EVA-CLIP, whose heads have a width of {_HEAD}"
        )
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=blocks,
        num_attention_heads=width // _HEAD,
        image_size=side * patch,
        patch_size=patch,
    )


def lavis_vision_name(name: str) -> str | None:
    """LAVIS's name of one of `VisionWeights.tensors`; None for a bias that is split in two."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return next(f"{PREFIX}{theirs}" for theirs, ours in _TABLES.items() if ours == name)
    if match[2] == _QKV_BIAS:
        return None
    theirs = next(theirs for theirs, ours in _BLOCK.items() if ours == match[2])
    return f"{PREFIX}blocks.{match[1]}.{theirs}"


def vision_to_lavis(vision: VisionWeights) -> dict[str, Tensor]:
    """The weights under LAVIS's names.

    LAVIS has no bias of the keys. One adds the same to all scores of a query, so that leaving it
    out changes nothing.
    """
    renamed = {}
    for name, value in vision.tensors.items():
        there = lavis_vision_name(name)
        if there is not None:
            renamed[there] = value
            continue
        start = f"{PREFIX}blocks.{name.split('.')[2]}.attn."
        query, _, last = value.chunk(3)
        renamed |= {f"{start}q_bias": query.clone(), f"{start}v_bias": last.clone()}
    return renamed


def load_lavis_vision(path: str | Path) -> Blip2VisionModel:
    """The image encoder of a LAVIS file, as transformers' model in fp32; its last norm is new.

    Raises:
        ValueError: the file has no image encoder, or one of another kind.
    """
    return _vision_in(path).model()


def load_lavis_config(path: str | Path) -> Blip2VisionConfig:
    """The configuration of the image encoder of a LAVIS file; its weights are not read.

    Raises:
        ValueError: as `load_lavis_vision`.
    """
    return _vision_in(path).config


def _vision_in(path: str | Path) -> VisionWeights:
    state = read_lavis_file(path)
    vision = vision_from_lavis(state, str(path))
    if vision is None:
        raise ValueError(
            f"{path} holds no image encoder: LAVIS leaves the frozen one out. It is EVA-CLIP's "
            "ViT-g/14, which eva_vit_g.pth and any transformers BLIP-2 hold, such as "
            "Salesforce/blip2-opt-2.7b"
        )
    return vision
