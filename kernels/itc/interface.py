"""Inputs and outputs shared by all backends of the ITC sweep.

A sweep compares M images with N texts in one pass, `x[i, j] = max_q <image[i, q], text[j]> / temp`,
and keeps a few statistics per row (an image) and per column (a text). Statistics of a part of a row
or column have the same form as those of the whole, and `statistics.join` merges them, across tiles
of a device as well as across ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# rows of `Sweep.rows` and `Sweep.columns`
LSE, SUM, POSITIVE_SUM, POSITIVE_COUNT, BEST, KEY = range(6)
DIFFERENTIABLE = 3
# two more if the first LAVIS release's +1e-4 is requested
UNIFORM_KEY, POSITIVE_LSE = 6, 7
# rows of `Sweep.row_index` and `Sweep.column_index`
BEST_INDEX, NEGATIVE_INDEX, UNIFORM_INDEX = range(3)


class Pairs(NamedTuple):
    """Which images and texts belong together.

    Attributes:
        first_row: Index of image 0 in the global batch; text 0 has index 0.
        row_ids, column_ids: `[M]` and `[N]` int64, pairs with the same id are positives; both are
            None if image i and text i are the only positives.
    """

    first_row: int
    row_ids: Tensor | None
    column_ids: Tensor | None

    def mask(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Positives of a tile, `[rows, columns]` bool; None if it is known to have none."""
        if self.row_ids is not None and self.column_ids is not None:
            return self.row_ids[rows, None] == self.column_ids[None, columns]
        first, last = self.first_row + rows.start, self.first_row + rows.stop
        if last <= columns.start or columns.stop <= first:
            return None
        row = torch.arange(first, last, device=device)
        column = torch.arange(columns.start, columns.stop, device=device)
        return row[:, None] == column[None, :]


class Sweep(NamedTuple):
    """The results of a sweep. Statistics are fp32, or fp64 for fp64 features.

    Attributes:
        rows, columns: `[6, M]` and `[6, N]` (`[8, ...]` with `legacy`), over the other side:
            log-sum-exp of x, sum of x, sum of x over the positives, number of positives, largest
            x, largest x + Gumbel noise outside the positives; with `legacy` also the largest
            noise outside the positives and the log-sum-exp of the positives.
        row_index, column_index: `[2, M]` and `[2, N]` int64 (`[3, ...]` with `legacy`): argmax of
            x, and the sampled hard negative (and the argmax of the noise). Texts for a row, images
            for a column, as indices into the global batch; the lowest wins a tie, -1 means none.
        sim: `[M, N]`, the similarity before division by the temperature; `[0, 0]` if not saved.
        arg: `[M, N]`, the lowest query index that reaches it; `[0, 0]` if not saved.
    """

    rows: Tensor
    columns: Tensor
    row_index: Tensor
    column_index: Tensor
    sim: Tensor
    arg: Tensor


class Options(NamedTuple):
    """Options of a sweep.

    Attributes:
        philox: `[2]` int64, seed and offset of the noise; None draws no negatives (-1).
        legacy: Also compute the statistics for the first LAVIS release's +1e-4.
        save: Save `sim` and `arg` for the backward pass.
    """

    philox: Tensor | None
    legacy: bool = False
    save: bool = False


class Weights(NamedTuple):
    """The gradient of a loss with respect to one side's statistics.

    `dx[i, j] = w[0] * exp(x[i, j] - lse) + w[1] + w[2] * positive[i, j]`, with w and lse of row i
    or of column j.

    Attributes:
        lse: `[M]` or `[N]`, the log-sum-exp from the sweep.
        weight: `[3, M]` or `[3, N]`.
    """

    lse: Tensor
    weight: Tensor


def index_dtype(Q: int) -> torch.dtype:
    """The smallest type that holds a query index."""
    return torch.uint8 if Q <= 256 else torch.int16


def statistics_shape(legacy: bool) -> tuple[int, int]:
    """The number of statistics and of indices per row or column."""
    return (8, 3) if legacy else (6, 2)
