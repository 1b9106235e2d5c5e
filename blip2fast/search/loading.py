"""Loads a stage-1 model with its image encoder, image transform and tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Blip2ForImageTextRetrieval

from blip2fast.checkpoints.trained import (
    frozen_name,
    is_trained,
    load_trained,
    read_description,
)
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.inference.inputs import Transform
from blip2fast.inference.loading import add_encoder, processor_transform
from blip2fast.inference.model_folders import check_model_folder
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import stage1_from_retrieval


@dataclass(frozen=True)
class Matcher:
    """A model that compares images with texts.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the Q-Former.
        transform: image transform of `model.image_encoder`; None without an encoder.
        no_encoder: the reason why there is none.
        name: folder or hub name.
        weights: hash of the queries and projections; every training changes them.
    """

    model: Blip2Stage1
    tokenizer: Any
    transform: Transform | None
    no_encoder: str
    name: str
    weights: str


def load_matcher(
    path: str, dtype: torch.dtype, device: torch.device, image_encoder: str | None
) -> Matcher:
    """See `Blip2Retriever.from_pretrained`."""
    check_model_folder(path, (1,))
    model: Blip2Stage1
    transform: Transform | None
    if is_trained(path):
        description = read_description(path)
        loaded = load_trained(path, image_encoder=image_encoder)
        if not isinstance(loaded, Blip2Stage1):
            raise ValueError(f"{path}: expected a model of stage 1")
        if description.tokenizer is None:
            raise ValueError(f"{path} names no tokenizer, so texts cannot be read")
        words = frozen_name(description, "tokenizer", path)
        model, tokenizer = loaded, qformer_tokenizer(words)
        weights = _hash(model)
        transform, missing = add_encoder(model, image_encoder, description, path, dtype)
    else:
        if image_encoder is not None:
            raise ValueError(
                f"image_encoder={image_encoder!r}: {path} is not a folder that blip2fast trained, "
                "and a transformers BLIP-2 has its own"
            )
        whole = Blip2ForImageTextRetrieval.from_pretrained(path, dtype=torch.float32)
        model, tokenizer = stage1_from_retrieval(whole).eval(), qformer_tokenizer(path)
        weights = _hash(model)
        model.image_encoder = load_image_encoder(path, dtype=dtype)
        transform, missing = processor_transform(path), ""
    model.to(device, dtype)
    return Matcher(model, tokenizer, transform, missing, path, weights)


def _hash(model: Blip2Stage1) -> str:
    digest = hashlib.sha256()
    for values in (
        model.query_tokens,
        model.vision_projection.weight,
        model.text_projection.weight,
    ):
        digest.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
