"""What every backend of the ITC sweep takes and gives.

A sweep looks at M images against N texts once, `x[i, j] = max_q <image[i, q], text[j]> / temp`,
and keeps a few numbers a row (an image) and a column (a text). Numbers of a part of a row or column
are of the same kind as those of the whole, and `statistics.join` joins them: tiles of a device and
ranks of a job alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# rows of `Sweep.rows` and `Sweep.columns`
LSE, SUM, POSITIVE_SUM, POSITIVE_COUNT, BEST, KEY = range(6)
DIFFERENTIABLE = 3
# two more where the first LAVIS release's +1e-4 is asked for
UNIFORM_KEY, POSITIVE_LSE = 6, 7
# rows of `Sweep.row_index` and `Sweep.column_index`
BEST_INDEX, NEGATIVE_INDEX, UNIFORM_INDEX = range(3)


class Pairs(NamedTuple):
    """Which images and texts belong together.

    Attributes:
        first_row: The index that image 0 has in the batch of all ranks; text 0 has index 0.
        row_ids, column_ids: `[M]` and `[N]` int64, pairs of equal id are positives; None (both)
            where image i and text i alone are.
    """

    first_row: int
    row_ids: Tensor | None
    column_ids: Tensor | None

    def mask(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """Positives of a tile, `[rows, columns]` bool; None where it can be seen to have none."""
        if self.row_ids is not None and self.column_ids is not None:
            return self.row_ids[rows, None] == self.column_ids[None, columns]
        first, last = self.first_row + rows.start, self.first_row + rows.stop
        if last <= columns.start or columns.stop <= first:
            return None
        row = torch.arange(first, last, device=device)
        column = torch.arange(columns.start, columns.stop, device=device)
        return row[:, None] == column[None, :]


class Sweep(NamedTuple):
    """What a sweep keeps. Statistics are fp32, or fp64 where the features are.

    Attributes:
        rows, columns: `[6, M]` and `[6, N]` (`[8, ...]` with `legacy`), over the other side:
            log-sum-exp of x, sum of x, sum of x over the positives, number of positives, greatest
            x, greatest x + Gumbel noise outside the positives; with `legacy` also the greatest
            noise outside the positives and the log-sum-exp of the positives.
        row_index, column_index: `[2, M]` and `[2, N]` int64 (`[3, ...]` with `legacy`): where the
            greatest x is, and the hard negative drawn (and where the greatest noise is). Texts for
            a row, images for a column, counted over all ranks; the lowest wins a tie, -1 is none.
        sim: `[M, N]`, the similarity before division by the temperature; `[0, 0]` if not saved.
        arg: `[M, N]`, the query it is reached at (the lowest); `[0, 0]` if not saved.
    """

    rows: Tensor
    columns: Tensor
    row_index: Tensor
    column_index: Tensor
    sim: Tensor
    arg: Tensor


class Options(NamedTuple):
    """How to sweep.

    Attributes:
        philox: `[2]` int64, seed and offset of the noise; None draws no negatives (-1).
        legacy: Keep what the first LAVIS release's +1e-4 needs.
        save: Keep `sim` and `arg` for the backward pass.
    """

    philox: Tensor | None
    legacy: bool = False
    save: bool = False


class Weights(NamedTuple):
    """The gradient of a loss with respect to one side's statistics.

    `dx[i, j] = w[0] * exp(x[i, j] - lse) + w[1] + w[2] * positive[i, j]`, w and lse of the row i
    or of the column j.

    Attributes:
        lse: `[M]` or `[N]`, the log-sum-exp that the sweep gave.
        weight: `[3, M]` or `[3, N]`.
    """

    lse: Tensor
    weight: Tensor


def index_dtype(Q: int) -> torch.dtype:
    """The smallest type that holds a query index."""
    return torch.uint8 if Q <= 256 else torch.int16


def statistics_shape(legacy: bool) -> tuple[int, int]:
    """How many statistics and how many indices a side keeps."""
    return (8, 3) if legacy else (6, 2)
