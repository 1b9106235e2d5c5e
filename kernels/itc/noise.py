"""Gumbel noise as a function of a seed and of the pair: every backend draws the same negatives.

One Philox counter serves two neighbouring texts and one image: `(text // 2, image, TAG, offset)`,
indices over all ranks. Of its four words the first two are the noise of the image's row for the
even and the odd text, the last two that of the texts' columns for the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
# where dropout masks count heads: numbers no head has
TAG, COIN_TAG = 0x49544300, 0x49544301
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def words(philox: Tensor, c0: Tensor, c1: Tensor, tag: int) -> list[Tensor]:
    """Philox4x32-7 words of the counters `(c0, c1, tag, offset)`.

    The same as `blip2fast.ops.philox.philox_words`, but with counters that are left unexpanded
    while they can be, which is most of the cost on a CPU.

    Args:
        philox: `[2]` int64, seed and offset.
        c0, c1: int64 of shapes that broadcast together.
        tag: Third counter.

    Returns:
        Four int64 tensors of the broadcast shape, 0 to 2^32 - 1.
    """
    c2, c3 = torch.full_like(c0[..., :1], tag), philox[1] & _WORD
    k0, k1 = philox[0] & _WORD, (philox[0] >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap, and their bits are those of the unsigned product
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_1 & _WORD, product_0 & _WORD
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as a number in (0, 1), evenly spaced near 0 down to 2^-33."""
    return ((word.to(dtype) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as a draw from the standard Gumbel distribution: `-log(-log(1 - u))`.

    The large values, which decide an argmax, come from small u, where floats are dense.
    """
    return torch.log1p(-uniform(word, dtype)).neg_().log_().neg_()


def pair_noise(
    philox: Tensor, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Noise of a tile of pairs.

    Args:
        philox: `[2]` int64, seed and offset.
        rows, columns: First and last-plus-one image and text, counted over all ranks.
        dtype: fp32 or fp64.

    Returns:
        Noise of the rows and noise of the columns, each `[images, texts]`.
    """
    first_group, last_group = columns[0] // 2, (columns[1] + 1) // 2
    groups = torch.arange(first_group, last_group, device=philox.device)[None, :]
    images = torch.arange(*rows, device=philox.device)[:, None]
    w = words(philox, groups, images, TAG)
    start = columns[0] - 2 * first_group
    span = slice(start, start + columns[1] - columns[0])
    by_row = torch.stack(w[:2], dim=-1).flatten(1)[:, span]
    by_column = torch.stack(w[2:], dim=-1).flatten(1)[:, span]
    return gumbel(by_row, dtype), gumbel(by_column, dtype)


def coins(philox: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One uniform number in (0, 1) for each row and one for each column: `[count]` each."""
    index = torch.arange(first, first + count, device=philox.device)
    w = words(philox, torch.zeros_like(index), index, COIN_TAG)
    return uniform(w[0], dtype), uniform(w[1], dtype)
