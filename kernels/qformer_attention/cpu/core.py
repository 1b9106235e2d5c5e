"""Padded attention problems on a CPU, forward and backward.

PyTorch's flash kernel, or explicit weights in cache-sized pieces: with dropout, and in bf16, where
products of a batch with a softmax between them are quicker, and as exact as PyTorch's attention by
such products. Shapes: m problems of L rows and M keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip2fast.kernels.philox import keep_mask
from blip2fast.kernels.precision import wide_dtype

Ints = NDArray[np.int64]

# a call costs about 50 us, and a core does 20 GFLOP/s: measured, torch 2.13, one core
WORTH_A_CALL_FLOP = 4e6
# and where a call is a dozen operators on explicit weights (two cores, 16 to 48 texts, training)
WORTH_EXPLICIT_FLOP = 6.4e7
# elements that one core gathers or converts at once
CHUNK_ELEMENTS = 1 << 21
# PyTorch's backward in 16 bits is slower than in fp32 up to this many keys, and less exact:
# 16 x 12 heads of 64 x 64 took 70 ms in bf16, 21 in fp32 (torch 2.13, one core)
WIDEN_BELOW_KEYS = 128
# explicit weights held at once
_PIECE_ELEMENTS = 1 << 19
# of a problem without dropout: more rows of weights are left to the flash kernel, which holds none
_MOST_WEIGHTS = 1 << 20


class Dropout(NamedTuple):
    """Dropout of padded problems, with their positions in the op's mask.

    Attributes:
        philox: `[2]` int64, seed and offset.
        p: Probability of dropping.
        rows: `[m, L]` int64, mask row of each row.
        first_column: Mask column of key 0.
    """

    philox: Tensor
    p: float
    rows: Tensor
    first_column: int = 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention; every row must see at least one key.

    Args:
        q: `[m, L, H, D]`, any strides with D contiguous, like `k` and `v`.
        k, v: `[m, M, H, D]`.
        bias: Added to the scores: 0 or -inf; broadcasts to `[m, H, L, M]`; or None.
        scale: Factor of the scores.
        dropout: The mask of the weights, or None.

    Returns:
        `(output [m, L, H, D], lse [m, L, H])`, in fp32 or wider if computed that way.
    """
    if is_explicit(q.shape[1], k, dropout is not None):
        q, k, v = _multiplied(q, k, v)
        return _explicit(q, k, v, bias, scale, dropout)
    bias = None if bias is None else bias.to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scale
    )
    return output.transpose(1, 2), lse.transpose(1, 2)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`: `dout` and `out` `[m, L, H, D]`, `lse` `[m, L, H]`.

    Returns:
        `(dq [m, L, H, D], dk [m, M, H, D], dv [m, M, H, D])`.
    """
    if is_explicit(q.shape[1], k, dropout is not None):
        dout, q, k, v = _multiplied(dout, q, k, v)
        return _explicit_backward(dout, q, k, v, bias, scale, dropout)
    if k.shape[1] < WIDEN_BELOW_KEYS:
        dout, q, k, v, out = _widen(dout, q, k, v, out)
    bias = None if bias is None else bias.to(q.dtype)
    dout, q, k, v, out, lse = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def is_explicit(rows: int, kv: Tensor, dropout: bool) -> bool:
    """Whether problems of `rows` rows on keys or values `[m, M, H, D]` get explicit weights."""
    weights = rows * kv.shape[1] * kv.shape[2]
    return dropout or (multiplies_bf16(kv) and weights <= _MOST_WEIGHTS)


def multiplies_bf16(x: Tensor) -> bool:
    """Whether products of `x` with its like run in bf16, with sums in fp32."""
    return x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _multiplied(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of the products of explicit weights."""
    return list(tensors) if multiplies_bf16(tensors[0]) else _widen(*tensors)


def _widen(*tensors: Tensor) -> list[Tensor]:
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors]


def _pieces(m: int, L: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Slices of problems and of rows with about `_PIECE_ELEMENTS` weights; a row has `width`."""
    fit = max(1, _PIECE_ELEMENTS // max(width, 1))  # rows
    problems, rows = max(1, fit // max(L, 1)), min(L, fit)
    for first in range(0, m, problems):
        for start in range(0, L, max(rows, 1)):
            yield slice(first, first + problems), slice(start, start + rows)


def _by_head(x: Tensor) -> Tensor:
    """`[m, L, H, D]` to `[m * H, L, D]`, contiguous: products of a batch are twice as quick."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def _by_problem(x: Tensor, heads: int) -> Tensor:
    """`[m * H, L, D]` to `[m, L, H, D]`."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def _weights_kept(dropout: Dropout, piece: tuple[slice, slice], heads: int, M: int) -> Tensor:
    """`[m * H, L, M]` bool of a piece."""
    rows = dropout.rows[piece][:, None, :]
    head = torch.arange(heads)[:, None]
    return keep_mask(dropout.philox, dropout.p, rows, head, M, dropout.first_column).flatten(0, 1)


def _bias_of(bias: Tensor | None, piece: tuple[slice, slice]) -> Tensor | None:
    if bias is None:
        return None
    problems, rows = piece
    bias = bias[problems] if bias.shape[0] > 1 else bias
    return bias[:, :, rows] if bias.shape[2] > 1 else bias


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * (a @ b)` of a batch, rounded once."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, heads: int) -> Tensor:
    """`[m * H, L, M]` from `q` and `k` `[m * H, ...]`, in fp32 or wider."""
    scores = _product(q, k.transpose(1, 2), scale).to(wide_dtype(q.dtype))
    if bias is not None:
        scores.unflatten(0, (-1, heads)).add_(bias)
    return scores


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    (m, L, H, D), M = q.shape, k.shape[1]
    output, lse = q.new_empty(m, L, H, D), q.new_empty(m, L, H, dtype=wide_dtype(q.dtype))
    for piece in _pieces(m, L, H * M):
        queries, keys, values = _by_head(q[piece]), _by_head(k[piece[0]]), _by_head(v[piece[0]])
        scores = _scores(queries, keys, _bias_of(bias, piece), scale, H)
        weights = torch.softmax(scores, -1)
        # a row's largest weight is exp(its highest score - lse)
        statistics = scores.amax(-1) - weights.amax(-1).log_()
        factor = 1.0
        if dropout is not None:
            weights.mul_(_weights_kept(dropout, piece, H, M))
            factor = 1 / (1 - dropout.p)
        output[piece] = _by_problem(_product(weights.to(q.dtype), values, factor), H)
        lse[piece] = statistics.unflatten(0, (-1, H)).transpose(1, 2)
    return output, lse


def _explicit_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (m, L, H, D), M = q.shape, k.shape[1]
    dq = q.new_empty(m, L, H, D)
    # of a problem in several pieces of rows the gradients are summed before rounding
    summed = L * H * M > _PIECE_ELEMENTS
    dk, dv = (
        k.new_zeros(k.shape, dtype=wide_dtype(k.dtype)) if summed else k.new_empty(k.shape)
        for _ in range(2)
    )
    for piece in _pieces(m, L, H * M):
        queries, keys, values = _by_head(q[piece]), _by_head(k[piece[0]]), _by_head(v[piece[0]])
        d_output = _by_head(dout[piece])
        weights = torch.softmax(_scores(queries, keys, _bias_of(bias, piece), scale, H), -1)
        d_weights = torch.bmm(d_output, values.transpose(1, 2)).to(weights.dtype)
        kept = weights
        factor = 1.0
        if dropout is not None:
            mask = _weights_kept(dropout, piece, H, M)
            kept = weights * mask
            factor = 1 / (1 - dropout.p)
            d_weights.mul_(mask).mul_(factor)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(q.dtype)
        dq[piece] = _by_problem(_product(d_scores, keys, scale), H)
        of_keys = _by_problem(_product(d_scores.transpose(1, 2), queries, scale), H)
        of_values = _by_problem(_product(kept.to(q.dtype).transpose(1, 2), d_output, factor), H)
        if summed:
            dk[piece[0]] += of_keys
            dv[piece[0]] += of_values
        else:
            dk[piece[0]], dv[piece[0]] = of_keys, of_values
    return dq, dk, dv


def even_pieces(count: int, most: int) -> Iterator[slice]:
    """Split `count` items into the fewest slices of at most `most`, of about equal size."""
    pieces = -(-count // max(1, most))
    for piece in range(pieces):
        yield slice(piece * count // pieces, (piece + 1) * count // pieces)


def run_of(indices: Ints) -> slice | None:
    """The slice equivalent to `indices` if they are consecutive, or None."""
    flat = indices.ravel()
    first, last = int(flat[0]), int(flat[-1])
    if last - first == len(flat) - 1 and (flat[1:] - flat[:-1] == 1).all():
        return slice(first, last + 1)
    return None


def pick(x: Tensor, indices: Ints) -> Tensor:
    """`x[indices.ravel()]`; a view if the indices are consecutive."""
    run = run_of(indices)
    return x.index_select(0, torch.from_numpy(indices.ravel())) if run is None else x[run]


def put(x: Tensor, indices: Ints, values: Tensor) -> None:
    """`x[indices.ravel()] = values`; one copy if the indices are consecutive."""
    run = run_of(indices)
    if run is None:
        x[torch.from_numpy(indices.ravel())] = values.to(x.dtype)
    else:
        x[run] = values
