"""Image encoders: images to the tokens a Q-Former reads.

They are frozen in pretraining; fine-tuning may train them (`FrozenImageEncoder.unfreeze`).


BLIP-2 uses ViT-g/14 (EVA-CLIP) without its last block, and CLIP's ViT-L/14 up to its second-to-last
block (paper, section 3.4). Any other vision model of transformers (`AutoModel`) or timm that gives
tokens can take their place. Of each these tokens are taken:

* of its last block, of CLIP the second-to-last; `layer` says otherwise: 2 is the second block, -1
  the last one, -2 the one before it;
* before the encoder's final norm, which the trained `ln_vision` replaces;
* the class token first, where there is one, then the patches row by row. Register tokens (DINOv2
  with registers, DINOv3) are dropped, as their authors do.

Legend: B images, S image tokens, E their width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    Blip2VisionModel,
    CLIPVisionModel,
    InstructBlipVisionModel,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
)

from blip2fast._choices import Quantization
from blip2fast.frozen.cpu_inference import tokens_of
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.lavis_files import is_lavis_file, load_lavis_config, load_lavis_vision
from blip2fast.frozen.local_models import not_found
from blip2fast.frozen.perceptrons import chain_perceptrons
from blip2fast.frozen.preprocessing import read_preprocessing
from blip2fast.frozen.quantization import quantize_int8
from blip2fast.frozen.recompute import is_unfrozen, recompute_forward
from blip2fast.frozen.timm_models import TimmVision, is_timm, load_timm


@dataclass(frozen=True)
class _Kind:
    """How to load and truncate one family of vision models.

    Attributes:
        model: its class; None: `AutoModel`'s.
        skipped_blocks: number of final blocks to drop, unless a layer is given.
        load: more arguments of `from_pretrained`.
        settings: of its config, for what tokens do not need.
        sizes: of images. `own`: the config's alone. `resized`: others when the positions have been
            interpolated. `any`: the model interpolates them itself.
    """

    model: type[PreTrainedModel] | None = None
    skipped_blocks: int = 0
    load: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: Literal["own", "resized", "any"] = "own"


_CLIP = _Kind(CLIPVisionModel, skipped_blocks=1, sizes="resized")
# The published BLIP-2 checkpoints contain only the 39 blocks that are used, of 40.
_BLIP2 = _Kind(Blip2VisionModel, sizes="resized")
_INSTRUCT = _Kind(InstructBlipVisionModel, sizes="resized")
_SIGLIP = _Kind(SiglipVisionModel, settings={"vision_use_head": False})
_SIGLIP2 = _Kind(Siglip2VisionModel, settings={"vision_use_head": False})
_DINO = _Kind(sizes="any")
_KINDS = {
    "blip-2": _BLIP2,
    "blip_2_vision_model": _BLIP2,
    "instructblip": _INSTRUCT,
    "instructblip_vision_model": _INSTRUCT,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "vit": _Kind(ViTModel, load={"add_pooling_layer": False}, sizes="resized"),
    "vit_mae": _Kind(ViTMAEModel, sizes="resized"),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "dinov3_vit": _DINO,
}
_WITHOUT_CLASS = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
# the final norm, as the families name it
_NORMS = ("layernorm", "post_layernorm", "norm")
_ID = re.compile(
    r"(?P<name>.+?)(?:, (?P<size>\d+) pixels)?(?:, (?P<quantization>int8))?"
    r", (?:block (?P<block>\d+)|all blocks)"
)


class FrozenImageEncoder(nn.Module):
    """A vision model, truncated after a block and without its final norm; frozen until `unfreeze`.

    Args:
        model: a transformers vision model, or a `TimmVision`; truncated in place.
        num_blocks: number of blocks to run; None: all, of a model without a list of blocks.
        encoder_id: name of the encoder, for the manifest of a feature cache.
        image_size: h = w of its input images, in pixels; None: those of the model. For another
            size the position embeddings are interpolated.
        identified: compute its identity, for which its weights must have values.
        quantization: `int8`: the linear layers of its blocks compute with 8-bit integers, by
            torchao (`quantization.py`). Its tokens, and so its identity, are others, and it
            cannot be trained.

    Attributes:
        quantization: as given.
        width, num_tokens: E and S.
        image_size: h = w of its input images, in pixels.
        identity: identity of the truncated model's weights at construction, whatever the image
            size; empty if not `identified`.

    Raises:
        ValueError: no such block, a model that does not give tokens, an image size that is not a
            multiple of the patch size, or `int8` for a model without a list of blocks.
        ModuleNotFoundError: `int8` without torchao.
    """

    def __init__(
        self,
        model: PreTrainedModel | TimmVision,
        num_blocks: int | None,
        encoder_id: str,
        image_size: int | None = None,
        identified: bool = True,
        quantization: Quantization = "none",
    ) -> None:
        super().__init__()
        blocks = find_blocks(model)
        if num_blocks is not None:
            if blocks is None:
                raise ValueError(f"{encoder_id}: no list of blocks, so no layer can be chosen")
            if not 1 <= num_blocks <= len(blocks):
                raise ValueError(f"layer={num_blocks}: {encoder_id} has blocks 1 to {len(blocks)}")
            del blocks[num_blocks:]
        self._num_blocks = 0 if blocks is None else len(blocks)
        for name in _NORMS:
            for owner in (model, getattr(model, "vision_model", None)):
                if owner is not None and isinstance(getattr(owner, name, None), nn.Module):
                    setattr(owner, name, nn.Identity())
        chain_perceptrons(model)
        own_size = own_image_size(model.config)
        self.image_size = own_size if image_size is None else image_size
        sized = "" if self.image_size == own_size else f", {self.image_size} pixels"
        ends = "all blocks" if num_blocks is None else f"block {num_blocks}"
        self.quantization = quantization
        if quantization == "int8":
            if blocks is None:
                raise ValueError(f"{encoder_id}: no list of blocks, whose weights int8 is for")
            quantize_int8(blocks)
            sized += ", int8"
        self.encoder_id = f"{encoder_id}{sized}, {ends}"
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0
        self.identity = (
            identify_model(model, self.encoder_id)
            if identified
            else FrozenIdentity(self.encoder_id, {}, {}, 0)
        )
        if self.image_size != own_size and not _interpolates(model.config):
            _resize(model, self.image_size)
        # some models have parts that are never trained, such as ViTMAE's positions
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.model = model.requires_grad_(False)
        self.eval()
        self._sizes = (0, 0)
        count = count_tokens(model.config, self.image_size)
        if count is None:
            self.num_tokens, self.width = self._probe(encoder_id)
        else:
            self.num_tokens, self.width = count, int(model.config.hidden_size)
        self._sizes = (self.num_tokens, self.width)

    def resize(self, image_size: int) -> None:
        """Take images of another size; the position embeddings are interpolated.

        Raises:
            ValueError: not a multiple of the patch size.
        """
        if image_size == self.image_size:
            return
        if not _interpolates(self.model.config):
            _resize(self.model, image_size)
        self.image_size = image_size
        count = count_tokens(self.model.config, image_size)
        self.num_tokens = self._probe(self.encoder_id)[0] if count is None else count
        self._sizes = (self.num_tokens, self.width)

    @torch.no_grad()
    def _probe(self, name: str) -> tuple[int, int]:
        """S and E, from the tokens of an empty image."""
        images = torch.zeros(1, 3, self.image_size, self.image_size)
        try:
            tokens = self._tokens(images)
        except (TypeError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{name}: does not give tokens for images of {self.image_size} pixels ({reason}); "
                "cache its features with code of your own (docs/own_encoder.md)"
            ) from error
        if tokens.ndim != 3:
            raise ValueError(
                f"{name}: gives a map of shape {tuple(tokens.shape)} for an image, where tokens "
                "(1, S, E) are expected; cache its features with code of your own "
                "(docs/own_encoder.md)"
            )
        return tokens.shape[1], tokens.shape[2]

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return is_unfrozen(self)

    def unfreeze(self) -> None:
        """Train the encoder: its parameters require gradients, except those fixed by design.

        Raises:
            ValueError: its weights are int8.
        """
        if self.quantization != "none":
            raise ValueError(
                f"{self.encoder_id}: int8 weights cannot be trained; load it without quantization"
            )
        for name in self._trainable:
            self.model.get_parameter(name).requires_grad_(True)

    def recompute_blocks(self) -> None:
        """Enable gradient checkpointing: blocks save their inputs only."""
        for block in self.blocks:
            recompute_forward(block)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block by `torch.compile`, at its first call; without blocks the model.

        Args:
            backend: of `torch.compile`.
        """
        for module in self._compiled_units():
            module.compile(backend=backend)

    def _compiled_units(self) -> list[nn.Module]:
        return list(self.blocks) or [self.model]

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks that run, in order."""
        return find_blocks(self.model, self._num_blocks) or nn.ModuleList()

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
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        if isinstance(self.model, ViTMAEModel):
            # Increasing noise keeps the patches in order; nothing is masked.
            order = torch.arange(self.num_tokens - 1, device=images.device, dtype=torch.float32)
            more["noise"] = order.expand(len(images), -1)
        pixels = images.to(next(self.model.parameters()).dtype)
        if isinstance(self.model, Siglip2VisionModel):
            pixels, more = _as_patches(pixels, int(self.model.config.patch_size))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            if any(unit._compiled_call_impl is not None for unit in self._compiled_units()):
                tokens: Tensor = self.model(pixels, **more).last_hidden_state
            else:
                tokens = tokens_of(self.model, pixels, more, *self._sizes)
        registers = int(getattr(self.model.config, "num_register_tokens", 0) or 0)
        if registers and tokens.ndim == 3:
            first = int(getattr(self.model.config, "num_class_tokens", 1))
            tokens = torch.cat([tokens[:, :first], tokens[:, first + registers :]], 1)
        return tokens


def _as_patches(pixels: Tensor, patch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What SigLIP 2 with patches of any number (NaFlex) takes of square images."""
    count, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels.view(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    patches = cut.reshape(count, rows * columns, patch * patch * channels)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    shapes = torch.tensor([[rows, columns]] * count, device=pixels.device)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes}


def own_image_size(config: Any) -> int:
    """The side of the images that a vision model was made for, in pixels; 224 if it says nothing.

    Of a whole model, that of its vision model.
    """
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if isinstance(size, list | tuple):
        size = size[0]
    if size is None and hasattr(config, "num_patches"):  # SigLIP 2 with patches of any number
        return round(config.num_patches**0.5) * int(config.patch_size)
    return 224 if size is None else int(size)


def count_tokens(config: Any, image_size: int) -> int | None:
    """S of an encoder that is known by its config, at an image size; None: found by trying."""
    config = getattr(config, "vision_config", config)
    if config.model_type not in _KINDS:
        return None
    patches = (image_size // int(config.patch_size)) ** 2
    return patches + (config.model_type not in _WITHOUT_CLASS)


def encoder_image_size(name_or_path: str) -> int:
    """The side of an encoder's images by default, from its files alone, in pixels.

    Raises:
        ValueError: not found, or a model that is not known to read images.
    """
    if is_timm(name_or_path):
        return own_image_size(load_timm(name_or_path, pretrained=False).config)
    if is_lavis_file(name_or_path):
        return own_image_size(load_lavis_config(name_or_path))
    return _default_size(name_or_path, _config(name_or_path))


class EncoderName(NamedTuple):
    """What a `FrozenImageEncoder.encoder_id` says: the arguments of `load_image_encoder`."""

    name: str
    layer: int | None = None
    image_size: int | None = None
    quantization: Quantization = "none"


def parse_encoder_id(encoder_id: str) -> EncoderName | None:
    """The parts of a `FrozenImageEncoder.encoder_id`; None if it is none."""
    found = _ID.fullmatch(encoder_id)
    if found is None:
        return None
    block, size = found["block"], found["size"]
    return EncoderName(
        found["name"],
        None if block is None else int(block),
        None if size is None else int(size),
        "int8" if found["quantization"] else "none",
    )


def load_image_encoder(
    name_or_path: str,
    layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    quantization: Quantization = "none",
) -> FrozenImageEncoder:
    """Load a frozen encoder.

    Args:
        name_or_path: folder or hub name of a BLIP-2 or InstructBLIP (whole or its vision model),
            CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, ViT or ViTMAE checkpoint, or of another vision
            model of `AutoModel`; `timm:NAME`, or a folder with timm's config.json; or a `.pth` file
            of LAVIS that holds its image encoder.
        layer: number of blocks to run, or counted from the last one: -1 all, -2 all but the last;
            None: BLIP-2's choice, which is all but the last for CLIP and all for the others.
        dtype: dtype of the weights and tokens.
        image_size: h = w of its input images, in pixels; None: that of a DINO's
            preprocessor_config.json, of others that of its config. For another size the position
            embeddings are interpolated.
        quantization: as in `FrozenImageEncoder`.

    Raises:
        ValueError: not found, a model that does not give tokens for images, fewer blocks than
            `layer`, or an `image_size` that the model cannot take.
    """
    if is_timm(name_or_path):
        timm_model = load_timm(name_or_path)
        size = own_image_size(timm_model.config)
        if image_size not in (None, size):
            raise ValueError(_other_size(name_or_path, image_size, size))
        num_blocks = _chosen_blocks(timm_model, layer, 0)
        return FrozenImageEncoder(
            timm_model, num_blocks, name_or_path, quantization=quantization
        ).to(dtype)
    if is_lavis_file(name_or_path):
        eva = load_lavis_vision(name_or_path)
        size = _checked_size(name_or_path, eva.config, _BLIP2, image_size)
        num_blocks = _chosen_blocks(eva, layer, 0)
        return FrozenImageEncoder(
            eva, num_blocks, name_or_path, size, quantization=quantization
        ).to(dtype)
    config = _config(name_or_path)
    kind = _kind_of(name_or_path, config)
    size = _checked_size(name_or_path, config, kind, image_size)
    try:
        model = _load(kind, name_or_path, config)
    except OSError as error:
        raise ValueError(not_found("image encoder", name_or_path, error)) from error
    num_blocks = _chosen_blocks(model, layer, kind.skipped_blocks)
    # cast after loading, not while loading: the identity must not depend on the precision
    encoder = FrozenImageEncoder(model, num_blocks, name_or_path, size, quantization=quantization)
    return encoder.to(dtype)


def without_weights(config: Any, layer: int | None = None) -> FrozenImageEncoder:
    """An encoder of a vision configuration with new weights, to measure its memory.

    Args:
        config: a transformers configuration of a vision model.
        layer: as in `load_image_encoder`.

    Raises:
        ValueError: a model that is not known to read images.
    """
    kind = _kind_of("the image encoder", config)
    model = (kind.model or _auto_class(config))(config, **kind.load)
    return FrozenImageEncoder(
        model, _chosen_blocks(model, layer, kind.skipped_blocks), "", identified=False
    )


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("image encoder", name, error)) from error


def _kind_of(name: str, config: Any) -> _Kind:
    kind = _KINDS.get(config.model_type)
    if kind is not None:
        return kind
    vision = getattr(config, "vision_config", config)
    found = _auto_class(vision)
    if found is None or getattr(found, "main_input_name", "") != "pixel_values":
        raise ValueError(
            f"{name} is a {config.model_type!r} model; known are {', '.join(_KINDS)}, other vision "
            "models of AutoModel, and timm:NAME"
        )
    return _Kind()


def _auto_class(config: Any) -> Any:
    if type(config) not in MODEL_MAPPING:
        return None
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def _checked_size(name: str, config: Any, kind: _Kind, image_size: int | None) -> int:
    size = _default_size(name, config)
    if image_size is None or image_size == size:
        return size
    if kind.sizes == "own":
        raise ValueError(_other_size(name, image_size, size))
    _check_patches(image_size, int(getattr(config, "vision_config", config).patch_size))
    return image_size


def _other_size(name: str, given: int | None, own: int) -> str:
    return f"image_size is {given}, but {name} takes images of {own}"


def _default_size(name: str, config: Any) -> int:
    size = own_image_size(config)
    if _kind_of(name, config).sizes != "any":
        return size
    stated = read_preprocessing(name).size or size
    return stated if stated % int(config.patch_size) == 0 else size


def _interpolates(config: Any) -> bool:
    """Whether the model interpolates its positions itself, for images of any size."""
    return _KINDS.get(config.model_type, _Kind()).sizes == "any"


def _chosen_blocks(
    model: PreTrainedModel | TimmVision, layer: int | None, skipped: int
) -> int | None:
    """How many blocks to run; None: all, of a model without a list of them."""
    blocks = find_blocks(model)
    if blocks is None:
        return None if layer in (None, -1) else layer
    if layer is None:
        return len(blocks) - skipped
    return len(blocks) + 1 + layer if layer < 0 else layer


def _load(kind: _Kind, name: str, config: Any) -> PreTrainedModel:
    # A whole BLIP-2, CLIP or SigLIP config contains the vision config.
    config = getattr(config, "vision_config", config)
    for setting, value in kind.settings.items():
        setattr(config, setting, value)
    more = {"key_mapping": {r"^vision_model\.": ""}} if kind in (_BLIP2, _INSTRUCT) else {}
    model, report = (kind.model or _auto_class(config)).from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        **kind.load,
        **more,
    )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of its encoder, such as {missing[0]}"
        )
    loaded: PreTrainedModel = model
    return loaded


def find_blocks(
    model: PreTrainedModel | TimmVision, count: int | None = None
) -> nn.ModuleList | nn.Sequential | None:
    """The list of transformer blocks; its attribute path depends on the transformers version."""
    count = getattr(model.config, "num_hidden_layers", 0) if count is None else count
    for module in model.modules():
        if count and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == count:
            return module
    return None


def _check_patches(size: int, patch: int) -> None:
    if size % patch:
        near = max(1, round(size / patch)) * patch
        raise ValueError(
            f"image_size {size} is not a multiple of the encoder's patch size {patch}; {near} is"
        )


@torch.no_grad()
def _resize(model: PreTrainedModel, size: int) -> None:
    """Take images of another size: the positions of patches are interpolated, bicubic, as in LAVIS.

    Raises:
        ValueError: `size` is not a multiple of the patch size.
    """
    patch = int(model.config.patch_size)
    _check_patches(size, patch)
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
    for name, parameter in new.named_parameters():
        if name.startswith("position_embedding"):
            parameter.copy_(table.reshape(parameter.shape))
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    owner.embeddings = new.train(old.training)
    for module in model.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
