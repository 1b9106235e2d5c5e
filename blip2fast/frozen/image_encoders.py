"""Image encoders from transformers checkpoints: images to the tokens a Q-Former reads.

They are frozen in pretraining; fine-tuning may train them (`FrozenImageEncoder.unfreeze`).

BLIP-2 uses ViT-g/14 (EVA-CLIP) without its last block, and CLIP's ViT-L/14 up to its second-to-last
block (paper, section 3.4). The encoder's final norm is not applied: the trained `ln_vision`
replaces it.

Legend: B images, S image tokens (the class token first), E their width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2VisionModel,
    CLIPVisionModel,
    PreTrainedModel,
    ViTMAEModel,
    ViTModel,
)

from blip2fast.frozen.hub import not_found
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.recompute import is_unfrozen, recompute_forward


@dataclass(frozen=True)
class _Kind:
    """How to load and truncate one family of vision models."""

    model: type[PreTrainedModel]
    skipped_blocks: int = 0  # number of final blocks to drop
    load: dict[str, Any] | None = None


_CLIP = _Kind(CLIPVisionModel, skipped_blocks=1)
# The published BLIP-2 checkpoints contain only the 39 blocks that are used, of 40.
_BLIP2 = _Kind(Blip2VisionModel)
_KINDS = {
    "blip-2": _BLIP2,
    "blip_2_vision_model": _BLIP2,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "vit": _Kind(ViTModel, load={"add_pooling_layer": False}),
    "vit_mae": _Kind(ViTMAEModel),
}


class FrozenImageEncoder(nn.Module):
    """A vision model, truncated after a block and without its final norm; frozen until `unfreeze`.

    Args:
        model: a transformers vision model; truncated in place.
        num_blocks: number of blocks to run.
        encoder_id: name of the encoder, for the manifest of a feature cache.
        image_size: h = w of its input images, in pixels; None: those of the model. For another
            size the position embeddings are interpolated.
        identified: compute its identity, for which its weights must have values.

    Attributes:
        width: E.
        identity: identity of the truncated model's weights at construction, whatever the image
            size; empty if not `identified`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_blocks: int,
        encoder_id: str,
        image_size: int | None = None,
        identified: bool = True,
    ) -> None:
        super().__init__()
        blocks = _blocks(model, int(model.config.num_hidden_layers))
        if not 1 <= num_blocks <= len(blocks):
            raise ValueError(f"layer={num_blocks}: {encoder_id} has blocks 1 to {len(blocks)}")
        del blocks[num_blocks:]
        self._num_blocks = num_blocks
        for name in ("layernorm", "post_layernorm"):
            for owner in (model, getattr(model, "vision_model", None)):
                if owner is not None and hasattr(owner, name):
                    setattr(owner, name, nn.Identity())
        self.encoder_id = f"{encoder_id}, block {num_blocks}"
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        self.identity = (
            identify_model(model, self.encoder_id)
            if identified
            else FrozenIdentity(self.encoder_id, {}, {}, 0)
        )
        if image_size is not None and image_size != int(model.config.image_size):
            _resize(model, image_size)
        # some models have parts that are never trained, such as ViTMAE's positions
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.model = model.requires_grad_(False)
        self.width = int(model.config.hidden_size)
        self.eval()

    @property
    def image_size(self) -> int:
        """h = w of the input images, in pixels."""
        return int(self.model.config.image_size)

    def resize(self, image_size: int) -> None:
        """Take images of another size; the position embeddings are interpolated.

        Raises:
            ValueError: not a multiple of the patch size.
        """
        if image_size != self.image_size:
            _resize(self.model, image_size)

    @property
    def num_tokens(self) -> int:
        """S: the number of patches of an image, plus the class token."""
        return (self.image_size // int(self.model.config.patch_size)) ** 2 + 1

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return is_unfrozen(self)

    def unfreeze(self) -> None:
        """Train the encoder: its parameters require gradients, except those fixed by design."""
        for name in self._trainable:
            self.model.get_parameter(name).requires_grad_(True)

    def recompute_blocks(self) -> None:
        """Enable gradient checkpointing: blocks save their inputs only."""
        for block in self.blocks:
            recompute_forward(block)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks that run, in order."""
        return _blocks(self.model, self._num_blocks)

    def depths(self) -> Iterator[tuple[str, int]]:
        """Each parameter's name and its depth: 0 for the embeddings, i for block i = 1, 2, ..."""
        of_block = {
            id(parameter): depth
            for depth, block in enumerate(self.blocks, 1)
            for parameter in block.parameters()
        }
        for name, parameter in self.named_parameters():
            yield name, of_block.get(id(parameter), 0)

    def train(self, mode: bool = True) -> FrozenImageEncoder:
        """Set training mode; a frozen encoder stays in evaluation mode."""
        return super().train(mode and self.trains)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, h, w] to tokens [B, S, E]; without gradient if it is frozen.

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
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            tokens: Tensor = self.model(images.to(parameter.dtype), **more).last_hidden_state
        return tokens


def load_image_encoder(
    name_or_path: str,
    layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
) -> FrozenImageEncoder:
    """Load a frozen encoder.

    Args:
        name_or_path: folder or hub name of a BLIP-2 (whole or its vision model), CLIP, ViT or
            ViTMAE checkpoint.
        layer: number of blocks to run; None: BLIP-2's choice, which is all but the last for CLIP
            and all for the others.
        dtype: dtype of the weights and tokens.
        image_size: h = w of its input images, in pixels; None: the checkpoint's own.

    Raises:
        ValueError: not found, an unsupported model family, fewer blocks than `layer`, or an
            `image_size` that is not a multiple of the patch size.
    """
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
    count = int(model.config.num_hidden_layers)
    num_blocks = count - kind.skipped_blocks if layer is None else layer
    # cast after loading, not while loading: the identity must not depend on the precision
    return FrozenImageEncoder(model, num_blocks, name_or_path, image_size).to(dtype)


def without_weights(config: Any, layer: int | None = None) -> FrozenImageEncoder:
    """An encoder of a vision configuration with new weights, to measure its memory.

    Args:
        config: a transformers configuration of one of the known vision models.
        layer: as in `load_image_encoder`.

    Raises:
        ValueError: an unsupported model family.
    """
    kind = _KINDS.get(config.model_type)
    if kind is None:
        raise ValueError(f"a {config.model_type!r} model; known are {', '.join(_KINDS)}")
    model = kind.model(config, **(kind.load or {}))
    count = int(config.num_hidden_layers)
    num_blocks = count - kind.skipped_blocks if layer is None else layer
    return FrozenImageEncoder(model, num_blocks, "", identified=False)


def _load(kind: _Kind, name: str, config: Any) -> PreTrainedModel:
    # A whole BLIP-2 or CLIP config contains the vision config.
    config = getattr(config, "vision_config", config)
    more = {"key_mapping": {r"^vision_model\.": ""}} if kind is _BLIP2 else {}
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


def _blocks(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The list of transformer blocks; its attribute path depends on the transformers version."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__}: no list of {count} blocks")


@torch.no_grad()
def _resize(model: PreTrainedModel, size: int) -> None:
    """Take images of another size: the positions of patches are interpolated, bicubic, as in LAVIS.

    Raises:
        ValueError: `size` is not a multiple of the patch size.
    """
    patch = int(model.config.patch_size)
    if size % patch:
        near = max(1, round(size / patch)) * patch
        raise ValueError(
            f"image_size {size} is not a multiple of the encoder's patch size {patch}; {near} is"
        )
    owner = next(m for m in model.modules() if hasattr(getattr(m, "embeddings", None), "forward"))
    old = owner.embeddings
    # a copy: a whole model's configuration may be shared
    config = copy.deepcopy(model.config)
    config.image_size = size
    new = type(old)(config).to(next(old.parameters()))
    places = (size // patch) ** 2 + 1
    table = old.interpolate_pos_encoding(
        next(old.parameters()).new_empty(1, places, config.hidden_size), size, size
    )
    kept = {n: v for n, v in old.state_dict().items() if not n.startswith("position_")}
    new.load_state_dict(kept, strict=False)
    name, positions = next(
        (n, p) for n, p in new.named_parameters() if n.startswith("position_embedding")
    )
    positions.copy_(table.reshape(positions.shape))
    positions.requires_grad_(old.get_parameter(name).requires_grad)
    owner.embeddings = new.train(old.training)
    for module in model.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
