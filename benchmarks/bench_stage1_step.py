"""A stage-1 step, forward and backward, against the textbook: separate padded passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shapes import NAMES, SHAPES, Shape

from blip2fast import Blip2Stage1

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from textbook_stage1 import TextbookStage1


def make_call(shape: Shape) -> dict[str, object]:
    """Random pairs; caption lengths spread evenly around the mean."""
    B, T = shape.batch, shape.text_tokens
    generator = torch.Generator().manual_seed(0)
    spread = shape.mean_caption // 2
    lengths = shape.mean_caption + (torch.arange(B) * 5) % (2 * spread + 1) - spread
    mask = (torch.arange(T)[None] < lengths[:, None]).long()
    ids = torch.randint(4, shape.config.vocab_size - 1, (B, T), generator=generator)
    width = shape.config.encoder_hidden_size
    others = (torch.arange(B) + 1) % B
    return {
        "image_embeds": torch.randn(B, shape.image_tokens, width, generator=generator),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "negatives": (others, (others + 1) % B),
    }


@pytest.mark.parametrize("name", NAMES)
def bench_step(name: str, race: Callable[..., None]) -> None:
    shape = SHAPES[name]
    torch.manual_seed(0)
    model = Blip2Stage1(shape.config)
    textbook = TextbookStage1(model)
    call = make_call(shape)

    def ours() -> None:
        model.zero_grad()
        model(**call).loss.backward()

    def theirs() -> None:
        textbook.zero_grad()
        textbook(**call)["loss"].backward()

    torch.testing.assert_close(model(**call).loss, textbook(**call)["loss"], rtol=1e-5, atol=1e-5)
    race(ours, {"textbook": theirs}, rounds=3)
