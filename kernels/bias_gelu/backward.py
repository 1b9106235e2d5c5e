"""Bias and exact GELU in Triton, backward: recomputed from x; partial sums are reduced in order.

`gelu'(t) = cdf(t) + t * pdf(t)` of the standard normal distribution.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.bias_gelu.config import TileConfig, backward_tile
from blip2fast.kernels.bias_gelu.forward import gelu_derivative
from blip2fast.kernels.launch import FP_FUSION


@triton.jit
def _bias_gelu_bwd_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,  # [programs, F]
    R,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    NARROW: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_there = columns < F
    bias = tl.zeros([BLOCK_F], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_there, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for block in tl.range(program, tl.cdiv(R, BLOCK_R), programs):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        there = (rows < R)[:, None] & column_there[None, :]
        at = rows.to(tl.int64)[:, None] * F + columns[None, :]
        t = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32) + bias[None, :]
        dout = tl.load(dout_ptr + at, mask=there, other=0.0).to(tl.float32)
        dx = dout * gelu_derivative(t, NARROW)
        tl.store(dx_ptr + at, dx, mask=there)
        if SUM:
            dbias += dx
    if SUM:
        sums = sums_ptr + program.to(tl.int64) * F + columns
        tl.store(sums, tl.sum(dbias, 0), mask=column_there)


def backward(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    needs_bias: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`(dx [R, F], dbias [F])`; the latter in fp32, empty if not needed."""
    R, F = x.shape
    config = config or backward_tile(x)
    blocks = triton.cdiv(F, config.block_f)
    programs = min(triton.cdiv(R, config.block_r), max(1, config.programs // blocks))
    dx = torch.empty_like(x)
    sums = x.new_empty(programs, F if needs_bias else 0, dtype=torch.float32)
    if R > 0:
        with torch.cuda.device_of(x):
            _bias_gelu_bwd_kernel[(programs, blocks)](
                dout,
                x,
                None if bias is None else bias.contiguous(),
                dx,
                sums,
                R,
                F=F,
                BLOCK_R=config.block_r,
                BLOCK_F=config.block_f,
                HAS_BIAS=bias is not None,
                SUM=needs_bias,
                NARROW=x.dtype.itemsize == 2,
                num_warps=config.num_warps,
                enable_fp_fusion=FP_FUSION,
            )
    # second stage: reduce the partial sums in the order of the programs
    return dx, sums.sum(0)
