"""LAVIS's reference cases, a small stage-1 configuration with its batches, relative errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from blip2fast.stage1.config import Stage1Config

DATA = Path(__file__).parents[1] / "reference"
REFERENCE_CASES = ("stage1_plain", "stage1_image_ids")


@dataclass(frozen=True)
class ReferenceCase:
    """One stage-1 step of LAVIS in float64: everything under LAVIS's names."""

    config: dict[str, float]
    weight: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]
    grad: dict[str, Tensor]

    def call(self, dtype: torch.dtype) -> dict[str, object]:
        """Keyword arguments of `Blip2Stage1.forward`."""
        return {
            "image_embeds": self.input["image_embeds"].to(dtype),
            "input_ids": self.input["input_ids"],
            "attention_mask": self.input["attention_mask"],
            "image_ids": self.input.get("image_id"),
            "negatives": (self.input["negative_image"], self.input["negative_text"]),
        }


def load_reference(name: str) -> ReferenceCase:
    parts: dict[str, dict[str, Tensor]] = {"weight": {}, "input": {}, "output": {}, "grad": {}}
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            part, _, rest = key.partition("/")
            parts[part][rest] = file.get_tensor(key)
    return ReferenceCase(config, **parts)


SMALL = Stage1Config(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=24,
    num_query_tokens=5,
    vocab_size=50,
    max_position_embeddings=16,
    bos_token_id=49,
    embed_dim=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    # small random models need larger weights for attention to differ from a mean
    initializer_range=0.2,
)


def make_batch(
    config: Stage1Config, batch: int, *, tokens: int = 7, text: int = 9, seed: int = 0
) -> dict[str, Tensor]:
    """Random pairs: [CLS] words [SEP] padding, at least one word, the first text the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = config.encoder_hidden_size
    lengths = torch.randint(3, text + 1, (batch,), generator=generator)
    lengths[0] = text
    ids = torch.randint(4, config.vocab_size - 1, (batch, text), generator=generator)
    mask = torch.arange(text)[None] < lengths[:, None]
    ids[:, 0] = 2
    ids[torch.arange(batch), lengths - 1] = 3
    return {
        "image_embeds": torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64),
        "input_ids": ids.masked_fill(~mask, config.pad_token_id),
        "attention_mask": mask.long(),
    }


def relative_error(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())
