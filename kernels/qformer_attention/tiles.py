"""Triton functions shared by the attention kernels, for one tile of rows by keys.

Scores are kept in base 2, `scale * log2(e) * q.k`, because a GPU's exponential is `exp2`. Rows and
keys past the end are loaded as 0 and are not visible. Offsets into data are int64.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, offsets, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows [M, BLOCK_D], given the offset of each row [M]; 0 outside."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D > D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offsets, values, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`, rounded to the type stored."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if BLOCK_D > D:
        mask = mask & (d < D)[None, :]
    at = ptr + offsets[:, None] + d[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def kept(philox_ptr, head, rows, first_column, BLOCK_N: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which weights dropout keeps, [M, BLOCK_N]; `first_column` is a multiple of 4."""
    seed, offset = tl.load(philox_ptr), tl.load(philox_ptr + 1)
    groups = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros([rows.shape[0], BLOCK_N // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + groups[None, :],
        zero + rows.to(tl.int32)[:, None],
        zero + head,
        zero + offset.to(tl.int32),
        7,
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [rows.shape[0], BLOCK_N]) >= THRESHOLD


@triton.jit
def base_2_scores(q, k, visible, scale, PRECISION: tl.constexpr):
    """[M, N]; -inf where a row does not see a key."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def softmax_step(
    scores,
    v,
    top,
    total,
    mixed,
    philox_ptr,
    head,
    rows,
    first_column,
    ONLY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax: update the running maximum, sum of weights and weighted sum of values.

    With `ONLY` the tile is the only one, so nothing is rescaled.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row without a visible key so far subtracts 0
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    tile_total = tl.sum(weights, 1)
    if THRESHOLD > 0:
        keep = kept(philox_ptr, head, rows, first_column, scores.shape[1], THRESHOLD)
        weights = tl.where(keep, weights, 0.0)
    weights = weights.to(v.dtype)
    if ONLY:
        total = tile_total
        mixed = tl.dot(weights, v, input_precision=PRECISION)
    else:
        decay = tl.exp2(top - shift)
        total = total * decay + tile_total
        mixed = tl.dot(weights, v, mixed * decay[:, None], input_precision=PRECISION)
    return new_top, total, mixed


@triton.jit
def softmax_end(top, total, mixed, keep_scale):
    """Output [M, BLOCK_D] and natural-log lse [M]; 0 and -inf for a fully masked row."""
    seen = total > 0.0
    some = tl.where(seen, total, 1.0)
    factor = tl.where(seen, keep_scale / some, 0.0)
    lse = tl.where(seen, (top + tl.log2(some)) * 0.6931471805599453, float("-inf"))
    return mixed * factor[:, None], lse


@triton.jit
def load_lse(ptr, offsets, there):
    """The lse in base 2; 0 for a fully masked row, where it has no effect."""
    lse = tl.load(ptr + offsets, mask=there, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)


@triton.jit
def gradient_tile(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    visible,
    philox_ptr,
    head,
    rows,
    first_column,
    scale,
    keep_scale,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights after dropout, and score gradients without the scale factor, [M, N], data's dtype.

    `lse` is in base 2; `delta` is the product of output and its gradient, row by row.
    """
    weights = tl.exp2(base_2_scores(q, k, visible, scale, PRECISION) - lse[:, None])
    d_weights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dropped = weights
    if THRESHOLD > 0:
        keep = kept(philox_ptr, head, rows, first_column, weights.shape[1], THRESHOLD)
        factor = tl.where(keep, keep_scale, 0.0)
        dropped = weights * factor
        d_weights = d_weights * factor
    d_scores = weights * (d_weights - delta[:, None])
    return dropped.to(q.dtype), d_scores.to(q.dtype)
