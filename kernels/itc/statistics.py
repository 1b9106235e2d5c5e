"""Statistics of a part of a row or column, and merging of parts."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.itc.interface import (
    BEST,
    BEST_INDEX,
    KEY,
    LSE,
    NEGATIVE_INDEX,
    POSITIVE_COUNT,
    POSITIVE_LSE,
    POSITIVE_SUM,
    SUM,
    UNIFORM_INDEX,
    UNIFORM_KEY,
    statistics_shape,
)


def of_tile(
    x: Tensor,
    positive: Tensor | None,
    noise: Tensor | None,
    first: int,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of each row of a tile.

    Args:
        x: `[R, C]` similarities over temperature; for columns, their transpose.
        positive: `[R, C]` bool; None if there are none.
        noise: `[R, C]` Gumbel noise; None: no negatives are sampled.
        first: The index of the first column.
        legacy: As in `Options`.

    Returns:
        `[6 or 8, R]` in the type of x, and `[2 or 3, R]` int64.
    """
    count, count_index = statistics_shape(legacy)
    values = x.new_full((count, x.shape[0]), -torch.inf)
    index = torch.full((count_index, x.shape[0]), -1, device=x.device)
    values[LSE] = x.logsumexp(1)
    values[SUM] = x.sum(1)
    values[POSITIVE_SUM] = 0 if positive is None else (x * positive).sum(1)
    values[POSITIVE_COUNT] = 0 if positive is None else positive.sum(1)
    values[BEST], best = x.max(1)
    index[BEST_INDEX] = best + first
    if noise is not None:
        values[KEY], index[NEGATIVE_INDEX] = _greatest_negative(x + noise, positive, first)
    if legacy and noise is not None:
        values[UNIFORM_KEY], index[UNIFORM_INDEX] = _greatest_negative(noise, positive, first)
        if positive is not None:
            values[POSITIVE_LSE] = x.masked_fill(~positive, -torch.inf).logsumexp(1)
    return values, index


def _greatest_negative(key: Tensor, positive: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    if positive is not None:
        key = key.masked_fill(positive, -torch.inf)
    best, where = key.max(1)
    # not above -inf: all are positives, or NaN
    return best, torch.where(best > -torch.inf, where + first, -1)


def join(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the statistics of P parts of the same rows.

    Differentiable in the first `DIFFERENTIABLE` statistics.

    Args:
        values: `[P, 6 or 8, R]`, from `of_tile` for each part, in column order.
        index: `[P, 2 or 3, R]`, likewise.

    Returns:
        `[6 or 8, R]` and `[2 or 3, R]`.
    """
    joined = [values[:, LSE].logsumexp(0), *values[:, SUM:BEST].sum(0)]
    where = []
    choices = [(BEST, BEST_INDEX), (KEY, NEGATIVE_INDEX)]
    if values.shape[1] > UNIFORM_KEY:
        choices.append((UNIFORM_KEY, UNIFORM_INDEX))
    for value_row, index_row in choices:
        # the first part wins a tie: the lowest index
        best, part = values[:, value_row].max(0)
        joined.append(best)
        where.append(index[:, index_row].gather(0, part[None])[0])
    if values.shape[1] > POSITIVE_LSE:
        joined.append(values[:, POSITIVE_LSE].logsumexp(0))
    return torch.stack(joined), torch.stack(where)


def empty(count: int, like: Tensor, legacy: bool) -> tuple[Tensor, Tensor]:
    """Statistics of zero columns for `count` rows: the identity of `join`."""
    rows, rows_index = statistics_shape(legacy)
    values = like.new_full((rows, count), -torch.inf)
    values[SUM:BEST].zero_()
    return values, torch.full((rows_index, count), -1, device=like.device)


def gradient(x: Tensor, positive: Tensor | None, lse: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a loss with respect to x, given that with respect to the row statistics.

    Args:
        x: `[R, C]`.
        positive: `[R, C]` bool; None if there are none.
        lse: `[R]`.
        weight: `[3, R]`, the gradient with respect to log-sum-exp, sum and positive sum.

    Returns:
        `[R, C]`.
    """
    dx = (x - lse[:, None]).exp_().mul_(weight[LSE, :, None]).add_(weight[SUM, :, None])
    if positive is not None:
        dx.add_(weight[POSITIVE_SUM, :, None] * positive)
    return dx
