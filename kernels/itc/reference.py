"""Reference for the ITC sweep, all pairs in memory: plain PyTorch, any device, fp32 or fp64.

Tests and benchmarks compare the other backends with it. Memory is `M * Q * N`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.itc import noise, statistics
from blip2fast.kernels.itc.interface import Options, Pairs, Sweep, Weights, index_dtype
from blip2fast.kernels.precision import wide_dtype


def similarity(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """`sim[i, j] = max_q <image[i, q], text[j]>`, and the lowest q that reaches it.

    Args:
        image: `[M, Q, D]`.
        text: `[N, D]`.

    Returns:
        `[M, N]` in fp32 or fp64, and `[M, N]` uint8 (int16 for more than 256 queries).
    """
    dtype = wide_dtype(image.dtype)
    with torch.autocast(image.device.type, enabled=False):
        per_query = torch.einsum("iqd,jd->iqj", image.to(dtype), text.to(dtype))
        best, arg = per_query.max(dim=1)
    return best, arg.to(index_dtype(image.shape[1]))


def sweep(image: Tensor, text: Tensor, temp: Tensor, pairs: Pairs, options: Options) -> Sweep:
    """Statistics of every row and column; see `Sweep`.

    Args:
        image: `[M, Q, D]`, normalised.
        text: `[N, D]`, normalised.
        temp: Scalar, fp32 or fp64.
        pairs: The positives.
        options: Seed of the negatives, and which results to keep.
    """
    (M, N), first = (image.shape[0], text.shape[0]), pairs.first_row
    sim, arg = similarity(image, text)
    x = sim / temp
    positive = pairs.mask(slice(0, M), slice(0, N), x.device)
    by_row = by_column = None
    if options.philox is not None:
        by_row, by_column = noise.pair_noise(options.philox, (first, first + M), (0, N), x.dtype)
        by_column = by_column.T
    rows, row_index = statistics.of_tile(x, positive, by_row, 0, options.legacy)
    transposed = None if positive is None else positive.T
    columns, column_index = statistics.of_tile(x.T, transposed, by_column, first, options.legacy)
    if not options.save:
        sim, arg = sim.new_empty(0, 0), arg.new_empty(0, 0)
    return Sweep(rows, columns, row_index, column_index, sim, arg)


def sweep_grad(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    pairs: Pairs,
    sides: tuple[Weights, Weights],
    local: bool,
    saved: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a loss, given its gradients with respect to the row and column statistics.

    Args:
        image, text, temp, pairs: As in `sweep`.
        sides: `Weights` of the rows and of the columns.
        local: Whether images get gradients from rows alone and texts from columns alone, as in
            LAVIS, where gathered features carry no gradient; otherwise both get both.
        saved: `sim` and `arg` of the sweep, or empty.

    Returns:
        `[M, Q, D]` and `[N, D]` in the dtypes of the features, and the temperature's, scalar.
    """
    sim, arg = saved if saved[0].numel() else similarity(image, text)
    M, N = sim.shape
    x = sim / temp
    positive = pairs.mask(slice(0, M), slice(0, N), x.device)
    transposed = None if positive is None else positive.T
    by_row = statistics.gradient(x, positive, *sides[0])
    by_column = statistics.gradient(x.T, transposed, *sides[1]).T
    both = by_row + by_column
    to_image, to_text = (by_row, by_column) if local else (both, both)
    d_temp = -(both * x).sum() / temp
    one_hot = arg[:, None, :] == torch.arange(image.shape[1], device=x.device)[None, :, None]
    with torch.autocast(image.device.type, enabled=False):
        d_image = torch.einsum("iqj,jd->iqd", one_hot * (to_image / temp)[:, None], text.to(x))
        d_text = torch.einsum("iqj,iqd->jd", one_hot * (to_text / temp)[:, None], image.to(x))
    return d_image.to(image.dtype), d_text.to(text.dtype), d_temp
