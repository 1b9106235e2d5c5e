"""Nucleus sampling whose draws belong to an image, whatever else is in its batch.

PyTorch's generator draws for a batch as a whole, so what one row gets depends on the others. Here
each row has its own numbers. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from blip2fast.data.records import text_hash


def image_draws(seed: int, key: str, num_captions: int, steps: int) -> Tensor:
    """Numbers in [0, 1), [num_captions, steps], of an image: a function of seed and key alone."""
    draws = np.random.default_rng([seed, text_hash(key)])
    return torch.from_numpy(draws.random((num_captions, steps)))


class SeededNucleus(LogitsProcessor):
    """Draws the next token of each row, and leaves `generate` no other.

    The smallest set of tokens with a probability of `top_p` in total (Holtzman et al., arXiv
    1904.09751), by falling probability; the row's number picks a place in it. Serves one call of
    `generate`, with do_sample=True, top_p=1 and top_k=0.

    Args:
        draws: [R, steps], of `image_draws`.
        top_p: total probability, above 0 and at most 1.
    """

    def __init__(self, draws: Tensor, top_p: float) -> None:
        self._draws, self._top_p, self._step = draws, top_p, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [R, V] that are minus infinity but for one token of each row."""
        rows = len(scores)
        if rows != len(self._draws):
            raise ValueError(f"{rows} rows to sample, but numbers of {len(self._draws)}")
        number = self._draws[:, self._step].to(scores.device)
        self._step += 1
        # fp64: the sums must not depend on how many rows there are
        probability, tokens = scores.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        reached = probability.cumsum(-1)
        kept = (reached - probability < self._top_p).sum(-1)
        total = reached.gather(1, kept[:, None] - 1).squeeze(1)
        place = (reached <= (number * total)[:, None]).sum(-1).minimum(kept - 1)
        chosen = tokens.gather(1, place[:, None])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def draws_of(seed: int, keys: Sequence[str], num_captions: int, steps: int) -> Tensor:
    """The numbers of several images, [images * num_captions, steps]."""
    return torch.cat([image_draws(seed, key, num_captions, steps) for key in keys])
