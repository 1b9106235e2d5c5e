"""A random BLIP-2 of transformers whose captions depend on images."""

from __future__ import annotations

import torch
from shapes import CaptionShape
from transformers import Blip2Config, Blip2ForConditionalGeneration


def their_model(shape: CaptionShape, device: torch.device) -> Blip2ForConditionalGeneration:
    """Random weights that keep the size of what they act on, so that captions follow images."""
    config = Blip2Config(
        vision_config=shape.vision,
        qformer_config=shape.qformer.qformer_config(),
        text_config=shape.language,
        num_query_tokens=shape.qformer.num_query_tokens,
        image_token_index=shape.language.vocab_size - 1,
    )
    with device:
        model = Blip2ForConditionalGeneration._from_config(config, dtype=shape.dtype)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = weight[0].numel() ** -0.5
            if name.endswith(".q.weight"):  # T5 does not scale its scores
                std *= shape.language.d_kv**-0.5
            weight.data.normal_(std=std)
    return model.to(device).eval().requires_grad_(False)
