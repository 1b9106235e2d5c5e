"""Dropout, residual and LayerNorm in Triton, forward: every element is read and written once."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm.config import RowsConfig, forward_rows
from blip2fast.kernels.launch import FP_FUSION
from blip2fast.kernels.philox import threshold


@triton.jit
def kept_tile(
    philox_ptr, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr
):
    """The dropout mask of full rows, [BLOCK_R, BLOCK_C] bool."""
    seed, offset = tl.load(philox_ptr), tl.load(philox_ptr + 1)
    zero = tl.zeros([BLOCK_R, BLOCK_C // 4], tl.int32)
    group = zero + tl.arange(0, BLOCK_C // 4)[None, :]
    w0, w1, w2, w3 = tl.philox(
        seed, group, zero + rows[:, None], zero, zero + offset.to(tl.int32), 7
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_R, BLOCK_C])
    # int64 holds unsigned words up to 2^32 - 1
    return (words.to(tl.int64) & 0xFFFFFFFF) >= THRESHOLD


@triton.jit
def _dropout_add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    x_bias_ptr,
    philox_ptr,
    out_ptr,
    copy_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    eps,
    scale,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    COPY: tl.constexpr,
    SAVE_TOTAL: tl.constexpr,
    SAVE_STATISTICS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    row_there, column_there = rows < R, columns < C
    there = row_there[:, None] & column_there[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]

    total = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        x_bias = tl.load(x_bias_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
        total += x_bias[None, :]
    if DROPOUT:
        kept = kept_tile(philox_ptr, rows, BLOCK_R, BLOCK_C, THRESHOLD)
        total = tl.where(kept, total * scale, 0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    if SAVE_TOTAL:
        tl.store(total_ptr + at, total, mask=there)

    mean = tl.sum(total, 1) / C
    centred = tl.where(column_there[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    if SAVE_STATISTICS:
        tl.store(mean_ptr + rows, mean, mask=row_there)
        tl.store(rstd_ptr + rows, rstd, mask=row_there)
    weight = tl.load(weight_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, out, mask=there)
    if COPY:
        tl.store(copy_ptr + at, out, mask=there)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    philox: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    save: bool,
    config: RowsConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `pytorch.forward`, for fp16, bf16 and fp32 on a GPU; `total` is x if nothing is added.

    Tensors that are not to be saved are returned empty.
    """
    R, C = x.shape
    config = config or forward_rows(C, x.dtype, x.device)
    added = residual is not None or x_bias is not None or philox is not None
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(R, C, dtype=out_dtype)
    copy = x.new_empty((R, C) if copy_dtype else (0,), dtype=copy_dtype or out_dtype)
    total = x.new_empty((R, C) if save and added else (0,), dtype=total_dtype)
    mean, rstd = (x.new_empty(R if save else 0, dtype=torch.float32) for _ in range(2))
    if R > 0:
        with torch.cuda.device_of(x):
            _dropout_add_layer_norm_fwd_kernel[(triton.cdiv(R, config.block_r),)](
                x,
                residual,
                weight.contiguous(),
                bias.contiguous(),
                None if x_bias is None else x_bias.contiguous(),
                philox,
                out,
                copy,
                total,
                mean,
                rstd,
                R,
                eps,
                1 / (1 - dropout_p),
                C=C,
                BLOCK_R=config.block_r,
                BLOCK_C=config.block_c,
                HAS_RESIDUAL=residual is not None,
                HAS_X_BIAS=x_bias is not None,
                DROPOUT=philox is not None,
                THRESHOLD=threshold(dropout_p),
                COPY=copy_dtype is not None,
                SAVE_TOTAL=save and added,
                SAVE_STATISTICS=save,
                num_warps=config.num_warps,
                enable_fp_fusion=FP_FUSION,
            )
    return out, copy, total if added else x, mean, rstd
