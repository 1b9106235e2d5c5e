"""Words from the language model, after soft prompts and an optional text.

Shapes: B rows, Q soft prompts, T text tokens, L language model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blip2fast import stage2_llm, stage2_sequence

if TYPE_CHECKING:
    from blip2fast.stage2 import Blip2Stage2


@torch.no_grad()
def write(
    model: Blip2Stage2,
    prompts: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    *,
    image_counts: Tensor | None = None,
    **generate_kwargs: Any,
) -> Any:
    """What `Blip2Stage2.generate` does after the images: see there.

    Args:
        model: the model.
        prompts: [B, Q, L] soft prompts, or [N, Q, L] with `image_counts`.
        input_ids, attention_mask: [B, T], padded on either side.
        image_counts: [B], images of each row, which stand in `input_ids`; None: one, in front.
        generate_kwargs: for `transformers`' `generate`.
    """
    for name in ("max_length", "min_length"):
        if name in generate_kwargs:
            other = name.replace("length", "new_tokens")
            raise ValueError(f"{name}={generate_kwargs[name]}: give {other} instead")
    if "generation_config" not in generate_kwargs:
        generate_kwargs.setdefault("max_new_tokens", 30)
    encoder_decoder = stage2_llm.is_encoder_decoder(model.language_model)
    if input_ids is None:
        if image_counts is not None:
            raise ValueError("image_counts: images in a text need input_ids that hold their places")
        input_ids = stage2_sequence.empty_text(model.language_model, prompts)
    embeds, mask = stage2_sequence.read_sequence(
        model.language_model, prompts, input_ids, attention_mask, image_counts
    )
    if attention_mask is not None:
        embeds, mask = stage2_sequence.padded_on(
            "right" if encoder_decoder else "left", embeds, mask
        )
    if not encoder_decoder:
        new = generate_kwargs.get("max_new_tokens", 0)
        stage2_llm.check_positions(
            model.language_model, prompts_and_text=embeds.shape[1], new_tokens=new
        )
    written = model.language_model.generate(
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
