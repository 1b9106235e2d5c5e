"""Writes trained weights as a run's folder, with the frozen models that the source holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipImageProcessorPil, PreTrainedModel

from blip2fast.checkpoints.trained import Description, save_model
from blip2fast.frozen.hub import lasting_name
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.frozen.lavis_files import VisionWeights
from blip2fast.offload.loading import source_identity
from blip2fast.published.parts import Named, find_language_model, find_words
from blip2fast.published.report import Report
from blip2fast.published.weights import NEW_IN_STAGE1, Weights, same_language_model, vision_identity
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config

# prefixes of captions, as `Blip2` gives them to models of transformers
_CAPTION, _INSTRUCTION = "a photo of", "A short image description:"
LANGUAGE, ENCODER, WORDS = "language_model", "image_encoder", "qformer_tokenizer"


def write_run(
    weights: Weights, vision: VisionWeights | None, named: Named, partial: Path, path: Path
) -> Report:
    """Write `model.safetensors` and `model.json`, and the frozen models beside them.

    A frozen model that is named is not copied: its name is recorded.

    Args:
        weights: of either stage.
        vision: the image encoder to write; None: the one named, if any.
        named: language model, image encoder and tokenizer.
        partial: the folder to write.
        path: its final, absolute name, which `model.json` states.

    Raises:
        ValueError: a part is not found, or does not fit the others.
    """
    partial.mkdir(parents=True)
    trained, missing = weights.parameters(), []
    if weights.description is not None:
        description = weights.description
        sizes = description.sizes
    else:
        description = Description(stage=weights.stage, sizes={})
        sizes = weights.sizes
    parts: dict[str, Any] = {"frozen": dict(description.frozen)}
    parts["revisions"] = dict(description.revisions)
    _encoder(vision, named, partial, path, parts)
    if weights.stage == 1:
        sizes, new = _stage1(weights, sizes, named, partial, path, parts)
        missing = sorted(new.keys() - trained.keys())
        trained = new | trained
    else:
        sizes = _stage2(weights, sizes, named, partial, path, parts)
    save_model(partial, trained, dataclasses.replace(description, sizes=sizes, **parts))
    count = len(trained) - len(missing) + (0 if vision is None else len(vision.tensors))
    title = f"{weights.source!r}, {weights.what}, to {str(path)!r}, a folder of blip2fast"
    notes = []
    if not parts.get("image_encoder", description.image_encoder):
        notes.append("no image encoder: give Blip2.from_pretrained image_encoder=...")
    if weights.stage == 2 and not parts.get("language_model", description.language_model):
        notes.append("no language model: give Blip2.from_pretrained language_model=...")
    return Report(title, count, missing, {}, missing_means="new", notes=notes)


def _encoder(
    vision: VisionWeights | None, named: Named, partial: Path, path: Path, parts: dict[str, Any]
) -> None:
    if vision is not None:
        model = vision.model()
        model.save_pretrained(partial / ENCODER)
        side = int(vision.config.image_size)
        processor = BlipImageProcessorPil(size={"height": side, "width": side})
        processor.save_pretrained(partial / ENCODER)
        name = f"{path / ENCODER}, block {vision.config.num_hidden_layers}"
        parts["image_encoder"] = name
        parts["frozen"]["image_encoder"] = vision_identity(name, vision.config, vision.tensors)
        parts["revisions"].pop("image_encoder", None)
    elif named.image_encoder is not None:
        name, revision = lasting_name(named.image_encoder)
        encoder = load_image_encoder(named.image_encoder)
        block = encoder.encoder_id.rpartition(", block ")[2]
        parts["image_encoder"] = f"{name}, block {block}"
        parts["frozen"]["image_encoder"] = encoder.identity
        _note_revision(parts, "image_encoder", revision)


def _stage1(
    weights: Weights,
    sizes: dict[str, Any],
    named: Named,
    partial: Path,
    path: Path,
    parts: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes of stage 1, and new values of what transformers' models lack."""
    words = _words(weights, named, partial, path, parts)
    known = {n: v for n, v in sizes.items() if n in Stage1Config.__dataclass_fields__}
    if weights.description is None:
        # [DEC] is the last word of LAVIS's tokenizer
        known["bos_token_id"] = sizes["vocab_size"] - 1
    if words is not None:
        known |= {"bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    config = Stage1Config(**known)
    torch.manual_seed(0)
    own = Blip2Stage1(config).state_dict() if weights.layout == "transformers" else {}
    return dataclasses.asdict(config), {n: v for n, v in own.items() if n.startswith(NEW_IN_STAGE1)}


def _stage2(
    weights: Weights,
    sizes: dict[str, Any],
    named: Named,
    partial: Path,
    path: Path,
    parts: dict[str, Any],
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if named.language_model is not None:
        name, revision = lasting_name(named.language_model)
        identity = source_identity(named.language_model)
        if identity is None:
            model, _ = find_language_model(weights, named.language_model)
            identity = identify_model(model)
        if weights.description is None:
            same_language_model(weights, identity, weights.source)
        parts |= {"language_model": name}
        parts["frozen"]["language_model"] = identity
        _note_revision(parts, "language_model", revision)
    elif weights.layout == "transformers":
        model, tokenizer = find_language_model(weights, None)
        changes |= _ends(model, tokenizer)
        folder = partial / LANGUAGE
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        parts["language_model"] = str(path / LANGUAGE)
        parts["frozen"]["language_model"] = _named(
            source_identity(str(folder)) or identify_model(model), str(path / LANGUAGE)
        )
        # its configuration has it
        changes["llm_activation"] = None
    if weights.description is None:
        conditioned = bool(sizes.get("text_conditioned"))
        changes["prompt"] = _INSTRUCTION if conditioned else _CAPTION
        if conditioned:
            _words(weights, named, partial, path, parts)
    return dataclasses.asdict(Stage2Config(**(sizes | changes)))


def _ends(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """The text that ends a target, where it is not the tokenizer's own end."""
    ends = model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    if model.config.is_encoder_decoder or end is None or end == tokenizer.eos_token_id:
        return {}
    return {"end_text": tokenizer.decode([end])}


def _words(weights: Weights, named: Named, partial: Path, path: Path, parts: dict[str, Any]) -> Any:
    """The Q-Former's tokenizer, recorded by name or written; None if it is unknown."""
    words = find_words(weights, named.tokenizer)
    if named.tokenizer is not None:
        parts["tokenizer"], revision = lasting_name(named.tokenizer)
        _note_revision(parts, "tokenizer", revision)
    elif words is not None and weights.layout == "transformers":
        words.save_pretrained(partial / WORDS)
        parts["tokenizer"] = str(path / WORDS)
    return words


def _named(identity: FrozenIdentity, name: str) -> FrozenIdentity:
    return dataclasses.replace(identity, name=name)


def _note_revision(parts: dict[str, Any], part: str, revision: str | None) -> None:
    parts["revisions"].pop(part, None)
    if revision is not None:
        parts["revisions"][part] = revision
