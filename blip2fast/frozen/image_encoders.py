"""Frozen image encoders from transformers checkpoints: images to the tokens a Q-Former reads.

BLIP-2 uses ViT-g/14 (EVA-CLIP) without its last block, and CLIP's ViT-L/14 up to its second-to-last
block (paper, section 3.4). The encoder's final norm is not applied: the trained `ln_vision`
replaces it.

Legend: B images, S image tokens (the class token first), E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2VisionModel,
    CLIPVisionModel,
    InstructBlipVisionModel,
    PreTrainedModel,
    ViTMAEModel,
    ViTModel,
)

from blip2fast.frozen.hub import not_found
from blip2fast.frozen.identity import identify_model
from blip2fast.frozen.lavis_files import is_lavis_file, load_lavis_vision


@dataclass(frozen=True)
class _Kind:
    """How to load and truncate one family of vision models."""

    model: type[PreTrainedModel]
    skipped_blocks: int = 0  # number of final blocks to drop
    load: dict[str, Any] | None = None


_CLIP = _Kind(CLIPVisionModel, skipped_blocks=1)
# The published BLIP-2 checkpoints contain only the 39 blocks that are used, of 40.
_BLIP2, _INSTRUCT = _Kind(Blip2VisionModel), _Kind(InstructBlipVisionModel)
_KINDS = {
    "blip-2": _BLIP2,
    "blip_2_vision_model": _BLIP2,
    "instructblip": _INSTRUCT,
    "instructblip_vision_model": _INSTRUCT,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "vit": _Kind(ViTModel, load={"add_pooling_layer": False}),
    "vit_mae": _Kind(ViTMAEModel),
}


class FrozenImageEncoder(nn.Module):
    """A frozen vision model, truncated after a block and without its final norm.

    Args:
        model: a transformers vision model; truncated in place.
        num_blocks: number of blocks to run.
        encoder_id: name of the encoder, for the manifest of a feature cache.

    Attributes:
        width, image_size: E, and the side of its input images, in pixels.
        identity: identity of the truncated model's weights at construction.
    """

    def __init__(self, model: PreTrainedModel, num_blocks: int, encoder_id: str) -> None:
        super().__init__()
        blocks = _blocks(model)
        if not 1 <= num_blocks <= len(blocks):
            raise ValueError(f"layer={num_blocks}: {encoder_id} has blocks 1 to {len(blocks)}")
        del blocks[num_blocks:]
        for name in ("layernorm", "post_layernorm"):
            for owner in (model, getattr(model, "vision_model", None)):
                if owner is not None and hasattr(owner, name):
                    setattr(owner, name, nn.Identity())
        self.model = model.requires_grad_(False)
        self.encoder_id = f"{encoder_id}, block {num_blocks}"
        self.width = int(model.config.hidden_size)
        self.image_size = int(model.config.image_size)
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        self.identity = identify_model(model, self.encoder_id)
        self.eval()

    @property
    def num_tokens(self) -> int:
        """S: the number of patches of an image, plus the class token."""
        return (self.image_size // int(self.model.config.patch_size)) ** 2 + 1

    def train(self, mode: bool = True) -> FrozenImageEncoder:
        """No effect: the encoder stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, h, w] to tokens [B, S, E].

        Raises:
            ValueError: the image size is not the encoder's.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, *{expected})")
        more = {}
        if isinstance(self.model, ViTMAEModel):
            # Increasing noise keeps the patches in order; nothing is masked.
            order = torch.arange(self.num_tokens - 1, device=images.device, dtype=torch.float32)
            more["noise"] = order.expand(len(images), -1)
        parameter = next(self.model.parameters())
        tokens: Tensor = self.model(images.to(parameter.dtype), **more).last_hidden_state
        return tokens


def load_image_encoder(
    name_or_path: str, layer: int | None = None, dtype: torch.dtype = torch.float32
) -> FrozenImageEncoder:
    """Load a frozen encoder.

    Args:
        name_or_path: folder or hub name of a BLIP-2 or InstructBLIP (whole or its vision model),
            CLIP, ViT or ViTMAE checkpoint, or a `.pth` file of LAVIS that holds its image encoder.
        layer: number of blocks to run; None: BLIP-2's choice, which is all but the last for CLIP
            and all for the others.
        dtype: dtype of the weights and tokens.

    Raises:
        ValueError: not found, an unsupported model family, or fewer blocks than `layer`.
    """
    if is_lavis_file(name_or_path):
        eva = load_lavis_vision(name_or_path)
        blocks = len(_blocks(eva)) if layer is None else layer
        return FrozenImageEncoder(eva, blocks, name_or_path).to(dtype)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        kind = _KINDS.get(config.model_type)
        if kind is None:
            raise ValueError(
                f"{name_or_path} is a {config.model_type!r} model; known are {', '.join(_KINDS)}"
            )
        model = _load(kind, name_or_path, config)
    except OSError as error:
        raise ValueError(not_found("image encoder", name_or_path, error)) from error
    num_blocks = len(_blocks(model)) - kind.skipped_blocks if layer is None else layer
    # cast after loading, not while loading: the identity must not depend on the precision
    return FrozenImageEncoder(model, num_blocks, name_or_path).to(dtype)


def _load(kind: _Kind, name: str, config: Any) -> PreTrainedModel:
    # A whole BLIP-2 or CLIP config contains the vision config.
    config = getattr(config, "vision_config", config)
    more = {"key_mapping": {r"^vision_model\.": ""}} if kind in (_BLIP2, _INSTRUCT) else {}
    model, report = kind.model.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        **(kind.load or {}),
        **more,
    )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of its encoder, such as {missing[0]}"
        )
    loaded: PreTrainedModel = model
    return loaded


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks; its attribute path depends on the transformers version."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"{type(model).__name__}: no list of {model.config.num_hidden_layers} blocks")
