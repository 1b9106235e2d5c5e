"""Gathers what a whole model needs beside its trained part: encoder, language model, tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

from blip2fast.checkpoints.trained import frozen_name
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.hub import at_revision
from blip2fast.frozen.language_models import load_language_model
from blip2fast.frozen.lavis_files import (
    VisionWeights,
    is_lavis_file,
    read_lavis_file,
    vision_from_lavis,
)
from blip2fast.frozen.local_models import not_found
from blip2fast.offload.tensor_files import tensor_files
from blip2fast.published.weights import Weights

_VISION_KINDS = ("blip-2", "instructblip", "blip_2_vision_model", "instructblip_vision_model")


@dataclass(frozen=True)
class Named:
    """Folders or hub names that replace what the weights name; None: the weights' own."""

    language_model: str | None = None
    image_encoder: str | None = None
    tokenizer: str | None = None


def find_vision(weights: Weights, given: str | None) -> VisionWeights | None:
    """The image encoder: the one given, or that of the weights; None without one.

    Raises:
        ValueError: not found, or not a ViT of BLIP-2's kind.
    """
    if given is not None:
        return read_vision(given)
    if weights.description is None:
        return weights.vision_weights()
    name, _, block = weights.description.image_encoder.rpartition(", block ")
    if not name:
        return None
    revision = weights.description.revisions.get("image_encoder")
    try:
        vision = read_vision(at_revision(name, revision))
    except ValueError as error:
        raise ValueError(
            f"{error}. {weights.source} names it as its image encoder; give --image-encoder if it "
            "has moved"
        ) from error
    return _first_blocks(vision, int(block))


def read_vision(name: str) -> VisionWeights:
    """A ViT of BLIP-2's kind, from a file of LAVIS or by folder or hub name.

    Raises:
        ValueError: not found, or of another kind.
    """
    if is_lavis_file(name):
        found = vision_from_lavis(read_lavis_file(name), name)
        if found is None:
            raise ValueError(f"{name} holds no image encoder")
        return found
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("image encoder", name, error)) from error
    if config.model_type not in _VISION_KINDS:
        raise ValueError(
            f"image encoder {name!r} is a {config.model_type!r} model: BLIP-2 in transformers and "
            "in LAVIS's files has EVA-CLIP's ViT, as in a BLIP-2 or InstructBLIP of transformers"
        )
    values = getattr(config, "vision_config", config).to_dict()
    known = Blip2VisionConfig().to_dict().keys() - {"model_type", "architectures"}
    tensors = {
        key.removeprefix("vision_model."): source.read()
        for key, source in tensor_files(name).items()
        if key.startswith(("vision_model.", "embeddings.class", "embeddings.patch", "encoder."))
        or key == "embeddings.position_embedding"
    }
    tensors = {n: v for n, v in tensors.items() if not n.startswith("post_layernorm.")}
    if not tensors:
        raise ValueError(f"image encoder {name!r}: no weights in safetensors")
    return VisionWeights(
        Blip2VisionConfig(**{n: v for n, v in values.items() if n in known}), tensors
    )


def _first_blocks(vision: VisionWeights, count: int) -> VisionWeights:
    values = vision.config.to_dict() | {"num_hidden_layers": count}
    kept = {
        name: value
        for name, value in vision.tensors.items()
        if not name.startswith("encoder.layers.") or int(name.split(".")[2]) < count
    }
    return VisionWeights(Blip2VisionConfig(**values), kept)


def find_language_model(weights: Weights, given: str | None) -> tuple[PreTrainedModel, Any]:
    """The language model in fp32 and its tokenizer: the one given, or that of the weights.

    Raises:
        ValueError: not found, or not given where the weights do not tell.
    """
    if given is None and weights.layout == "transformers":
        instruct = weights.sizes["text_conditioned"]
        kind = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
        whole = kind.from_pretrained(weights.source, dtype=torch.float32)
        return whole.language_model, load_tokenizer(weights.source)
    name = given or language_model_name(weights)
    if name is None:
        raise ValueError(
            f"{weights.source} holds no language model: give --language-model, the folder or hub "
            "name of the one that it was trained with"
        )
    return load_language_model(name, torch.float32), load_tokenizer(name)


def language_model_name(weights: Weights) -> str | None:
    """The language model that a run names, as it was then; None where nothing is named."""
    if weights.description is None or weights.description.language_model is None:
        return None
    return frozen_name(weights.description, "language_model", weights.source)


def language_kind(weights: Weights, given: str | None) -> str | None:
    """The `model_type` of the language model; None if it is unknown."""
    if "model_type" in weights.language:
        return str(weights.language["model_type"])
    if weights.description is not None and "language_model" in weights.description.frozen:
        return str(weights.description.frozen["language_model"].config.get("model_type"))
    name = given or language_model_name(weights)
    if name is None:
        return None
    try:
        return str(AutoConfig.from_pretrained(name, trust_remote_code=False).model_type)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("language model", name, error)) from error


def find_words(weights: Weights, given: str | None) -> Any:
    """The Q-Former's tokenizer; None where the weights do not tell it and none is given."""
    name, folder = given, ""
    if name is None and weights.description is not None:
        name = weights.description.tokenizer
        if name is not None:
            name = frozen_name(weights.description, "tokenizer", weights.source)
    if name is None and weights.layout == "transformers":
        name = weights.source
        folder = "qformer_tokenizer" if weights.stage == 2 else ""
    if name is None:
        return None
    if folder and not Path(name, folder).is_dir():
        return load_tokenizer(name, folder)
    return qformer_tokenizer(str(Path(name, folder)) if folder else name)


def load_tokenizer(name: str, folder: str = "") -> Any:
    """A tokenizer by folder or hub name.

    Raises:
        ValueError: not found.
    """
    try:
        return AutoTokenizer.from_pretrained(name, subfolder=folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("tokenizer", name, error)) from error
