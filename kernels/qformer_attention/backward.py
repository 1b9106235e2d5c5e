"""Self-attention of a token buffer in Triton, backward: no atomics, every sum in a fixed order.

Where a unit's rows and keys fit one tile, one program has a block and every text that sees it, and
computes each weight once. Larger ones are left to `backward_large.py`.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.qformer_attention.backward_large import (
    _qformer_attention_bwd_dkv_kernel,
    _qformer_attention_bwd_dq_kernel,
)
from blip2fast.kernels.qformer_attention.config import (
    Tiles,
    self_backward_tiles,
    self_sizes,
)
from blip2fast.kernels.qformer_attention.forward import LOG2_E, constants, dense_heads
from blip2fast.kernels.qformer_attention.tiles import (
    gradient_tile,
    load_lse,
    load_rows,
    store_rows,
)
from blip2fast.kernels.qformer_attention.units import find_text, find_unit, row_of
from blip2fast.ops.attention_layout import AttentionLayout


@triton.jit
def _gradients_of_rows(
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    dqkv_ptr,
    philox_ptr,
    block,
    text_row,
    first_row,
    first_key,
    end,
    causal,
    head,
    Q,
    stride_row,
    scale,
    score_scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store dq of the rows of one tile; return dk and dv of its keys, [BLOCK_N, BLOCK_D] fp32."""
    place = first_row + tl.arange(0, BLOCK_M)
    there = place < end
    row = row_of(place, block, text_row, Q)
    c0 = first_key // 4 * 4
    key = c0 + tl.arange(0, BLOCK_N)
    key_there = (key >= first_key) & (key < end)
    key_at = row_of(key, block, text_row, Q) * stride_row + (H + head) * D
    q = load_rows(qkv_ptr, row * stride_row + head * D, there, D, BLOCK_D)
    k = load_rows(qkv_ptr, key_at, key_there, D, BLOCK_D)
    v = load_rows(qkv_ptr, key_at + H * D, key_there, D, BLOCK_D)
    at = row * H + head
    dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
    out = load_rows(out_ptr, at * D, there, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    visible = key_there[None, :] & ((key[None, :] <= place[:, None]) | (causal == 0))
    dropped, d_scores = gradient_tile(
        q,
        k,
        v,
        dout,
        load_lse(lse_ptr, at, there),
        delta,
        visible,
        philox_ptr,
        head,
        row,
        c0,
        score_scale,
        keep_scale,
        THRESHOLD,
        PRECISION,
    )
    dv = tl.dot(tl.trans(dropped), dout, input_precision=PRECISION)
    dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION) * scale
    dq = tl.dot(d_scores, k, input_precision=PRECISION) * scale
    store_rows(dqkv_ptr, (row * 3 * H + head) * D, dq, there, D, BLOCK_D)
    return dk, dv


@triton.jit(do_not_specialize=["N", "Q"])
def _qformer_attention_bwd_kernel(
    qkv_ptr,
    dout_ptr,  # [R, H, D]
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H]
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    order_ptr,
    offsets_ptr,
    philox_ptr,
    dqkv_ptr,  # [R, 3, H, D]
    N,
    Q,
    stride_row,
    scale,
    score_scale,  # includes log2(e)
    keep_scale,  # 1 / (1 - p)
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_BIDIRECTIONAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    first_head = program % (H // HEADS) * HEADS
    unit = program // (H // HEADS)
    block, text_row, first_row, first_key, end, kind = find_unit(
        unit, cu_seqlens_ptr, kinds_ptr, blocks_ptr, block_text_ptr, N, Q, HAS_BIDIRECTIONAL
    )
    is_block = unit < N
    begin = tl.load(offsets_ptr + unit, mask=is_block, other=0)
    stop = tl.load(offsets_ptr + unit + 1, mask=is_block, other=0)
    # a text that sees a block is done by the block's program
    if (unit >= N) & (kind != 0):
        return
    c0 = first_key // 4 * 4
    key = c0 + tl.arange(0, BLOCK_N)
    for h in tl.range(0, HEADS):
        head = first_head + h
        dk, dv = _gradients_of_rows(
            qkv_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            dqkv_ptr,
            philox_ptr,
            block,
            text_row,
            first_row,
            first_key,
            end,
            False,
            head,
            Q,
            stride_row,
            scale,
            score_scale,
            keep_scale,
            H,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            THRESHOLD,
            PRECISION,
        )
        for i in tl.range(begin, stop):
            text = tl.load(order_ptr + i)
            reader_row, length = find_text(text, cu_seqlens_ptr, N * Q)
            if (tl.load(kinds_ptr + text) == 2) & (length > 0):
                text_dk, text_dv = _gradients_of_rows(
                    qkv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    dqkv_ptr,
                    philox_ptr,
                    block,
                    reader_row,
                    Q,
                    0,
                    Q + length,
                    True,
                    head,
                    Q,
                    stride_row,
                    scale,
                    score_scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    THRESHOLD,
                    PRECISION,
                )
                own = (key >= Q) & (key < Q + length)
                at = (row_of(key, block, reader_row, Q) * 3 * H + H + head) * D
                store_rows(dqkv_ptr, at, text_dk, own, D, BLOCK_D)
                store_rows(dqkv_ptr, at + H * D, text_dv, own, D, BLOCK_D)
                of_block = (key < Q)[:, None]
                dk += tl.where(of_block, text_dk, 0.0)
                dv += tl.where(of_block, text_dv, 0.0)
        there = (key >= first_key) & (key < end)
        at = (row_of(key, block, text_row, Q) * 3 * H + H + head) * D
        store_rows(dqkv_ptr, at, dk, there, D, BLOCK_D)
        store_rows(dqkv_ptr, at + H * D, dv, there, D, BLOCK_D)


def self_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The gradient of `self_forward`'s `qkv`, `[R, 3, H, D]`.

    Args:
        dout: `[R, H, D]`, the gradient of `out`.
        qkv, layout, scale, dropout_p, philox: What `self_forward` had.
        out, lse: What it returned.
        tiles: Other than those of `config.py`.
    """
    R, _, H, D = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    units = layout.num_blocks + layout.num_texts
    if R == 0 or units == 0:
        return dqkv
    qkv, dout, out, lse = dense_heads(qkv), dout.contiguous(), out.contiguous(), lse.contiguous()
    rows, keys = self_sizes(layout)
    tiles = tiles or self_backward_tiles(rows, keys, H, D, qkv.dtype.itemsize)
    segments = (layout.cu_seqlens, layout.kinds, layout.blocks, layout.block_text)
    readers = (layout.order, layout.offsets)
    counts = (layout.num_blocks, layout.num_queries)
    factors = (qkv.stride(0), scale, scale * LOG2_E, 1.0 / (1.0 - dropout_p))
    options = constants(qkv, tiles, dropout_p, philox)
    options["HAS_BIDIRECTIONAL"] = layout.has_bidirectional
    with torch.cuda.device_of(qkv):
        if tiles.single:
            _qformer_attention_bwd_kernel[(units * (H // tiles.heads),)](
                qkv, dout, out, lse, *segments, *readers, philox, dqkv, *counts, *factors, **options
            )
            return dqkv
        del options["HEADS"]
        delta = torch.empty_like(lse)
        row_tiles = triton.cdiv(rows, tiles.block_m)
        key_tiles = triton.cdiv(rows + 3, tiles.block_n)
        _qformer_attention_bwd_dq_kernel[(units * row_tiles * H,)](
            qkv,
            dout,
            out,
            lse,
            delta,
            *segments,
            philox,
            dqkv,
            *counts,
            row_tiles,
            *factors,
            **options,
        )
        _qformer_attention_bwd_dkv_kernel[(units * key_tiles * H,)](
            qkv,
            dout,
            lse,
            delta,
            *segments,
            *readers,
            philox,
            dqkv,
            *counts,
            key_tiles,
            *factors,
            **options,
        )
    return dqkv
