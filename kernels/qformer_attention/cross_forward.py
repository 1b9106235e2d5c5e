"""Attention of query blocks to image tokens in Triton, forward.

A program processes a chunk of the rows that read one image (`uses.py`), so an image shared by
several blocks is read from memory about once. With few rows and many keys, the keys are split among
programs, and a second kernel combines the parts in order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.launch import FP_FUSION, dense_width
from blip2fast.kernels.qformer_attention.config import (
    COMBINE_ROWS,
    CrossTiles,
    cross_forward_tiles,
    splits,
)
from blip2fast.kernels.qformer_attention.forward import constants
from blip2fast.kernels.qformer_attention.layout import KVIndex
from blip2fast.kernels.qformer_attention.tiles import (
    base_2_scores,
    load_rows,
    softmax_end,
    softmax_step,
    store_rows,
)
from blip2fast.kernels.qformer_attention.uses import find_chunk, load_keys, place_rows


@triton.jit(do_not_specialize=["N", "B", "Q", "S", "tiles_of_split"])
def _qformer_cross_attention_fwd_kernel(
    q_ptr,
    kv_ptr,
    index_ptr,
    order_ptr,
    offsets_ptr,
    key_mask_ptr,
    philox_ptr,
    out_ptr,  # [N, Q, H, D], with SPLIT [splits, N, Q, H, D]
    lse_ptr,  # the same without D
    N,
    B,
    Q,
    S,
    tiles_of_split,
    stride_q_block,
    stride_q_query,
    stride_q_head,
    stride_image,
    stride_token,
    stride_kv,
    stride_head,
    scale,
    keep_scale,  # 1 / (1 - p)
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    split = tl.program_id(1)
    first_head = program % (H // HEADS) * HEADS
    image, first, end = find_chunk(
        program // (H // HEADS),
        index_ptr,
        order_ptr,
        offsets_ptr,
        B,
        N,
        Q,
        BLOCK_M,
        HAS_INDEX,
        INTERLEAVED,
    )
    if first >= end:
        return
    there, block, query, row = place_rows(first, end, order_ptr, Q, BLOCK_M, HAS_INDEX)
    first_tile = split * tiles_of_split
    if SPLIT:
        end_tile = tl.minimum(first_tile + tiles_of_split, tl.cdiv(S, BLOCK_N))
    else:
        end_tile = S // BLOCK_N
    for h in tl.range(0, HEADS):
        head = first_head + h
        q_at = block * stride_q_block + query * stride_q_query + head * stride_q_head
        q = load_rows(q_ptr, q_at, there, D, BLOCK_D)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if FULL:
            for tile in tl.range(first_tile, end_tile):
                k, v, key_there = load_keys(
                    kv_ptr,
                    key_mask_ptr,
                    image,
                    tile * BLOCK_N,
                    head,
                    S,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    D,
                    BLOCK_N,
                    BLOCK_D,
                    HAS_MASK,
                    not SPLIT,
                )
                top, total, mixed = softmax_step(
                    base_2_scores(q, k, key_there[None, :], scale, PRECISION),
                    v,
                    top,
                    total,
                    mixed,
                    philox_ptr,
                    head,
                    row,
                    tile * BLOCK_N,
                    False,
                    THRESHOLD,
                    PRECISION,
                )
        if TAIL > 0:
            k, v, key_there = load_keys(
                kv_ptr,
                key_mask_ptr,
                image,
                end_tile * BLOCK_N,
                head,
                S,
                stride_image,
                stride_token,
                stride_kv,
                stride_head,
                D,
                TAIL,
                BLOCK_D,
                HAS_MASK,
                False,
            )
            top, total, mixed = softmax_step(
                base_2_scores(q, k, key_there[None, :], scale, PRECISION),
                v,
                top,
                total,
                mixed,
                philox_ptr,
                head,
                row,
                end_tile * BLOCK_N,
                not FULL,
                THRESHOLD,
                PRECISION,
            )
        out, lse = softmax_end(top, total, mixed, keep_scale)
        at = (split.to(tl.int64) * N * Q + row) * H + head
        store_rows(out_ptr, at * D, out, there, D, BLOCK_D)
        tl.store(lse_ptr + at, lse, mask=there)


@triton.jit(do_not_specialize=["rows", "count"])
def _qformer_cross_attention_fwd_combine_kernel(
    part_ptr,  # [count, rows, D]
    part_lse_ptr,  # [count, rows]
    out_ptr,  # [rows, D]
    lse_ptr,  # [rows]
    rows,
    count,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = row
    for _ in tl.range(0, count):
        lse = tl.load(part_lse_ptr + at, mask=there, other=float("-inf")) * 1.4426950408889634
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp2(top - shift), tl.exp2(lse - shift)
        part = load_rows(part_ptr, at * D, there, D, BLOCK_D)
        mixed = mixed * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
        at += rows
    out, lse = softmax_end(top, total, mixed, 1.0)
    store_rows(out_ptr, row * D, out, there, D, BLOCK_D)
    tl.store(lse_ptr + row, lse, mask=there)


def cross_forward(
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    num_blocks: int,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tiles: CrossTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks to image tokens.

    Args:
        q: `[N, Q, H, D]` or `[1, Q, H, D]`, fp16, bf16 or fp32, on a GPU.
        kv: `[B, S, 2, H, D]`, any strides with D contiguous.
        index: The image that each block reads; None: block i reads image i.
        key_mask: `[B, S]` bool, or None.
        num_blocks: N.
        scale: Factor of the scores.
        dropout_p, philox: Of the dropout mask; None: no dropout.
        tiles: Override those of `config.py`.

    Returns:
        `(out [N, Q, H, D], lse [N, Q, H])`, the lse in fp32.
    """
    _, Q, H, D = q.shape
    B, S = kv.shape[:2]
    N = num_blocks
    tiles = tiles or cross_forward_tiles(q, kv, N)
    out = q.new_empty(N, Q, H, D)
    lse = q.new_empty(N, Q, H, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if S == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    programs = chunks(N, B, Q, tiles.block_m, index) * (H // tiles.heads)
    count, tiles_of_split = splits(programs, triton.cdiv(S, tiles.block_n), tiles.full)
    to_out, to_lse = out, lse
    if count > 1:
        to_out = q.new_empty(count, N, Q, H, D, dtype=torch.float32)
        to_lse = q.new_empty(count, N, Q, H, dtype=torch.float32)
    q, kv = dense_width(q), dense_width(kv)
    with torch.cuda.device_of(q):
        _qformer_cross_attention_fwd_kernel[(programs, count)](
            q,
            kv,
            *unpack(index, key_mask),
            philox,
            to_out,
            to_lse,
            N,
            B,
            Q,
            S,
            tiles_of_split,
            *query_strides(q, N),
            *key_strides(kv),
            scale,
            1.0 / (1.0 - dropout_p),
            FULL=tiles.full,
            TAIL=0 if count > 1 else tiles.tail,
            SPLIT=count > 1,
            INTERLEAVED=tiles.interleaved,
            HAS_INDEX=index is not None,
            HAS_MASK=key_mask is not None,
            **constants(q, tiles, dropout_p, philox),
        )
        if count > 1:
            rows = N * Q * H
            _qformer_cross_attention_fwd_combine_kernel[(triton.cdiv(rows, COMBINE_ROWS),)](
                to_out,
                to_lse,
                out,
                lse,
                rows,
                count,
                D=D,
                BLOCK_M=COMBINE_ROWS,
                BLOCK_D=tiles.block_d,
                num_warps=4,
                enable_fp_fusion=FP_FUSION,
            )
    return out, lse


def chunks(N: int, B: int, Q: int, block_m: int, index: KVIndex | None) -> int:
    """Number of chunks of `uses.find_chunk`, empty ones included."""
    return N * triton.cdiv(Q, block_m) if index is None else B + triton.cdiv(N * Q, block_m)


def unpack(index: KVIndex | None, key_mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """Index, order, offsets and the mask in 32 bits.

    Triton 3.6 chooses the layout of a product's operands by the narrowest type loaded anywhere
    before them. With dropout, a byte mask gave wrong products of 16 and 32 keys on an H200.
    """
    uses = (None, None, None) if index is None else (index.index, index.order, index.offsets)
    return (*uses, None if key_mask is None else key_mask.to(torch.int32).contiguous())


def query_strides(q: Tensor, N: int) -> tuple[int, int, int]:
    """Strides of block, query and head; the block stride of shared queries is 0."""
    return (q.stride(0) if q.shape[0] == N else 0), q.stride(1), q.stride(2)


def key_strides(kv: Tensor) -> tuple[int, int, int, int]:
    """Strides of image, token, keys to values, and head."""
    return kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3)
