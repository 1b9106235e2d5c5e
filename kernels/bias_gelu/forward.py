"""Bias and exact GELU in Triton, forward."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.bias_gelu.config import TileConfig, forward_tile
from blip2fast.kernels.launch import FP_FUSION


@triton.jit
def normal_cdf(t):
    return 0.5 + 0.5 * tl.erf(t * 0.7071067811865476)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    R,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_there = columns < F
    there = (rows < R)[:, None] & column_there[None, :]
    at = rows.to(tl.int64)[:, None] * F + columns[None, :]
    t = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
        t += bias[None, :]
    tl.store(out_ptr + at, t * normal_cdf(t), mask=there)


def forward(x: Tensor, bias: Tensor | None, config: TileConfig | None = None) -> Tensor:
    """`gelu(x + bias)`, `[R, F]`; fp16, bf16 and fp32 on a GPU."""
    R, F = x.shape
    config = config or forward_tile(x)
    out = torch.empty_like(x)
    if R > 0:
        grid = (triton.cdiv(R, config.block_r), triton.cdiv(F, config.block_f))
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[grid](
                x,
                None if bias is None else bias.contiguous(),
                out,
                R,
                F=F,
                BLOCK_R=config.block_r,
                BLOCK_F=config.block_f,
                HAS_BIAS=bias is not None,
                num_warps=config.num_warps,
                enable_fp_fusion=FP_FUSION,
            )
    return out
