"""Dropout, residual and LayerNorm in Triton, backward: one pass, then a sum over partial sums.

With `u = (total - mean) * rstd` and `g = dout * weight`, for a row of width C:
`dtotal = (g - mean(g) - u * mean(g * u)) * rstd`, and dx is dtotal under the dropout mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm.config import RowsConfig, backward_rows
from blip2fast.kernels.dropout_add_layer_norm.forward import kept_tile
from blip2fast.kernels.launch import FP_FUSION
from blip2fast.kernels.philox import threshold


@triton.jit
def _dropout_add_layer_norm_bwd_kernel(
    dout_ptr,
    dcopy_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    philox_ptr,
    dresidual_ptr,
    dx_ptr,
    sums_ptr,  # [programs, 3, C]: of dweight, dbias, dx_bias
    R,
    scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COPY: tl.constexpr,
    APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    X_BIAS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    column_there = columns < C
    weight = tl.load(weight_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dx_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in tl.range(program, tl.cdiv(R, BLOCK_R), programs):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        row_there = rows < R
        there = row_there[:, None] & column_there[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        mean = tl.load(mean_ptr + rows, mask=row_there, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_there, other=0.0)
        dout = tl.load(dout_ptr + at, mask=there, other=0.0).to(tl.float32)
        if COPY:
            dout += tl.load(dcopy_ptr + at, mask=there, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=there, other=0.0).to(tl.float32)
        # out-of-range rows have an rstd of 0, out-of-range columns a g of 0
        unit = (total - mean[:, None]) * rstd[:, None]
        if PARAMETERS:
            dweight += dout * unit
            dbias += dout
        g = dout * weight[None, :]
        along, level = tl.sum(g * unit, 1) / C, tl.sum(g, 1) / C
        dtotal = (g - level[:, None] - unit * along[:, None]) * rstd[:, None]
        tl.store(dresidual_ptr + at, dtotal, mask=there)
        dx = dtotal
        if DROPOUT:
            kept = kept_tile(philox_ptr, rows, BLOCK_R, BLOCK_C, THRESHOLD)
            dx = tl.where(kept, dtotal * scale, 0.0)
        if APART:
            tl.store(dx_ptr + at, dx, mask=there)
        if X_BIAS:
            dx_bias += dx
    sums = sums_ptr + program.to(tl.int64) * 3 * C + columns
    if PARAMETERS:
        tl.store(sums, tl.sum(dweight, 0), mask=column_there)
        tl.store(sums + C, tl.sum(dbias, 0), mask=column_there)
    if X_BIAS:
        tl.store(sums + 2 * C, tl.sum(dx_bias, 0), mask=column_there)


def backward(
    dout: Tensor,
    dcopy: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    philox: Tensor | None,
    dropout_p: float,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype,
    apart: bool,
    needs_parameters: bool,
    needs_x_bias: bool,
    config: RowsConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `pytorch.backward`; dx is empty unless `apart`."""
    R, C = total.shape
    config = config or backward_rows(C, x_dtype, total.device)
    programs = min(triton.cdiv(R, config.block_r), config.programs)
    dresidual = total.new_empty(R, C, dtype=residual_dtype)
    dx = total.new_empty((R, C) if apart else (0,), dtype=x_dtype)
    sums = total.new_empty(programs, 3, C, dtype=torch.float32)
    if R > 0:
        with torch.cuda.device_of(total):
            _dropout_add_layer_norm_bwd_kernel[(programs,)](
                dout,
                dcopy,
                total,
                mean,
                rstd,
                weight.contiguous(),
                philox,
                dresidual,
                dx,
                sums,
                R,
                1 / (1 - dropout_p),
                C=C,
                BLOCK_R=config.block_r,
                BLOCK_C=config.block_c,
                COPY=dcopy is not None,
                APART=apart,
                DROPOUT=philox is not None,
                THRESHOLD=threshold(dropout_p),
                PARAMETERS=needs_parameters,
                X_BIAS=needs_x_bias,
                num_warps=config.num_warps,
                enable_fp_fusion=FP_FUSION,
            )
    # second stage: reduce the partial sums in the order of the programs
    dweight, dbias, dx_bias = sums.sum(0)
    nothing = dweight.new_empty(0)
    return (
        dresidual,
        dx,
        dweight.clone() if needs_parameters else nothing,
        dbias.clone() if needs_parameters else nothing,
        dx_bias.clone() if needs_x_bias else nothing,
    )
