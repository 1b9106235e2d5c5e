"""BLIP-2's shapes by name, and how many samples a step of each takes on a CPU.

B images, Q queries, T text tokens, S image tokens, E image token width, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from blip2fast import Stage1Config

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Shape:
    """A model with the batch to time it on; captions have T tokens, `mean_caption` of them real."""

    config: Stage1Config
    batch: int
    image_tokens: int
    text_tokens: int = 32
    mean_caption: int = 12


VIT_G = Stage1Config(**NO_DROPOUT)
SHAPES = {
    # the embedded scenes: seconds, also run by the tests
    "scenes": Shape(
        replace(
            VIT_G,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            encoder_hidden_size=64,
            num_query_tokens=8,
            vocab_size=64,
            bos_token_id=63,
            embed_dim=32,
            cross_attention_frequency=1,
        ),
        batch=64,
        image_tokens=65,
    ),
    "vit_l": Shape(replace(VIT_G, encoder_hidden_size=1024), batch=4, image_tokens=257),
    "vit_g": Shape(VIT_G, batch=4, image_tokens=257),
}
# the full sizes are timed, not tested
NAMES = [
    "scenes",
    *(pytest.param(name, marks=pytest.mark.fullsize) for name in SHAPES if name != "scenes"),
]
