"""Text generation after soft prompts and an optional text.

All beams (or samples) of a row share its prefix: soft prompts and text. For a decoder-only model,
the prefix is prefilled once per row and its KV cache is repeated per beam; transformers' `generate`
repeats the inputs and prefills once per beam. An encoder runs once per row in both.

Shapes: B rows, Q soft prompts, T text tokens, P prefix positions, L language model width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blip2fast.stage2.language_model import check_positions, is_encoder_decoder
from blip2fast.stage2.packed_layers import packed_linear_layers
from blip2fast.stage2.sequence import empty_text, padded_on, read_sequence


@torch.no_grad()
def write(
    language_model: PreTrainedModel,
    prompts: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    image_counts: Tensor | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Generate text from soft prompts: see `Blip2Stage2.generate`.

    Args:
        language_model: the frozen model.
        prompts: [B, Q, L] soft prompts, or [N, Q, L] with `image_counts`.
        input_ids, attention_mask: [B, T], padded on either side.
        image_counts: [B], number of images of each row, with placeholders in `input_ids`; None: one
            image, in front.
        generate_kwargs: for `transformers`' `generate`.
    """
    for name in ("max_length", "min_length"):
        if name in generate_kwargs:
            other = name.replace("length", "new_tokens")
            raise ValueError(f"{name}={generate_kwargs[name]}: give {other} instead")
    if "generation_config" not in generate_kwargs:
        generate_kwargs.setdefault("max_new_tokens", 30)
    encoder_decoder = is_encoder_decoder(language_model)
    if input_ids is None:
        if image_counts is not None:
            raise ValueError("image_counts: images in a text need input_ids that hold their places")
        input_ids = empty_text(language_model, prompts)
    embeds, mask = read_sequence(language_model, prompts, input_ids, attention_mask, image_counts)
    if attention_mask is not None:
        embeds, mask = padded_on("right" if encoder_decoder else "left", embeds, mask)
    if not encoder_decoder:
        new = generate_kwargs.get("max_new_tokens", 0)
        check_positions(language_model, prompts_and_text=embeds.shape[1], new_tokens=new)
    rows = len(embeds) * _copies(language_model, generate_kwargs)
    with packed_linear_layers(language_model, rows):
        if not encoder_decoder:
            cache = _common_cache(language_model, embeds, mask, generate_kwargs)
            if cache is not None:
                generate_kwargs["past_key_values"] = cache
        written = language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, **generate_kwargs
        )
    if not encoder_decoder:
        return written
    given = generate_kwargs.get("decoder_input_ids")
    start = 1 if given is None else given.shape[1]
    if isinstance(written, Tensor):
        return written[:, start:]
    written.sequences = written.sequences[:, start:]
    return written


def _common_cache(
    language_model: PreTrainedModel, embeds: Tensor, mask: Tensor, generate_kwargs: dict[str, Any]
) -> DynamicCache | None:
    """KV cache of all positions but the last, computed once per row and repeated for its beams.

    Args:
        language_model: decoder-only.
        embeds, mask: [B, P, L] and [B, P].
        generate_kwargs: of `generate`, which continues from the last position.

    Returns:
        The cache of B * copies rows; None if there is only one copy, or if the caller or the model
        uses anything other than a plain KV cache.
    """
    copies = _copies(language_model, generate_kwargs)
    chosen = {
        "past_key_values",
        "cache_implementation",
        "generation_config",
    } & generate_kwargs.keys()
    if chosen or copies == 1 or embeds.shape[1] < 2 or generate_kwargs.get("use_cache") is False:
        return None
    cache = DynamicCache(config=language_model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    decoder = language_model.base_model  # without the head: prefill needs no logits
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, :-1]
    decoder(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1], **inputs)
    if cache.get_seq_length() != embeds.shape[1] - 1:
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def _copies(language_model: PreTrainedModel, generate_kwargs: dict[str, Any]) -> int:
    """Number of sequences that `generate` keeps per row."""
    defaults = language_model.generation_config
    counts = [
        generate_kwargs.get(name) or getattr(defaults, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    ]
    return max(counts)
