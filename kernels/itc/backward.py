"""Gradients of the ITC sweep in Triton: dense matmuls with each pair's gradient at its best query.

Two kernels, one that owns images and one that owns texts: no atomics, every sum in a fixed order.
Similarities and query indices are read if the sweep saved them, and recomputed otherwise.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.itc.config import TritonConfig, backward_tiles
from blip2fast.kernels.itc.forward import precision, shares
from blip2fast.kernels.itc.interface import Pairs, Weights
from blip2fast.kernels.itc.tiles import (
    is_positive,
    load_images,
    load_texts,
    similarity_tile,
)
from blip2fast.kernels.launch import FP_FUSION, capability, dense_width


@triton.jit
def _tile_gradient(
    image_ptr,
    text_ptr,
    inv_temp,
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    row_ids_ptr,
    column_ids_ptr,
    sim_ptr,
    arg_ptr,
    texts,
    images,
    j,
    first,
    M,
    N,
    first_row,
    stride_image,
    stride_query,
    stride_text,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For a tile: x, its gradients through row and column statistics, and the best query."""
    i = first + tl.arange(0, BLOCK_I)
    image_there, text_there = i < M, j < N
    there = text_there[:, None] & image_there[None, :]
    if SAVED:
        at = i.to(tl.int64)[None, :] * N + j[:, None]
        sim = tl.load(sim_ptr + at, mask=there, other=0.0)
        arg = tl.load(arg_ptr + at, mask=there, other=0).to(tl.int32)
    else:
        by_query = similarity_tile(
            texts,
            images,
            text_ptr,
            image_ptr,
            j,
            first,
            N,
            M,
            stride_text,
            stride_image,
            stride_query,
            Q,
            D,
            BLOCK_T,
            BLOCK_I,
            BLOCK_Q,
            BLOCK_D,
            PRECISION,
        )
        sim, arg = tl.max(by_query, 2, return_indices=True, return_indices_tie_break_left=True)
    x = tl.where(there, sim * inv_temp, 0.0)
    positive = is_positive(i, j, first_row, row_ids_ptr, column_ids_ptr, M, N, HAS_IDS)
    belongs = tl.where(positive, 1.0, 0.0)

    # out-of-range entries have an lse of +inf, so that exp does not overflow
    row_lse = tl.load(row_lse_ptr + i, mask=image_there, other=float("inf"))
    w0 = tl.load(row_weight_ptr + i, mask=image_there, other=0.0)
    w1 = tl.load(row_weight_ptr + M + i, mask=image_there, other=0.0)
    w2 = tl.load(row_weight_ptr + 2 * M + i, mask=image_there, other=0.0)
    by_row = w0[None, :] * tl.exp(x - row_lse[None, :]) + w1[None, :] + w2[None, :] * belongs
    by_row = tl.where(there, by_row, 0.0)

    column_lse = tl.load(column_lse_ptr + j, mask=text_there, other=float("inf"))
    w0 = tl.load(column_weight_ptr + j, mask=text_there, other=0.0)
    w1 = tl.load(column_weight_ptr + N + j, mask=text_there, other=0.0)
    w2 = tl.load(column_weight_ptr + 2 * N + j, mask=text_there, other=0.0)
    by_column = w0[:, None] * tl.exp(x - column_lse[:, None]) + w1[:, None] + w2[:, None] * belongs
    by_column = tl.where(there, by_column, 0.0)
    return x, by_row, by_column, arg


@triton.jit
def _on_best_query(
    gradient, arg, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Scatter a pair's gradient to its best query's column: [BLOCK_T, BLOCK_I * BLOCK_Q]."""
    q = tl.arange(0, BLOCK_Q)[None, None, :]
    spread = tl.where(arg[:, :, None] == q, gradient[:, :, None], 0.0)
    return tl.reshape(spread, [BLOCK_T, BLOCK_I * BLOCK_Q])


@triton.jit
def _itc_bwd_image_kernel(
    image_ptr,
    text_ptr,
    temp_ptr,
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    row_ids_ptr,
    column_ids_ptr,
    sim_ptr,
    arg_ptr,
    d_image_ptr,  # [M, Q, D]
    d_temp_ptr,  # [image blocks]
    M,
    N,
    first_row,
    stride_image,
    stride_query,
    stride_text,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OUT_D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    LOCAL: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, d0 = tl.program_id(0), tl.program_id(1) * OUT_D
    first = block * BLOCK_I
    inv_temp = 1.0 / tl.load(temp_ptr)
    images = load_images(
        image_ptr, first, 0, M, stride_image, stride_query, Q, D, BLOCK_I, BLOCK_Q, BLOCK_D
    )
    d_image = tl.zeros([BLOCK_I * BLOCK_Q, OUT_D], tl.float32)
    d_temp = 0.0
    for text_block in tl.range(0, tl.cdiv(N, BLOCK_T)):
        j = text_block * BLOCK_T + tl.arange(0, BLOCK_T)
        texts = load_texts(text_ptr, j, 0, N, stride_text, D, BLOCK_D)
        x, by_row, by_column, arg = _tile_gradient(
            image_ptr,
            text_ptr,
            inv_temp,
            row_lse_ptr,
            row_weight_ptr,
            column_lse_ptr,
            column_weight_ptr,
            row_ids_ptr,
            column_ids_ptr,
            sim_ptr,
            arg_ptr,
            texts,
            images,
            j,
            first,
            M,
            N,
            first_row,
            stride_image,
            stride_query,
            stride_text,
            Q,
            D,
            BLOCK_T,
            BLOCK_I,
            BLOCK_Q,
            BLOCK_D,
            HAS_IDS,
            SAVED,
            PRECISION,
        )
        both = by_row + by_column
        d_temp -= tl.sum(both * x)
        if not LOCAL:
            by_row = both
        spread = _on_best_query(by_row, arg, BLOCK_T, BLOCK_I, BLOCK_Q)
        out_texts = load_texts(text_ptr, j, d0, N, stride_text, D, OUT_D)
        d_image = tl.dot(
            tl.trans(spread.to(out_texts.dtype)), out_texts, d_image, input_precision=PRECISION
        )
    c = tl.arange(0, BLOCK_I * BLOCK_Q)
    i, q = first + c // BLOCK_Q, c % BLOCK_Q
    d = d0 + tl.arange(0, OUT_D)
    at = ((i.to(tl.int64) * Q + q) * D)[:, None] + d[None, :]
    there = ((i < M) & (q < Q))[:, None] & (d < D)[None, :]
    tl.store(d_image_ptr + at, (d_image * inv_temp).to(d_image_ptr.dtype.element_ty), mask=there)
    if d0 == 0:
        tl.store(d_temp_ptr + block, d_temp * inv_temp)


@triton.jit
def _itc_bwd_text_kernel(
    image_ptr,
    text_ptr,
    temp_ptr,
    row_lse_ptr,
    row_weight_ptr,
    column_lse_ptr,
    column_weight_ptr,
    row_ids_ptr,
    column_ids_ptr,
    sim_ptr,
    arg_ptr,
    d_text_ptr,  # [shares, N, D] fp32
    M,
    N,
    first_row,
    stride_image,
    stride_query,
    stride_text,
    blocks_per_share,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OUT_D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    LOCAL: tl.constexpr,
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    text_block, d0, share = tl.program_id(0), tl.program_id(1) * OUT_D, tl.program_id(2)
    j = text_block * BLOCK_T + tl.arange(0, BLOCK_T)
    inv_temp = 1.0 / tl.load(temp_ptr)
    texts = load_texts(text_ptr, j, 0, N, stride_text, D, BLOCK_D)
    d_text = tl.zeros([BLOCK_T, OUT_D], tl.float32)
    begin = share * blocks_per_share
    for block in tl.range(begin, tl.minimum(begin + blocks_per_share, tl.cdiv(M, BLOCK_I))):
        first = block * BLOCK_I
        images = load_images(
            image_ptr, first, 0, M, stride_image, stride_query, Q, D, BLOCK_I, BLOCK_Q, BLOCK_D
        )
        _, by_row, by_column, arg = _tile_gradient(
            image_ptr,
            text_ptr,
            inv_temp,
            row_lse_ptr,
            row_weight_ptr,
            column_lse_ptr,
            column_weight_ptr,
            row_ids_ptr,
            column_ids_ptr,
            sim_ptr,
            arg_ptr,
            texts,
            images,
            j,
            first,
            M,
            N,
            first_row,
            stride_image,
            stride_query,
            stride_text,
            Q,
            D,
            BLOCK_T,
            BLOCK_I,
            BLOCK_Q,
            BLOCK_D,
            HAS_IDS,
            SAVED,
            PRECISION,
        )
        if not LOCAL:
            by_column += by_row
        spread = _on_best_query(by_column, arg, BLOCK_T, BLOCK_I, BLOCK_Q)
        out_images = load_images(
            image_ptr, first, d0, M, stride_image, stride_query, Q, D, BLOCK_I, BLOCK_Q, OUT_D
        )
        d_text = tl.dot(spread.to(out_images.dtype), out_images, d_text, input_precision=PRECISION)
    d = d0 + tl.arange(0, OUT_D)
    at = (share.to(tl.int64) * N + j)[:, None] * D + d[None, :]
    there = (j < N)[:, None] & (d < D)[None, :]
    tl.store(d_text_ptr + at, d_text * inv_temp, mask=there)


def loads_ahead(has_saved: bool) -> bool:
    """Whether to prefetch the next tile; older Triton spills prefetched saved similarities."""
    return not has_saved or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def sweep_grad(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    pairs: Pairs,
    sides: tuple[Weights, Weights],
    local: bool,
    saved: tuple[Tensor, Tensor],
    config: TritonConfig | None = None,
    text_config: TritonConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.sweep_grad`, for fp16, bf16 and fp32 on a GPU.

    `config` is for the kernel that owns images, `text_config` for the one that owns texts; the
    latter defaults to `config` if only that is given.
    """
    (M, Q, D), N, device = image.shape, text.shape[0], image.device
    has_saved = saved[0].numel() > 0
    if config is None:
        load_ahead = loads_ahead(has_saved)
        itemsize, of = image.dtype.itemsize, capability(device)
        config, of_texts = backward_tiles(Q, D, itemsize, of, has_saved, load_ahead)
        text_config = text_config or of_texts
    text_config = text_config or config
    image, text = dense_width(image), dense_width(text)
    count, per_share = shares(M, N, text_config)
    image_blocks = triton.cdiv(M, config.block_i)
    d_image = torch.empty(M, Q, D, dtype=image.dtype, device=device)
    d_text = torch.empty(count, N, D, device=device)
    d_temp = torch.empty(image_blocks, device=device)
    ids = pairs.row_ids, pairs.column_ids
    inputs = (image, text, temp, *sides[0], *sides[1], *ids, *saved)
    sizes = (M, N, pairs.first_row, image.stride(0), image.stride(1), text.stride(0))
    constants = {
        "Q": Q,
        "D": D,
        "HAS_IDS": pairs.row_ids is not None,
        "LOCAL": local,
        "SAVED": has_saved,
        "PRECISION": precision(image.dtype),
        "enable_fp_fusion": FP_FUSION,
    }
    with torch.cuda.device_of(image):
        _itc_bwd_image_kernel[(image_blocks, triton.cdiv(D, config.out_d))](
            *inputs, d_image, d_temp, *sizes, **constants, **_tile_constants(config)
        )
        text_blocks, widths = triton.cdiv(N, text_config.block_t), triton.cdiv(D, text_config.out_d)
        _itc_bwd_text_kernel[(text_blocks, widths, count)](
            *inputs, d_text, *sizes, per_share, **constants, **_tile_constants(text_config)
        )
    return d_image, d_text.sum(0).to(text.dtype), d_temp.sum()


def _tile_constants(config: TritonConfig) -> dict[str, int]:
    return {
        "BLOCK_T": config.block_t,
        "BLOCK_I": config.block_i,
        "BLOCK_Q": config.block_q,
        "BLOCK_D": config.block_d,
        "OUT_D": config.out_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
