"""Triton functions that find the rows and keys of an image in cross-attention.

The rows of all blocks that read an image are numbered consecutively from `offsets[image] * Q`, in
the order of `order`, so that one load of an image's keys serves them all. Shapes: N blocks,
B images, Q queries, S image tokens.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from blip2fast.kernels.qformer_attention.tiles import gradient_tile, load_rows, store_rows


@triton.jit
def rows_of_image(image, offsets_ptr, Q, HAS_INDEX: tl.constexpr):
    """Start and end of an image's rows; without an index, block i reads image i."""
    if HAS_INDEX:
        first = tl.load(offsets_ptr + image) * Q
        end = tl.load(offsets_ptr + image + 1) * Q
    else:
        first = image * Q
        end = first + Q
    return first, end


@triton.jit
def find_chunk(
    chunk,
    index_ptr,
    order_ptr,
    offsets_ptr,
    B,
    N,
    Q,
    BLOCK_M: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The image and rows of a chunk: `(image, first, end of the image's rows)`.

    Chunks 0..B-1 are the first BLOCK_M rows of each image. At most one further chunk starts in any
    window of BLOCK_M rows, because chunks of an image are that far apart and an image's first chunk
    is not among them: chunk B + j is the one that starts in window j, and is empty if none does.
    With INTERLEAVED, images and windows alternate in proportion to their numbers.
    """
    if HAS_INDEX:
        own = chunk < B
        first_of, window = chunk, chunk - B
        if INTERLEAVED:
            count = B + tl.cdiv(N * Q, BLOCK_M)
            first_of = (chunk.to(tl.int64) * B // count).to(tl.int32)
            own = ((chunk + 1).to(tl.int64) * B // count).to(tl.int32) > first_of
            window = chunk - first_of
        row = window * BLOCK_M + tl.arange(0, BLOCK_M)
        there = (row >= 0) & (row < N * Q)
        block = tl.load(order_ptr + row // Q, mask=there, other=0)
        read = tl.load(index_ptr + block, mask=there, other=0)
        start = tl.load(offsets_ptr + read, mask=there, other=0) * Q
        starts_here = there & (row > start) & ((row - start) % BLOCK_M == 0)
        first = tl.max(tl.where(starts_here, row, -1), 0)
        image = tl.max(tl.where(starts_here, read, -1), 0)
        image = tl.where(own, first_of, image)
        some = image >= 0
        first = tl.where(own, tl.load(offsets_ptr + first_of, mask=own, other=0) * Q, first)
        end = tl.load(offsets_ptr + image + 1, mask=some, other=0) * Q
        image, first = tl.where(some, image, 0), tl.where(some, first, 0)
    else:
        chunks = tl.cdiv(Q, BLOCK_M)
        image = chunk // chunks
        first = image * Q + chunk % chunks * BLOCK_M
        end = image * Q + Q
    return image, first, end


@triton.jit
def place_rows(first, end, order_ptr, Q, BLOCK_M: tl.constexpr, HAS_INDEX: tl.constexpr):
    """BLOCK_M rows: which are valid, their block, query, and `block * Q + query`, all int64."""
    position = first + tl.arange(0, BLOCK_M)
    there = position < end
    block = position // Q
    query = position % Q
    if HAS_INDEX:
        block = tl.load(order_ptr + block, mask=there, other=0)
    block, query = block.to(tl.int64), query.to(tl.int64)
    return there, block, query, block * Q + query


@triton.jit
def load_keys(
    kv_ptr,
    key_mask_ptr,
    image,
    first_key,
    head,
    S,
    stride_image,
    stride_token,
    stride_kv,
    stride_head,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Keys and values of an image's tokens, [BLOCK_N, BLOCK_D] each, and which are visible.

    With `BOUNDED` no token is out of range.
    """
    key = first_key + tl.arange(0, BLOCK_N)
    there = tl.full([BLOCK_N], True, tl.int1)
    if not BOUNDED:
        there = key < S
    if HAS_MASK:
        real = tl.load(key_mask_ptr + image.to(tl.int64) * S + key, mask=there, other=0)
        there = there & (real != 0)
    at = image.to(tl.int64) * stride_image + key.to(tl.int64) * stride_token
    at += head.to(tl.int64) * stride_head
    k = load_rows(kv_ptr, at, there, D, BLOCK_D)
    v = load_rows(kv_ptr, at + stride_kv, there, D, BLOCK_D)
    return k, v, there


@triton.jit
def store_key_gradients(
    dkv_ptr,
    image,
    first_key,
    head,
    S,
    dk,
    dv,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store dk and dv [BLOCK_N, BLOCK_D] of an image's tokens to dkv [B, S, 2, H, D]."""
    key = first_key + tl.arange(0, dk.shape[0])
    at = ((image.to(tl.int64) * S + key) * 2 * H + head) * D
    store_rows(dkv_ptr, at, dk, key < S, D, BLOCK_D)
    store_rows(dkv_ptr, at + H * D, dv, key < S, D, BLOCK_D)


@triton.jit
def gradients_of_keys(
    q,
    dout,
    lse,
    delta,
    dq,
    row,
    kv_ptr,
    key_mask_ptr,
    philox_ptr,
    dkv_ptr,
    image,
    first_key,
    head,
    S,
    stride_image,
    stride_token,
    stride_kv,
    stride_head,
    scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOUNDED: tl.constexpr,
    STORE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add this tile of keys to dq (without its scale); with STORE, also write their dk and dv."""
    k, v, key_there = load_keys(
        kv_ptr,
        key_mask_ptr,
        image,
        first_key,
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
        BOUNDED,
    )
    dropped, d_scores = gradient_tile(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        key_there[None, :],
        philox_ptr,
        head,
        row,
        first_key,
        scale,
        keep_scale,
        THRESHOLD,
        PRECISION,
    )
    if STORE:
        dv = tl.dot(tl.trans(dropped), dout, input_precision=PRECISION)
        dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION) * scale
        store_key_gradients(dkv_ptr, image, first_key, head, S, dk, dv, H, D, BLOCK_D)
    return tl.dot(d_scores, k, dq, input_precision=PRECISION)
