"""Cross-attention of the backend `sdpa` on a CPU, grouped by image.

All blocks that read an image are folded into the rows of one problem, which reads its keys and
values once and sums their gradient. Control flow reads index tensors; on a CPU that needs no sync.

Shapes: N query blocks, Q queries, B images, S image tokens, H heads, D head width; m images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip2fast.kernels.precision import wide_dtype
from blip2fast.kernels.qformer_attention.cpu.core import (
    CHUNK_ELEMENTS,
    WIDEN_BELOW_KEYS,
    WORTH_A_CALL_FLOP,
    Dropout,
    Ints,
    attend,
    attend_backward,
    even_pieces,
    is_explicit,
    pick,
    put,
    run_of,
)
from blip2fast.kernels.qformer_attention.layout import KVIndex


@dataclass(frozen=True)
class _Uses:
    """Images with the same number of readers, and the blocks that read them.

    Attributes:
        images: `[m]`.
        blocks: `[m, uses]`.
    """

    images: Ints
    blocks: Ints


def _uses(
    index: KVIndex | None, kv: Tensor, flop_per_use: float, converted: bool = False
) -> Iterator[_Uses]:
    """Every block once, in pieces large enough to be worth a call.

    Args:
        converted: Whether the keys and values of a piece are copied to another dtype.
    """
    if index is None:
        images = np.arange(kv.shape[0])
        groups = [_Uses(images, images[:, None])]
    else:
        offsets = index.offsets.numpy().astype(np.int64)
        order, counts = index.order.numpy().astype(np.int64), np.diff(offsets)
        groups = []
        for count in np.unique(counts[counts > 0]):
            images = np.flatnonzero(counts == count)
            groups.append(_Uses(images, order[offsets[images, None] + np.arange(count)]))
    threads = torch.get_num_threads()
    for group in groups:
        uses = group.blocks.shape[1]
        most = max(1, CHUNK_ELEMENTS * threads // max(kv[0].numel(), 1))
        if index is None and not converted:
            most = len(group.images)
        elif run_of(group.images) is None and flop_per_use * uses > WORTH_A_CALL_FLOP * threads:
            # one at a time, which needs no copy
            most = 1
        for chosen in even_pieces(len(group.images), most):
            yield _Uses(group.images[chosen], group.blocks[chosen])


def _fold(x: Tensor, blocks: Ints) -> Tensor:
    """`[m, uses * Q, ...]`: the rows of each image's blocks; `x` `[N or 1, Q, ...]`."""
    m, uses = blocks.shape
    shared = x.shape[0] == 1
    x = x.expand(m * uses, *x.shape[1:]) if shared else pick(x, blocks)
    return x if uses == 1 else x.unflatten(0, (m, uses)).flatten(1, 2)


def _unfold(x: Tensor, blocks: Ints, values: Tensor) -> None:
    """`x[blocks] = values`, the inverse of `_fold`."""
    put(x, blocks, values.reshape(-1, *x.shape[1:]))


def _is_all(uses: _Uses, num_blocks: int) -> bool:
    """Whether these are all blocks in order, so that results need no scatter."""
    return uses.blocks.shape == (num_blocks, 1) and run_of(uses.blocks) is not None


def _key_bias(key_mask: Tensor | None, uses: _Uses) -> tuple[Tensor | None, Tensor | None]:
    """The additive key mask, and which images `[m]` are fully masked; None if nothing is masked."""
    if key_mask is None:
        return None, None
    visible = pick(key_mask, uses.images)
    if visible.all():
        return None, None
    blind = ~visible.any(1)
    # a fully masked image is computed like any other, and its results are then replaced
    bias = torch.zeros(visible.shape).masked_fill_(~(visible | blind[:, None]), -torch.inf)
    return bias[:, None, None], blind[:, None, None]


def _dropout(philox: Tensor | None, p: float, uses: _Uses, Q: int) -> Dropout | None:
    if philox is None or p == 0:
        return None
    rows = (uses.blocks[..., None] * Q + np.arange(Q)).reshape(len(uses.blocks), -1)
    return Dropout(philox, p, torch.from_numpy(rows))


def cross_forward(
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    num_blocks: int,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out [N, Q, H, D], lse [N, Q, H])` from `q` `[N or 1, Q, H, D]`, `kv` `[B, S, 2, H, D]`."""
    _, Q, H, D = q.shape
    S = kv.shape[1]
    out = q.new_empty(num_blocks, Q, H, D)
    lse = q.new_empty((num_blocks, Q, H), dtype=wide_dtype(q.dtype))
    if out.numel() == 0 or S == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    explicit = is_explicit(Q, kv[:, :, 0], dropout_p > 0)
    for uses in _uses(index, kv, 4.0 * Q * S * H * D, explicit):
        k, v = pick(kv, uses.images).unbind(2)
        bias, blind = _key_bias(key_mask, uses)
        dropout = _dropout(philox, dropout_p, uses, Q)
        output, statistics = attend(_fold(q, uses.blocks), k, v, bias, scale, dropout)
        if blind is not None:
            output = output.masked_fill(blind[..., None], 0)
            statistics = statistics.masked_fill(blind, -torch.inf)
        if _is_all(uses, num_blocks):
            return output.to(q.dtype).contiguous(), statistics.contiguous()
        _unfold(out, uses.blocks, output)
        _unfold(lse, uses.blocks, statistics)
    return out, lse


def cross_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(dq, dkv [B, S, 2, H, D])`, `dq` of the shape of `q`."""
    N, Q, H, D = out.shape
    S = kv.shape[1]
    # an image that no block reads gets a zero gradient
    all_read = index is None or bool((index.offsets.diff() > 0).all())
    dkv = kv.new_empty(kv.shape) if all_read and out.numel() and S else kv.new_zeros(kv.shape)
    shared = q.shape[0] == 1 and N != 1
    if out.numel() == 0 or S == 0:
        return q.new_zeros(q.shape), dkv
    # the gradient of shared queries is summed before rounding
    dq = q.new_zeros(q.shape, dtype=lse.dtype) if shared else q.new_empty(q.shape)
    converted = is_explicit(Q, kv[:, :, 0], dropout_p > 0) or S < WIDEN_BELOW_KEYS
    for uses in _uses(index, kv, 4.0 * Q * S * H * D, converted):
        k, v = pick(kv, uses.images).unbind(2)
        bias, blind = _key_bias(key_mask, uses)
        d_output, statistics = _fold(dout, uses.blocks), _fold(lse, uses.blocks)
        if blind is not None:
            d_output = d_output.masked_fill(blind[..., None], 0)
            # no weights: without an lse of their own they could overflow
            statistics = statistics.masked_fill(blind, torch.inf)
        grads = attend_backward(
            d_output,
            _fold(q, uses.blocks),
            k,
            v,
            _fold(out, uses.blocks),
            statistics,
            bias,
            scale,
            _dropout(philox, dropout_p, uses, Q),
        )
        if shared:
            dq += grads[0].unflatten(1, (-1, Q)).sum((0, 1), dtype=dq.dtype)
        elif _is_all(uses, N):
            dq = grads[0].contiguous()
        else:
            _unfold(dq, uses.blocks, grads[0])
        put(dkv[:, :, 0], uses.images, grads[1])
        put(dkv[:, :, 1], uses.images, grads[2])
    return dq.to(q.dtype), dkv
