"""Gumbel noise as a function of seed and pair, so that all backends sample the same negatives.

One Philox counter serves two neighbouring texts and one image: `(text // 2, image, TAG, offset)`,
with global indices. Of its four words, the first two are the noise of the image's row for the
even and the odd text, and the last two the noise of the texts' columns for the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.philox import philox_words

# takes the head's place in the counter of dropout masks, with values that no head has
TAG, COIN_TAG = 0x49544300, 0x49544301


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as a number in (0, 1), evenly spaced near 0 down to 2^-33."""
    return ((word.to(dtype) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as a sample of the standard Gumbel distribution: `-log(-log(1 - u))`.

    The large values, which decide the argmax, come from small u, where floats are dense.
    """
    return torch.log1p(-uniform(word, dtype)).neg_().log_().neg_()


def pair_noise(
    philox: Tensor, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Noise of a tile of pairs.

    Args:
        philox: `[2]` int64, seed and offset.
        rows, columns: Start and end (exclusive) of the images and texts, as global indices.
        dtype: fp32 or fp64.

    Returns:
        Noise of the rows and noise of the columns, each `[images, texts]`.
    """
    first_group, last_group = columns[0] // 2, (columns[1] + 1) // 2
    groups = torch.arange(first_group, last_group, device=philox.device)[None, :]
    images = torch.arange(*rows, device=philox.device)[:, None]
    words = philox_words(philox, groups, images, torch.full_like(groups[:, :1], TAG))
    start = columns[0] - 2 * first_group
    span = slice(start, start + columns[1] - columns[0])
    by_row, by_column = (words[..., k : k + 2].flatten(1)[:, span] for k in (0, 2))
    return gumbel(by_row, dtype), gumbel(by_column, dtype)


def coins(philox: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One uniform number in (0, 1) for each row and one for each column: `[count]` each."""
    index = torch.arange(first, first + count, device=philox.device)
    tag = torch.full_like(index[:1], COIN_TAG)
    words = philox_words(philox, torch.zeros_like(tag), index, tag)
    return uniform(words[:, 0], dtype), uniform(words[:, 1], dtype)
