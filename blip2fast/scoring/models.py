"""The models of an evaluation: one that writes, or one that compares images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
)

from blip2fast.checkpoints.files import MODEL, last_checkpoint
from blip2fast.checkpoints.trained import (
    Description,
    check_frozen,
    is_trained,
    load_trained,
    read_description,
)
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.manifest import read_manifest
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.pictures import to_rgb
from blip2fast.inference.inputs import Transform
from blip2fast.inference.loading import add_encoder
from blip2fast.inference.model import Blip2
from blip2fast.scoring.pictures import CachedTokens, ImageSource, ReadBatch
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import stage1_from_retrieval
from blip2fast.stage2.convert import VisionTokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Which model is evaluated, and how it is loaded.

    Attributes:
        path: output folder of a run of blip2fast, a checkpoint of it, or folder or hub name of a
            model of transformers.
        dtype: one of `DTYPES`.
        language_model, image_encoder: for a run whose frozen models have moved.
    """

    path: str
    dtype: str = "fp32"
    language_model: str | None = None
    image_encoder: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Writing:
    """A model that writes captions and answers, and the SHA-256 by which it is known."""

    model: Blip2
    sha256: str


def load_writing(source: ModelSource, images: ImageSource, device: torch.device) -> Writing:
    """Load a stage-2 model.

    Raises:
        ValueError: not found, a model that cannot write, or without an encoder for pictures; or a
            feature cache of another encoder.
    """
    model = Blip2.from_pretrained(
        source.path,
        dtype=DTYPES[source.dtype],
        device=device,
        language_model=source.language_model,
        image_encoder=source.image_encoder,
    )
    if isinstance(images, CachedTokens):
        width = model.model.config.encoder_hidden_size
        _check_cache(images.cache, width, source.path)
    else:
        model.check_reads_pictures()
    return Writing(model, _sha256(source.path, model.model))


@dataclass(frozen=True)
class Matching:
    """A model that compares images with texts.

    Attributes:
        model: in evaluation mode, with its image encoder where it has one.
        tokenizer: of the texts.
        transform: pictures to pixels; None without an encoder.
        sha256: by which the model is known.
    """

    model: Blip2Stage1
    tokenizer: Any
    transform: Transform | None
    sha256: str

    @torch.no_grad()
    def tokens(self, read: ReadBatch, keys: Sequence[str]) -> Tensor:
        """Tokens [B, S, E] of the images `keys` on the model's device, in its dtype."""
        kept = self.model.query_tokens
        if self.transform is None:
            return read.tokens(keys).to(kept)
        transform = self.transform
        pixels = torch.stack([transform(picture) for picture in read.pictures(keys)])
        tokens: Tensor = self.model.image_tokens(None, pixels.to(kept))
        return tokens.to(kept)


def load_matching(source: ModelSource, images: ImageSource, device: torch.device) -> Matching:
    """Load a stage-1 model, or a `Blip2ForImageTextRetrieval` of transformers.

    Raises:
        ValueError: as `load_writing`.
    """
    cached = isinstance(images, CachedTokens)
    if is_trained(source.path):
        found = _trained(source, cached)
    elif (Path(source.path) / "checkpoints").is_dir():
        last = last_checkpoint(Path(source.path) / "checkpoints")
        raise ValueError(
            f"{source.path} is a run that has not ended; give a checkpoint of it, {last}"
        )
    else:
        found = _transformers(source)
    if isinstance(images, CachedTokens):
        width = found.model.config.encoder_hidden_size
        _check_cache(images.cache, width, source.path)
        found = Matching(found.model, found.tokenizer, None, found.sha256)
    found.model.to(device, DTYPES[source.dtype])
    return found


def _trained(source: ModelSource, cached: bool) -> Matching:
    description = read_description(source.path)
    if description.stage != 1:
        raise ValueError(
            f"{source.path} was trained in stage {description.stage}; retrieval compares images "
            "with texts: give a run of stage 1"
        )
    model = load_trained(source.path, image_encoder=source.image_encoder)
    if not isinstance(model, Blip2Stage1) or description.tokenizer is None:
        raise ValueError(f"{source.path}: expected a model of stage 1 with its tokenizer")
    transform = None
    if not cached:
        given, dtype = source.image_encoder, DTYPES[source.dtype]
        transform, missing = add_encoder(model, given, description, source.path, dtype)
        if transform is None:
            raise ValueError(
                f"{source.path}: no image encoder for pictures: {missing}. Give --image-encoder, "
                "or --features, its tokens"
            )
    tokenizer = qformer_tokenizer(description.tokenizer)
    return Matching(model, tokenizer, transform, _sha256(source.path, model))


def _transformers(source: ModelSource) -> Matching:
    path = source.path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kinds = config.architectures or [config.model_type]
        if "Blip2ForImageTextRetrieval" not in kinds:
            raise ValueError(
                f"{path} is a {kinds[0]}; retrieval needs a run that blip2fast trained in stage 1, "
                "or a Blip2ForImageTextRetrieval of transformers, such as "
                "Salesforce/blip2-itm-vit-g"
            )
        theirs = Blip2ForImageTextRetrieval.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        processor = BlipImageProcessorPil.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"{path!r}: not found: give a folder, a run of blip2fast or a "
            f"Blip2ForImageTextRetrieval with its tokenizer and image processor ({error})"
        ) from error
    model = stage1_from_retrieval(theirs).eval()
    model.image_encoder = VisionTokens(theirs.vision_model).requires_grad_(False).eval()

    def transform(image: Any) -> Tensor:
        pixels: Tensor = processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels[0]

    return Matching(model, tokenizer, transform, _sha256(path, theirs))


def _sha256(path: str, model: Any) -> str:
    """Of a run, the hash of its trained parameters, which name their frozen models; else a hash of
    samples of all weights (`blip2fast.frozen.identity`)."""
    if is_trained(path):
        return read_manifest(Path(path))[MODEL].sha256
    return identify_model(model, path).weights["fp32"]


def _check_cache(cache: FeatureCache, width: int, path: str) -> None:
    if cache.width != width:
        raise ValueError(
            f"--features {cache.path}: tokens of width {cache.width}, but {path} was trained on "
            f"{width}; cache those of its encoder"
        )
    if not is_trained(path):
        return
    description: Description = read_description(path)
    if description.trains_encoder:
        raise ValueError(
            f"--features {cache.path}: {path} has trained its image encoder, which a cache was not "
            "made by; give --images"
        )
    given: FrozenIdentity | None = cache.encoder
    remedy = "Give features of the encoder that it was trained with"
    check_frozen(description, "image_encoder", given, path, remedy)
