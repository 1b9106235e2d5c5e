"""Self-attention of a token buffer in Triton, backward: no atomics, every sum in a fixed order.

A program owns keys (dk, dv) and loops over the rows that see them: its unit's, then, for a block,
those of each text that sees it, in order; with `joined` tiles the first such text is in its unit.
If a unit's keys fit one tile, it also computes its rows' dq from the same weights; otherwise a
kernel that owns rows runs first.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.qformer_attention.config import (
    Tiles,
    has_causal,
    joined_tile,
    self_backward_tiles,
    self_sizes,
)
from blip2fast.kernels.qformer_attention.forward import constants, dense_heads
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.kernels.qformer_attention.tiles import (
    gradient_tile,
    load_lse,
    load_rows,
    store_rows,
)
from blip2fast.kernels.qformer_attention.units import find_text, find_unit, row_of, visible_pairs


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
        None,
        None,
        N,
        Q,
        HAS_BIDIRECTIONAL,
        False,
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
        # no text is joined to a block here: a causal text's places are all after the queries
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
            scale,
            keep_scale,
            THRESHOLD,
            PRECISION,
        )
        dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
    store_rows(dqkv_ptr, (row * 3 * H + head) * D, dq * scale, there, D, BLOCK_D)


@triton.jit
def _add_rows(
    dk,
    dv,
    key,
    key_row,
    key_there,
    c0,
    first_place,
    end,
    causal,
    block,
    text_row,
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    philox_ptr,
    dqkv_ptr,
    head,
    Q,
    stride_row,
    scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FRESH: tl.constexpr,
    STORE_DQ: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of rows to dk (without its scale) and dv of a tile of keys.

    FRESH: dk and dv are not initialised yet. STORE_DQ: the rows see no other keys.
    """
    place = first_place + tl.arange(0, BLOCK_M)
    there = place < end
    row = row_of(place, block, text_row, Q)
    at = row * H + head
    # always true, but the compiler cannot tell: keys live across a loop cost 128 registers a thread
    key_there = key_there & (key < tl.where(first_place < end, 2147483647, 0))
    key_at = key_row * stride_row + (H + head) * D
    k = load_rows(qkv_ptr, key_at, key_there, D, BLOCK_D)
    v = load_rows(qkv_ptr, key_at + H * D, key_there, D, BLOCK_D)
    q = load_rows(qkv_ptr, row * stride_row + head * D, there, D, BLOCK_D)
    dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + at, mask=there, other=0.0)
    else:
        out = load_rows(out_ptr, at * D, there, D, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    dropped, d_scores = gradient_tile(
        q,
        k,
        v,
        dout,
        load_lse(lse_ptr, at, there),
        delta,
        visible_pairs(place, key, key_there, Q, causal),
        philox_ptr,
        head,
        row,
        c0,
        scale,
        keep_scale,
        THRESHOLD,
        PRECISION,
    )
    if FRESH:
        dv = tl.dot(tl.trans(dropped), dout, input_precision=PRECISION)
        dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION)
    else:
        dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(d_scores), q, dk, input_precision=PRECISION)
    if STORE_DQ:
        dq = tl.dot(d_scores, k, input_precision=PRECISION) * scale
        store_rows(dqkv_ptr, (row * 3 * H + head) * D, dq, there, D, BLOCK_D)
    return dk, dv


@triton.jit
def _unit_gradients(
    block,
    text_row,
    first_row,
    first_key,
    end,
    kind,
    begin,
    stop,
    key_tile,
    first_head,
    qkv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    kinds_ptr,
    order_ptr,
    philox_ptr,
    dqkv_ptr,
    N,
    Q,
    stride_row,
    scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    READER_M: tl.constexpr,
    HEADS: tl.constexpr,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    HAS_READERS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of a unit's keys, and with SINGLE of its rows' queries.

    HAS_READERS: texts `begin` to `stop` of `order`, where causal, see the unit's queries.
    """
    # for a text's dq the single tile includes its block's queries; dropout needs a multiple of 4
    if SINGLE:
        c0 = first_key // 4 * 4
    else:
        first_key = first_row
        c0 = first_row // 4 * 4 + key_tile * BLOCK_N
    if (first_row < end) & (c0 < end):
        key = c0 + tl.arange(0, BLOCK_N)
        key_there = (key >= first_key) & (key < end)
        key_row = row_of(key, block, text_row, Q)
        # without causal texts only a unit's own rows see its keys: dk and dv need not live across a
        # second loop, which would cost 64 registers a thread
        causal = kind == 2 if HAS_CAUSAL else False
        for h in tl.range(0, HEADS):
            head = first_head + h
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            rows_begin = first_row
            if HAS_CAUSAL and not SINGLE:
                rows_begin = tl.where(causal, tl.maximum(first_row, c0), first_row)
            row_tiles = 1 if WHOLE else tl.cdiv(end - rows_begin, BLOCK_M)
            for tile in tl.range(0, row_tiles):
                dk, dv = _add_rows(
                    dk,
                    dv,
                    key,
                    key_row,
                    key_there,
                    c0,
                    rows_begin + tile * BLOCK_M,
                    end,
                    causal,
                    block,
                    text_row,
                    qkv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    delta_ptr,
                    philox_ptr,
                    dqkv_ptr,
                    head,
                    Q,
                    stride_row,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_D,
                    WHOLE,
                    SINGLE,
                    not SINGLE,
                    THRESHOLD,
                    PRECISION,
                )
            # texts that see the block's queries; a BIDIRECTIONAL text is part of the block's rows
            if HAS_READERS:
                for i in tl.range(begin, stop):
                    reader = tl.load(order_ptr + i)
                    reader_row, length = find_text(reader, cu_seqlens_ptr, N * Q)
                    length = tl.where(tl.load(kinds_ptr + reader) == 2, length, 0)
                    for first_place in tl.range(Q, Q + length, READER_M):
                        dk, dv = _add_rows(
                            dk,
                            dv,
                            key,
                            key_row,
                            key_there & (key < Q),
                            c0,
                            first_place,
                            Q + length,
                            False,
                            block,
                            reader_row,
                            qkv_ptr,
                            dout_ptr,
                            out_ptr,
                            lse_ptr,
                            delta_ptr,
                            philox_ptr,
                            dqkv_ptr,
                            head,
                            Q,
                            stride_row,
                            scale,
                            keep_scale,
                            H,
                            D,
                            READER_M,
                            BLOCK_D,
                            False,
                            False,
                            not SINGLE,
                            THRESHOLD,
                            PRECISION,
                        )
            owned = key_there & (key >= first_row)
            dk_at = (key_row * 3 * H + H + head) * D
            store_rows(dqkv_ptr, dk_at, dk * scale, owned, D, BLOCK_D)
            store_rows(dqkv_ptr, dk_at + H * D, dv, owned, D, BLOCK_D)


@triton.jit(do_not_specialize=["N", "Q", "key_tiles"])
def _qformer_attention_bwd_kernel(
    qkv_ptr,
    dout_ptr,  # [R, H, D]
    out_ptr,  # [R, H, D], read if SINGLE
    lse_ptr,  # [R, H]
    delta_ptr,  # [R, H], read unless SINGLE
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    order_ptr,
    offsets_ptr,
    philox_ptr,
    dqkv_ptr,  # [R, 3, H, D]; dq written if SINGLE
    N,
    Q,
    key_tiles,  # of a unit
    stride_row,
    scale,
    keep_scale,  # 1 / (1 - p)
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    READER_M: tl.constexpr,
    HEADS: tl.constexpr,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIDIRECTIONAL: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    JOINED: tl.constexpr,  # 0, or the rows and keys of the tile of a UNIMODAL text
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    first_head = program % (H // HEADS) * HEADS
    key_tile = program // (H // HEADS) % key_tiles
    unit = program // (H // HEADS) // key_tiles
    # a unit owns its rows as keys
    block, text_row, first_row, first_key, end, kind = find_unit(
        unit,
        cu_seqlens_ptr,
        kinds_ptr,
        blocks_ptr,
        block_text_ptr,
        order_ptr,
        offsets_ptr,
        N,
        Q,
        HAS_BIDIRECTIONAL,
        JOINED > 0,
    )
    begin, stop = 0, 0
    if HAS_CAUSAL:
        has_queries = (unit < N) & (key_tile * BLOCK_N < Q)
        begin = tl.load(offsets_ptr + unit, mask=has_queries, other=0)
        stop = tl.load(offsets_ptr + unit + 1, mask=has_queries, other=0)
    if JOINED > 0:
        begin += 1
        if kind == 0:
            _unit_gradients(
                block,
                text_row,
                first_row,
                first_key,
                end,
                kind,
                begin,
                stop,
                key_tile,
                first_head,
                qkv_ptr,
                dout_ptr,
                out_ptr,
                lse_ptr,
                delta_ptr,
                cu_seqlens_ptr,
                kinds_ptr,
                order_ptr,
                philox_ptr,
                dqkv_ptr,
                N,
                Q,
                stride_row,
                scale,
                keep_scale,
                H,
                D,
                JOINED,
                JOINED,
                BLOCK_D,
                READER_M,
                HEADS,
                True,
                True,
                False,
                False,
                THRESHOLD,
                PRECISION,
            )
        else:
            _unit_gradients(
                block,
                text_row,
                first_row,
                first_key,
                end,
                kind,
                begin,
                stop,
                key_tile,
                first_head,
                qkv_ptr,
                dout_ptr,
                out_ptr,
                lse_ptr,
                delta_ptr,
                cu_seqlens_ptr,
                kinds_ptr,
                order_ptr,
                philox_ptr,
                dqkv_ptr,
                N,
                Q,
                stride_row,
                scale,
                keep_scale,
                H,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                READER_M,
                HEADS,
                SINGLE,
                WHOLE,
                HAS_CAUSAL,
                HAS_CAUSAL,
                THRESHOLD,
                PRECISION,
            )
    else:
        _unit_gradients(
            block,
            text_row,
            first_row,
            first_key,
            end,
            kind,
            begin,
            stop,
            key_tile,
            first_head,
            qkv_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            delta_ptr,
            cu_seqlens_ptr,
            kinds_ptr,
            order_ptr,
            philox_ptr,
            dqkv_ptr,
            N,
            Q,
            stride_row,
            scale,
            keep_scale,
            H,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            READER_M,
            HEADS,
            SINGLE,
            WHOLE,
            HAS_CAUSAL,
            HAS_CAUSAL,
            THRESHOLD,
            PRECISION,
        )


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
        qkv, layout, scale, dropout_p, philox: As passed to `self_forward`.
        out, lse: As returned by it.
        tiles: Override those of `config.py`.
    """
    R, _, H, _ = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    units = layout.num_blocks + layout.num_texts
    if R == 0 or units == 0:
        return dqkv
    qkv, dout, out, lse = dense_heads(qkv), dout.contiguous(), out.contiguous(), lse.contiguous()
    rows, _ = self_sizes(layout)
    tiles = tiles or self_backward_tiles(layout, qkv)
    segments = (layout.cu_seqlens, layout.kinds, layout.blocks, layout.block_text)
    readers = (layout.order, layout.offsets)
    counts = (layout.num_blocks, layout.num_queries)
    factors = (qkv.stride(0), scale, 1.0 / (1.0 - dropout_p))
    options = constants(qkv, tiles, dropout_p, philox)
    options["HAS_BIDIRECTIONAL"] = layout.has_bidirectional
    key_tiles = 1 if tiles.single else triton.cdiv(rows + 3, tiles.block_n)
    delta = None if tiles.single else torch.empty_like(lse)
    with torch.cuda.device_of(qkv):
        if not tiles.single:
            row_tiles = triton.cdiv(rows, tiles.block_m)
            _qformer_attention_bwd_dq_kernel[(units * row_tiles * H,)](
                *(qkv, dout, out, lse, delta, *segments, philox, dqkv),
                *(*counts, row_tiles, *factors),
                **{name: value for name, value in options.items() if name != "HEADS"},
            )
        _qformer_attention_bwd_kernel[(units * key_tiles * (H // tiles.heads),)](
            *(qkv, dout, out, lse, delta, *segments, *readers, philox, dqkv),
            *(*counts, key_tiles, *factors),
            READER_M=min(tiles.block_m, tiles.reader_m),
            SINGLE=tiles.single,
            WHOLE=tiles.single and rows <= tiles.block_m,
            # without causal texts fewer sums are held in registers
            HAS_CAUSAL=has_causal(layout),
            JOINED=joined_tile(layout, tiles),
            **options,
        )
    return dqkv
