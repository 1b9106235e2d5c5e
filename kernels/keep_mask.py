"""The dropout mask of `philox.keep_mask` in one Triton launch, for dropout outside fused kernels.

Bit-identical to the PyTorch formula, whose int64 temporaries take 129 launches on a GPU.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.launch import FP_FUSION

# counters per program; each gives 4 columns
_BLOCK = 256


@triton.jit
def _philox_keep_mask_kernel(
    philox_ptr,
    rows_ptr,
    heads_ptr,
    out_ptr,
    counters,
    groups,
    first_group,
    first_column,
    columns,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[n, columns]` bool; one counter per entry of `rows`, `heads` and group of 4 columns."""
    seed, offset = tl.load(philox_ptr), tl.load(philox_ptr + 1)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = counter < counters
    n = counter // groups
    group = first_group + (counter - n * groups)
    row = tl.load(rows_ptr + n, mask=there, other=0)
    head = tl.load(heads_ptr + n, mask=there, other=0)
    zero = tl.zeros([BLOCK], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + group.to(tl.int32),
        zero + row.to(tl.int32),
        zero + head.to(tl.int32),
        zero + offset.to(tl.int32),
        7,
    )
    column = group * 4 - first_column
    at = out_ptr + n * columns + column
    tl.store(at, w0 >= THRESHOLD, mask=there & (column >= 0) & (column < columns))
    tl.store(at + 1, w1 >= THRESHOLD, mask=there & (column >= -1) & (column + 1 < columns))
    tl.store(at + 2, w2 >= THRESHOLD, mask=there & (column >= -2) & (column + 2 < columns))
    tl.store(at + 3, w3 >= THRESHOLD, mask=there & (column >= -3) & (column + 3 < columns))


def keep_mask(
    philox: Tensor, least: int, rows: Tensor, heads: Tensor, columns: int, first_column: int
) -> Tensor:
    """As `philox.keep_mask`.

    Args:
        philox: `[2]` int64, seed and offset.
        least: The smallest word that is kept.
        rows, heads: `[n]` int64, contiguous.
        columns, first_column: Number of columns, and the first one's index.

    Returns:
        `[n, columns]` bool.
    """
    n = rows.shape[0]
    out = torch.empty(n, columns, dtype=torch.bool, device=rows.device)
    first_group, last_group = first_column // 4, (first_column + columns + 3) // 4
    groups = last_group - first_group
    counters = n * groups
    if counters == 0:
        return out
    with torch.cuda.device_of(rows):
        _philox_keep_mask_kernel[(triton.cdiv(counters, _BLOCK),)](
            philox,
            rows,
            heads,
            out,
            counters,
            groups,
            first_group,
            first_column,
            columns,
            THRESHOLD=least,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )
    return out
