"""FLOPs of one sample at the published sizes, counted on tensors without data.

The frozen image encoder and language models of the recipes, and the Q-Former of stage 2. What
stage 1 computes for a pair is in the results of `bench_stage1_step.py`, counted likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plans
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionModel,
)

from blip2fast import Stage2Config

QUERIES, TEXT_TOKENS = 32, 32


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of the products of a call."""
    with FlopCounterMode(display=False) as flops:
        call()
    return int(flops.get_total_flops())


def image_encoder() -> int:
    """ViT-g's forward pass on an image of 224 pixels."""
    config = plans.published()["Salesforce/blip2-opt-2.7b"].vision_config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Blip2VisionModel(config).eval().requires_grad_(False)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
    return counted(lambda: model(pixels))


def qformer() -> int:
    """The Q-Former of stage 2 on an image's tokens, forward and backward, without a projection."""
    sizes = Stage2Config()
    config = Blip2QFormerConfig(encoder_hidden_size=sizes.encoder_hidden_size)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Blip2QFormerModel(config)
        queries = nn.Parameter(torch.empty(1, QUERIES, sizes.hidden_size))
        image = torch.empty(1, 257, sizes.encoder_hidden_size)

    def call() -> None:
        model(query_embeds=queries, encoder_hidden_states=image).last_hidden_state.sum().backward()

    return counted(call)


def language_model(name: str) -> dict[str, int]:
    """A frozen language model's passes on 32 soft prompts and a text of 32 tokens.

    Args:
        name: On the hub, one of `plans.published()`.

    Returns:
        `forward` and `backward` (gradients of the prompts alone).
    """
    config = plans.published()[name]
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        model.eval().requires_grad_(False)
        width = model.get_input_embeddings().embedding_dim
        size = (1, QUERIES + TEXT_TOKENS, width)
        prompts = torch.empty(size, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    found: list[Any] = []

    def forward() -> None:
        output = model(inputs_embeds=prompts, use_cache=False, **more)
        found.append(output.logits.sum())

    return {"forward": counted(forward), "backward": counted(lambda: found[0].backward())}


def measure() -> dict[str, Any]:
    """All of them."""
    names = [name for name, config in plans.published().items() if hasattr(config, "vocab_size")]
    return {
        "image_encoder": image_encoder(),
        "qformer": qformer(),
        "language_models": {name: language_model(name) for name in names},
    }
