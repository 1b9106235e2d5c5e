"""Captions by beam search: `Blip2Stage2.generate` against transformers' BLIP-2, same weights.

Pixels to tokens: image encoder, Q-Former, language model with its cache. Both share every weight
but the Q-Former's, which are copies, and write the same number of tokens with the same beams; in
fp32 the same tokens. In half precision near ties fall either way, and captions must be as likely.
Results have images a second of each contender.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from caption_models import their_model
from comparing import plain
from shapes import CAPTION_SHAPES, CaptionShape, cells
from torch import Tensor

from blip2fast import Blip2Stage2

BEAMS = {"greedy": 1, "beam5": 5}  # the paper's captions are of five beams


def caption_inputs(shape: CaptionShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, h, w], and the tokens [B, T] that captions begin with."""
    draws = torch.Generator().manual_seed(1)
    size = (shape.batch, 3, shape.vision.image_size, shape.vision.image_size)
    images = torch.randn(size, generator=draws).to(device, shape.dtype)
    prompt = torch.randint(3, shape.language.vocab_size - 1, (1, 4), generator=draws)
    return images, prompt.expand(shape.batch, -1).to(device)


@pytest.mark.parametrize("search", list(BEAMS))
@pytest.mark.parametrize("name", cells(CAPTION_SHAPES))
def bench_caption(
    name: str,
    search: str,
    device: torch.device,
    compare: Callable[..., None],
    benchmark: Any,
) -> None:
    shape = CAPTION_SHAPES[name]
    theirs = their_model(shape, device)
    ours = Blip2Stage2.from_transformers(theirs).eval()
    places = shape.qformer.num_query_tokens
    images, prompt = caption_inputs(shape, device)
    marks = prompt.new_full((shape.batch, places), shape.language.vocab_size - 1)
    with_places = torch.cat([marks, prompt], dim=1)
    settings = {
        "num_beams": BEAMS[search],
        "do_sample": False,
        "max_new_tokens": shape.new_tokens,
        "min_new_tokens": shape.new_tokens,
        "pad_token_id": 1,
    }
    start = 1 if shape.language.is_encoder_decoder else with_places.shape[1]

    def our_tokens(_: Any) -> Tensor:
        return ours.generate(images=images, input_ids=prompt, **settings)

    def their_tokens(_: Any) -> Tensor:
        return theirs.generate(images, input_ids=with_places, **settings)[:, start:]

    expected = their_tokens(None)
    assert expected.shape == (shape.batch, shape.new_tokens)
    assert len({tuple(row) for row in expected.tolist()}) > 1, "captions must depend on images"

    @torch.no_grad()
    def nats(tokens: Tensor) -> float:
        """Cross-entropy of captions under the model."""
        if shape.language.is_encoder_decoder:
            return float(ours(images=images, input_ids=prompt, labels=tokens).loss)
        labels = torch.cat([torch.full_like(prompt, -100), tokens], dim=1)
        text = torch.cat([prompt, tokens], dim=1)
        return float(ours(images=images, input_ids=text, labels=labels).loss)

    def agree(_: Any, tokens: Tensor) -> None:
        if shape.dtype == torch.float32:
            assert torch.equal(tokens, expected), "other tokens than transformers'"
        else:
            assert abs(nats(tokens) - nats(expected)) < 0.05, "less likely captions"

    providers = {"blip2fast": plain(our_tokens), "transformers": plain(their_tokens)}
    compare(providers, lambda seed: None, agree, dtype=shape.dtype, rounds=5)
    for result in benchmark.extra_info.get("contenders", {}).values():
        if "median_s" in result:
            result["images_per_s"] = shape.batch / result["median_s"]
