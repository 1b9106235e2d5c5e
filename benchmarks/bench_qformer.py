"""`blip2fast.QFormer` against transformers' Q-Former: queries on image tokens, forward, eval."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shapes import NAMES, SHAPES
from transformers import Blip2QFormerModel

from blip2fast import QFormer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def bench_forward(name: str, batch: int, race: Callable[..., None]) -> None:
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = shape.config.qformer_config()
    theirs = Blip2QFormerModel(config).eval()
    ours = QFormer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    queries = torch.randn(1, shape.config.num_query_tokens, config.hidden_size)
    queries = queries.expand(batch, -1, -1)
    tokens = torch.randn(batch, shape.image_tokens, config.encoder_hidden_size)
    call = {"query_embeds": queries, "encoder_hidden_states": tokens}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**call).last_hidden_state, theirs(**call).last_hidden_state, rtol=1e-4, atol=1e-4
        )
        race(lambda: ours(**call), {"transformers": lambda: theirs(**call)}, rounds=10)
