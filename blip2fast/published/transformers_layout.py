"""Writes trained weights as a folder of transformers: model, processor, generation settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipProcessor,
    PreTrainedModel,
)

from blip2fast.frozen.identity import identify_model
from blip2fast.frozen.lavis_files import VisionWeights
from blip2fast.published.parts import Named, find_language_model, find_words
from blip2fast.published.report import Report
from blip2fast.published.weights import Weights, same_language_model
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.convert import trained_to_transformers, transformers_model
from blip2fast.stage2.token_rows import end_token_id

IMAGE_TOKEN = "<image>"
# published checkpoints have as many rows in their embeddings as the next multiple
_ROWS = 64


def write_transformers(
    weights: Weights, vision: VisionWeights | None, named: Named, partial: Path, path: Path
) -> Report:
    """Write `Blip2ForConditionalGeneration`, InstructBLIP or `Blip2ForImageTextRetrieval`.

    The folder is one for `from_pretrained` and `AutoProcessor`.

    Args:
        weights: of either stage; stage 1 becomes a retrieval model.
        vision: the image encoder.
        named: language model and tokenizer, where the weights do not name them.
        partial: the folder to write.
        path: its final name, for messages.

    Raises:
        ValueError: a part is missing, or transformers' BLIP-2 cannot express it.
    """
    if vision is None:
        raise ValueError(
            f"{weights.source} holds no image encoder, which transformers' BLIP-2 has: give "
            "--image-encoder, such as eva_vit_g.pth or Salesforce/blip2-opt-2.7b"
        )
    if vision.config.hidden_size != weights.sizes["encoder_hidden_size"]:
        raise ValueError(
            f"the image encoder has width {vision.config.hidden_size}, but {weights.source} was "
            f"trained on tokens of width {weights.sizes['encoder_hidden_size']}"
        )
    trained = weights.parameters()
    if weights.stage == 1:
        left = _write_retrieval(weights, trained, vision, named, partial)
    else:
        left = {}
        _write_generating(weights, trained, vision, named, partial)
    notes = []
    eps = weights.sizes.get("ln_vision_eps", 1e-5)
    if eps != vision.config.layer_norm_eps:
        notes.append(
            f"ln_vision's epsilon was {eps} and is {vision.config.layer_norm_eps}: transformers "
            "has one for the whole image encoder"
        )
    taken = len(trained) + len(vision.tensors) - sum(map(len, left.values()))
    title = f"{weights.source!r}, {weights.what}, to {str(path)!r}, a folder of transformers"
    return Report(title, taken, [], left, notes=notes)


def _write_retrieval(
    weights: Weights,
    trained: dict[str, Tensor],
    vision: VisionWeights,
    named: Named,
    partial: Path,
) -> dict[str, list[str]]:
    """Write a retrieval model; returns the names that it lacks, by reason."""
    words = find_words(weights, named.tokenizer)
    if words is None:
        raise ValueError(
            f"{weights.source} names no tokenizer: give --tokenizer, such as bert-base-uncased"
        )
    known = Stage1Config.__dataclass_fields__.keys()
    sizes = Stage1Config(
        **{n: v for n, v in weights.sizes.items() if n in known}
        | {"bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    )
    if len(words) != sizes.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(words)} words, {weights.source} has {sizes.vocab_size}"
        )
    config = Blip2Config(
        vision_config=vision.config.to_dict(),
        qformer_config=sizes.qformer_config().to_dict(),
        num_query_tokens=sizes.num_query_tokens,
        image_text_hidden_size=sizes.embed_dim,
        image_token_index=None,  # its texts hold no places for the image
    )
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(config)
    model.to_empty(device="cpu")
    state = trained_to_transformers(trained)
    state |= {f"vision_model.{name}": value for name, value in vision.tensors.items()}
    lacking = [name for name in state if name.startswith("lm_head.") or name == "temp"]
    model.load_state_dict({n: v for n, v in state.items() if n not in lacking})
    model.save_pretrained(partial)
    Blip2Processor(_images(vision), words).save_pretrained(partial)
    return {"transformers' retrieval has none of it": lacking} if lacking else {}


def _write_generating(
    weights: Weights,
    trained: dict[str, Tensor],
    vision: VisionWeights,
    named: Named,
    partial: Path,
) -> None:
    language, tokenizer = find_language_model(weights, named.language_model)
    if named.language_model is not None or weights.layout == "lavis":
        same_language_model(weights, identify_model(language), weights.source)
    sizes = Stage2Config(**weights.sizes)
    words = find_words(weights, named.tokenizer) if sizes.text_conditioned else None
    if sizes.text_conditioned and words is None:
        raise ValueError(
            f"{weights.source} has a Q-Former that reads instructions and names no tokenizer: give "
            "--tokenizer, such as bert-base-uncased"
        )
    place = add_image_token(language, tokenizer)
    if weights.layout != "transformers":
        _set_ends(
            language, end_token_id(tokenizer, language.config.is_encoder_decoder, sizes.end_text)
        )
    norm = {part: trained[f"ln_vision.{part}"] for part in ("weight", "bias")}
    with warnings.catch_warnings():
        # the report says what it says
        warnings.filterwarnings("ignore", message="ln_vision_eps is")
        whole = transformers_model(sizes, language, vision.model(norm), trained, place)
    whole.generation_config = language.generation_config
    whole.save_pretrained(partial)
    images, count = _images(vision), sizes.num_query_tokens
    if not language.config.is_encoder_decoder:
        # continuations of several prompts begin at one column
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    processor = (
        Blip2Processor(images, tokenizer, num_query_tokens=count)
        if words is None
        else InstructBlipProcessor(images, tokenizer, words, num_query_tokens=count)
    )
    processor.save_pretrained(partial)


def _images(vision: VisionWeights) -> BlipImageProcessorPil:
    side = int(vision.config.image_size)
    return BlipImageProcessorPil(size={"height": side, "width": side})


def add_image_token(language: PreTrainedModel, tokenizer: Any) -> int:
    """The id of the image token, which is added to tokenizer and embeddings where it is missing.

    The embeddings grow to a multiple of 64 rows, as in published checkpoints. A new row is the mean
    of the others, so that it is never the likeliest.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        wanted = -(-len(tokenizer) // _ROWS) * _ROWS
        if wanted > language.get_input_embeddings().num_embeddings:
            _grow(language, wanted)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


@torch.no_grad()
def _grow(language: PreTrainedModel, rows: int) -> None:
    before = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(rows, mean_resizing=False)
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        if isinstance(module, nn.Embedding | nn.Linear):
            weight = module.weight
            weight[before:] = weight[:before].mean(dim=0)


def _set_ends(language: PreTrainedModel, end: int) -> None:
    """The token that ends a text, and for encoder-decoders one that begins it, as published."""
    config = language.config
    config.eos_token_id = end
    language.generation_config.eos_token_id = end
    # what transformers begins with where no prompt is given
    if config.is_encoder_decoder and getattr(config, "bos_token_id", None) is None:
        config.bos_token_id = language.generation_config.bos_token_id = end
