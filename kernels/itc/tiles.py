"""Triton functions shared by the sweep and its gradient, for one tile of pairs.

A tile is BLOCK_T texts by BLOCK_I images. Queries are on the column axis of the product, padded
to BLOCK_Q, so that the maximum over an image's queries stays within a thread and its neighbours.
Offsets into data are int64.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_texts(text_ptr, j, d0, N, stride_text, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features d0.. of texts j: [BLOCK_T, BLOCK_D], 0 outside."""
    d = d0 + tl.arange(0, BLOCK_D)
    at = j.to(tl.int64)[:, None] * stride_text + d[None, :]
    return tl.load(text_ptr + at, mask=(j < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_images(
    image_ptr,
    first,
    d0,
    M,
    stride_image,
    stride_query,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features d0.. of the queries of images first..: [BLOCK_I * BLOCK_Q, BLOCK_D], 0 outside."""
    c = tl.arange(0, BLOCK_I * BLOCK_Q)
    i, q = first + c // BLOCK_Q, c % BLOCK_Q
    d = d0 + tl.arange(0, BLOCK_D)
    at = i.to(tl.int64) * stride_image + q.to(tl.int64) * stride_query
    there = (i < M) & (q < Q)
    return tl.load(
        image_ptr + at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def similarity_tile(
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
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of texts j with every query of images first..: [BLOCK_T, BLOCK_I, BLOCK_Q].

    `texts` and `images` are the features if D fits BLOCK_D, and are ignored otherwise.
    Padded queries are -inf.
    """
    if D > BLOCK_D:
        products = tl.zeros([BLOCK_T, BLOCK_I * BLOCK_Q], tl.float32)
        for d0 in tl.range(0, D, BLOCK_D):
            a = load_texts(text_ptr, j, d0, N, stride_text, D, BLOCK_D)
            b = load_images(
                image_ptr, first, d0, M, stride_image, stride_query, Q, D, BLOCK_I, BLOCK_Q, BLOCK_D
            )
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    else:
        products = tl.dot(texts, tl.trans(images), input_precision=PRECISION)
    by_query = tl.reshape(products, [BLOCK_T, BLOCK_I, BLOCK_Q])
    if BLOCK_Q > Q:
        real = tl.arange(0, BLOCK_Q) < Q
        by_query = tl.where(real[None, None, :], by_query, float("-inf"))
    return by_query


@triton.jit
def is_positive(i, j, first_row, row_ids_ptr, column_ids_ptr, M, N, HAS_IDS: tl.constexpr):
    """Which pairs of texts j and images i belong together: [BLOCK_T, BLOCK_I]."""
    if HAS_IDS:
        image_id = tl.load(row_ids_ptr + i, mask=i < M, other=0)
        text_id = tl.load(column_ids_ptr + j, mask=j < N, other=0)
        return text_id[:, None] == image_id[None, :]
    return j[:, None] == (i + first_row)[None, :]


@triton.jit
def gumbel(word):
    """`-log(-log(1 - u))` of a 32-bit word as a number u in (0, 1)."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # 1 - u rounds away the small u that decide the argmax: four terms of the series are exact there
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.00390625, series, -tl.log(1.0 - u)))


@triton.jit
def interleave(even, odd, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Interleave the rows of two [BLOCK_T / 2, BLOCK_I] tiles: [BLOCK_T, BLOCK_I]."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), [BLOCK_T, BLOCK_I])


@triton.jit
def pair_noise(philox_ptr, first_text, i, first_row, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Noise of the images' rows and of the texts' columns, each [BLOCK_T, BLOCK_I]."""
    seed, offset = tl.load(philox_ptr), tl.load(philox_ptr + 1)
    group = (first_text // 2 + tl.arange(0, BLOCK_T // 2))[:, None]
    image = (i + first_row)[None, :]
    zero = tl.zeros([BLOCK_T // 2, BLOCK_I], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + group, zero + image, zero + 0x49544300, zero + offset.to(tl.int32), 7
    )
    by_row = gumbel(interleave(w0, w1, BLOCK_T, BLOCK_I))
    return by_row, gumbel(interleave(w2, w3, BLOCK_T, BLOCK_I))
