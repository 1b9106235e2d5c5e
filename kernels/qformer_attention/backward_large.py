"""Self-attention in Triton, backward, where rows and keys do not fit one tile.

The first kernel owns tiles of rows (dq) and writes what the softmax's gradient needs of each row,
the second owns tiles of keys (dk, dv).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from blip2fast.kernels.qformer_attention.tiles import (
    gradient_tile,
    load_lse,
    load_rows,
    store_rows,
)
from blip2fast.kernels.qformer_attention.units import find_text, find_unit, row_of


@triton.jit(do_not_specialize=["N", "Q", "row_tiles"])
def _qformer_attention_bwd_dq_kernel(
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,  # [R, H], written
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    philox_ptr,
    dqkv_ptr,
    N,
    Q,
    row_tiles,
    stride_row,
    scale,
    score_scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIDIRECTIONAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    row_tile = program // H % row_tiles
    block, text_row, first_row, first_key, end, kind = find_unit(
        program // H // row_tiles,
        cu_seqlens_ptr,
        kinds_ptr,
        blocks_ptr,
        block_text_ptr,
        N,
        Q,
        HAS_BIDIRECTIONAL,
    )
    first_place = first_row + row_tile * BLOCK_M
    if first_place >= end:
        return
    place = first_place + tl.arange(0, BLOCK_M)
    there = place < end
    row = row_of(place, block, text_row, Q)
    at = row * H + head
    q = load_rows(qkv_ptr, row * stride_row + head * D, there, D, BLOCK_D)
    dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
    out = load_rows(out_ptr, at * D, there, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=there)
    lse = load_lse(lse_ptr, at, there)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    c_end = tl.where(kind == 2, tl.minimum(end, first_place + BLOCK_M), end)
    for c0 in tl.range(first_key // 4 * 4, c_end, BLOCK_N):
        key = c0 + tl.arange(0, BLOCK_N)
        key_there = (key >= first_key) & (key < end)
        key_at = row_of(key, block, text_row, Q) * stride_row + (H + head) * D
        k = load_rows(qkv_ptr, key_at, key_there, D, BLOCK_D)
        v = load_rows(qkv_ptr, key_at + H * D, key_there, D, BLOCK_D)
        visible = key_there[None, :] & ((key[None, :] <= place[:, None]) | (kind != 2))
        _, d_scores = gradient_tile(
            q,
            k,
            v,
            dout,
            lse,
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
        dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
    store_rows(dqkv_ptr, (row * 3 * H + head) * D, dq * scale, there, D, BLOCK_D)


@triton.jit(do_not_specialize=["N", "Q", "key_tiles"])
def _qformer_attention_bwd_dkv_kernel(
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    order_ptr,
    offsets_ptr,
    philox_ptr,
    dqkv_ptr,
    N,
    Q,
    key_tiles,
    stride_row,
    scale,
    score_scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIDIRECTIONAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % H
    unit = program // H // key_tiles
    block, text_row, first_row, _, end, kind = find_unit(
        unit, cu_seqlens_ptr, kinds_ptr, blocks_ptr, block_text_ptr, N, Q, HAS_BIDIRECTIONAL
    )
    # a unit owns its rows as keys; dropout wants a multiple of 4
    c0 = first_row // 4 * 4 + program // H % key_tiles * BLOCK_N
    if c0 >= end:
        return
    key = c0 + tl.arange(0, BLOCK_N)
    key_there = (key >= first_row) & (key < end)
    key_row = row_of(key, block, text_row, Q)
    k = load_rows(qkv_ptr, key_row * stride_row + (H + head) * D, key_there, D, BLOCK_D)
    v = load_rows(qkv_ptr, key_row * stride_row + (2 * H + head) * D, key_there, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    has_queries = (unit < N) & (c0 < Q)
    begin = tl.load(offsets_ptr + unit, mask=has_queries, other=0)
    stop = tl.load(offsets_ptr + unit + 1, mask=has_queries, other=0)
    # the unit's own rows, then those of each text that sees its queries
    for i in tl.range(begin - 1, stop):
        is_own = begin > i
        reader = tl.load(order_ptr + i, mask=i >= begin, other=0)
        reader_row, length = find_text(reader, cu_seqlens_ptr, N * Q)
        # a BIDIRECTIONAL text's rows are among the block's own
        of_reader = tl.where(tl.load(kinds_ptr + reader, mask=i >= begin, other=0) == 2, length, 0)
        rows_at = tl.where(is_own, text_row, reader_row)
        rows_end = tl.where(is_own, end, Q + of_reader)
        seen_end = tl.where(is_own, end, Q)
        causal = is_own & (kind == 2)
        rows_begin = tl.where(is_own, tl.where(causal, tl.maximum(first_row, c0), first_row), Q)
        for r0 in tl.range(rows_begin, rows_end, BLOCK_M):
            place = r0 + tl.arange(0, BLOCK_M)
            there = place < rows_end
            row = row_of(place, block, rows_at, Q)
            at = row * H + head
            q = load_rows(qkv_ptr, row * stride_row + head * D, there, D, BLOCK_D)
            dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
            visible = (key_there & (key < seen_end))[None, :]
            visible = visible & ((key[None, :] <= place[:, None]) | (causal == 0))
            dropped, d_scores = gradient_tile(
                q,
                k,
                v,
                dout,
                load_lse(lse_ptr, at, there),
                tl.load(delta_ptr + at, mask=there, other=0.0),
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
            dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(d_scores), q, dk, input_precision=PRECISION)
    dk_at = (key_row * 3 * H + H + head) * D
    store_rows(dqkv_ptr, dk_at, dk * scale, key_there, D, BLOCK_D)
    store_rows(dqkv_ptr, dk_at + H * D, dv, key_there, D, BLOCK_D)
