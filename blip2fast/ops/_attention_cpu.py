"""The backend `sdpa` on a CPU: where rows come from and where results go.

Padding costs what it computes, so texts of like length are padded together, and the uses of an
image are folded into the rows of one problem, which reads its keys and values once. Control flow
looks at index tensors, which on a CPU makes nobody wait.

Shapes: R rows of the token buffer, N query blocks, Q queries, n texts, B images, S image tokens,
H heads, D head width; m problems of L rows and M keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip2fast.masks import MaskKind
from blip2fast.ops._attention_core import Dropout, attend, attend_backward
from blip2fast.ops.attention_layout import KIND_CODES, AttentionLayout, KVIndex, wide_dtype

Ints = NDArray[np.int64]

# a call costs about 50 us, and a core does 20 GFLOP/s: measured, torch 2.13, one core
_WORTH_A_CALL_FLOP = 4e6
_MAX_BUCKETS = 8
# what is gathered or converted at once
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class _Group:
    """m padded problems over the token buffer; their rows are the last L of their M keys.

    Attributes:
        keys: `[m, M]`, rows of the token buffer; None: every block's queries, where they are.
        rows: `[m, L]`, where results go; those of padding go to row R, past the buffer's end.
        lengths: `[m]`, keys that are real.
        causal: Whether a row sees no key after its own.
        first_column: The first key's place among the keys that dropout numbers.
        seen_blocks: `[m]`, whose queries the rows see without being among them, or None.
    """

    keys: Tensor | None
    rows: Tensor
    lengths: Ints
    causal: bool = False
    first_column: int = 0
    seen_blocks: Tensor | None = None

    def chunks(self, width: int) -> Iterator[slice]:
        """Slices of problems; a row has `width` elements."""
        m = self.rows.shape[0]
        step = max(1, _CHUNK_ELEMENTS // (int(self.lengths.max()) * width))
        return (slice(start, start + step) for start in range(0, m, step))

    def gather(self, qkv: Tensor, chunk: slice) -> Tensor:
        """`[m, M, 3, H, D]` of the problems of `chunk`."""
        if self.keys is None:
            m, Q = self.rows.shape
            return qkv[: m * Q].unflatten(0, (m, Q))[chunk]
        return _take(qkv, self.keys[chunk])

    def bias(self, chunk: slice) -> Tensor | None:
        """Added to scores, `[m or 1, 1, L or 1, M]`: 0 or -inf; None where all is seen."""
        lengths, L = self.lengths[chunk], self.rows.shape[1]
        M = int(self.lengths.max()) if self.keys is None else self.keys.shape[1]
        if self.causal:
            # padding comes last: what is not later than a real row is real
            return torch.full((1, 1, L, M), -torch.inf).triu_(M - L + 1)
        if (lengths == M).all():
            return None
        hidden = torch.from_numpy(np.arange(M) >= lengths[:, None])
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]


def _buckets(lengths: Ints, seen: int, head_elements: int) -> list[Ints]:
    """Split texts, given their `lengths` `[m]` and the queries that each sees, by length."""
    if not len(lengths):
        return []
    by_length = np.argsort(lengths, kind="stable")
    work = 4.0 * float(((lengths + seen) ** 2).sum()) * head_elements
    count = int(min(max(work // _WORTH_A_CALL_FLOP, 1), _MAX_BUCKETS, len(lengths)))
    if lengths[by_length[0]] == lengths[by_length[-1]]:
        count = 1
    return np.array_split(by_length, count)


def _groups(layout: AttentionLayout, head_elements: int) -> list[_Group]:
    """Problems in which every row of the token buffer is a row once."""
    N, Q = layout.num_blocks, layout.num_queries
    alone = np.flatnonzero(layout.block_text.numpy() < 0) if layout.has_bidirectional else None
    m = N if alone is None else len(alone)
    groups = []
    if m and Q:
        blocks = np.arange(N) if alone is None else alone
        rows = torch.from_numpy(blocks[:, None] * Q + np.arange(Q))
        groups.append(_Group(None if m == N else rows, rows, np.full(m, Q)))
    if layout.num_texts == 0:
        return groups
    starts = layout.cu_seqlens.numpy().astype(np.int64)
    lengths, kinds = np.diff(starts), layout.kinds.numpy()
    for kind, code in KIND_CODES.items():
        seen = 0 if kind is MaskKind.UNIMODAL else Q
        # an empty BIDIRECTIONAL text leaves its block's queries to be computed
        rows_of_queries = seen > 0 and kind is MaskKind.BIDIRECTIONAL
        chosen = np.flatnonzero((kinds == code) & ((lengths > 0) | rows_of_queries))
        groups += [
            _text_group(layout, kind, chosen[bucket], starts, lengths)
            for bucket in _buckets(lengths[chosen], seen, head_elements)
        ]
    return groups


def _text_group(
    layout: AttentionLayout, kind: MaskKind, texts: Ints, starts: Ints, lengths: Ints
) -> _Group:
    Q, R = layout.num_queries, layout.num_rows
    first_text_row, size = layout.num_blocks * Q, lengths[texts]
    place = np.arange(size.max())
    real = place < size[:, None]
    text_rows = first_text_row + starts[texts, None] + place
    # padding reads row 0
    keys, rows = np.where(real, text_rows, 0), np.where(real, text_rows, R)
    if kind is MaskKind.UNIMODAL:
        return _Group(torch.from_numpy(keys), torch.from_numpy(rows), size, first_column=Q)
    blocks = layout.blocks.numpy()[texts].astype(np.int64)
    query_rows = blocks[:, None] * Q + np.arange(Q)
    keys = np.concatenate([query_rows, keys], 1)
    if kind is MaskKind.BIDIRECTIONAL:
        rows = np.concatenate([query_rows, rows], 1)
        return _Group(torch.from_numpy(keys), torch.from_numpy(rows), size + Q)
    seen = torch.from_numpy(blocks) if Q else None
    return _Group(
        torch.from_numpy(keys), torch.from_numpy(rows), size + Q, causal=True, seen_blocks=seen
    )


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` for `x` `[R, ...]`, `rows` `[m, L]`."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _put(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """`x[rows] = values` for `rows` `[m, L]`, `values` `[m, L, ...]`."""
    x.index_copy_(0, rows.flatten(), values.reshape(-1, *x.shape[1:]).to(x.dtype))


def _dropout(philox: Tensor | None, p: float, rows: Tensor, first_column: int) -> Dropout | None:
    return None if philox is None or p == 0 else Dropout(philox, p, rows, first_column)


def self_forward(
    qkv: Tensor, layout: AttentionLayout, scale: float, dropout_p: float, philox: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out [R, H, D], lse [R, H])` from `qkv` `[R, 3, H, D]`."""
    R, _, H, D = qkv.shape
    # one row more than asked for, where padding goes
    out, lse = qkv.new_empty(R + 1, H, D), qkv.new_empty(R + 1, H, dtype=wide_dtype(qkv.dtype))
    for group in _groups(layout, H * D):
        for chunk in group.chunks(3 * H * D):
            rows = group.rows[chunk]
            q, k, v = group.gather(qkv, chunk).unbind(2)
            q = q[:, q.shape[1] - rows.shape[1] :]
            dropout = _dropout(philox, dropout_p, rows, group.first_column)
            output, statistics = attend(q, k, v, group.bias(chunk), scale, dropout)
            _put(out, rows, output)
            _put(lse, rows, statistics)
    return out[:R], lse[:R]


def self_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> Tensor:
    """`dqkv [R, 3, H, D]`."""
    R, _, H, D = qkv.shape
    N, Q = layout.num_blocks, layout.num_queries
    dqkv = qkv.new_empty(R + 1, 3, H, D)
    # what queries get from texts that only read them, added up before it is rounded
    seen = None
    for group in _groups(layout, H * D):
        for chunk in group.chunks(3 * H * D):
            rows = group.rows[chunk]
            L = rows.shape[1]
            q, k, v = group.gather(qkv, chunk).unbind(2)
            written = rows.clamp(max=R - 1)
            grads = attend_backward(
                # padding has no gradient
                _take(dout, written).masked_fill_((rows == R)[..., None, None], 0),
                q[:, q.shape[1] - L :],
                k,
                v,
                _take(out, written),
                _take(lse, written),
                group.bias(chunk),
                scale,
                _dropout(philox, dropout_p, rows, group.first_column),
            )
            for i, grad in enumerate(grads):
                _put(dqkv[:, i], rows, grad[:, grad.shape[1] - L :])
            if group.seen_blocks is not None:
                if seen is None:
                    seen = qkv.new_zeros(N, Q, 2, H, D, dtype=lse.dtype)
                for i, grad in enumerate(grads[1:]):
                    blocks = group.seen_blocks[chunk]
                    seen[:, :, i].index_add_(0, blocks, grad[:, :Q].to(seen.dtype))
    if seen is not None:
        dqkv[: N * Q, 1:].add_(seen.flatten(0, 1))
    return dqkv[:R]


@dataclass(frozen=True)
class _Uses:
    """Images that are read equally often, and the blocks that read them.

    Attributes:
        images: `[m]`.
        blocks: `[m, uses]`.
    """

    images: Ints
    blocks: Ints


def _uses(index: KVIndex | None, kv: Tensor, flop_per_use: float) -> Iterator[_Uses]:
    """Every block once, in pieces of a size that is worth a call."""
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
        step = max(1, _CHUNK_ELEMENTS * threads // max(kv[0].numel(), 1))
        consecutive = (np.diff(group.images) == 1).all()
        if not consecutive and flop_per_use * group.blocks.shape[1] > _WORTH_A_CALL_FLOP * threads:
            # one by one, which copies nothing
            step = 1
        for start in range(0, len(group.images), step):
            chosen = slice(start, start + step)
            yield _Uses(group.images[chosen], group.blocks[chosen])


def _pick(x: Tensor, indices: Ints) -> Tensor:
    """`x[indices]`, a view where they are consecutive."""
    flat = indices.ravel()
    if (np.diff(flat) == 1).all():
        return x[int(flat[0]) : int(flat[-1]) + 1]
    return x.index_select(0, torch.from_numpy(flat))


def _fold(x: Tensor, blocks: Ints) -> Tensor:
    """`[m, uses * Q, ...]`: the rows of each image's blocks; `x` `[N or 1, Q, ...]`."""
    m, uses = blocks.shape
    shared = x.shape[0] == 1
    x = x.expand(m * uses, *x.shape[1:]) if shared else _pick(x, blocks)
    return x if uses == 1 else x.unflatten(0, (m, uses)).flatten(1, 2)


def _unfold(x: Tensor, blocks: Ints, values: Tensor) -> None:
    """`x[blocks] = values`, the inverse of `_fold`."""
    x[torch.from_numpy(blocks.ravel())] = values.reshape(-1, *x.shape[1:]).to(x.dtype)


def _key_bias(key_mask: Tensor | None, uses: _Uses) -> tuple[Tensor | None, Tensor | None]:
    """What hides keys, and which images `[m]` show none; None where nothing is hidden."""
    if key_mask is None:
        return None, None
    visible = _pick(key_mask, uses.images)
    if visible.all():
        return None, None
    blind = ~visible.any(1)
    # a blind image is attended to like any other, and its results are then replaced
    bias = torch.zeros(visible.shape).masked_fill_(~(visible | blind[:, None]), -torch.inf)
    return bias[:, None, None], blind[:, None, None]


def _cross_dropout(philox: Tensor | None, p: float, uses: _Uses, Q: int) -> Dropout | None:
    rows = torch.from_numpy(
        (uses.blocks[..., None] * Q + np.arange(Q)).reshape(len(uses.blocks), -1)
    )
    return _dropout(philox, p, rows, 0)


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
    out = q.new_zeros(num_blocks, Q, H, D)
    lse = q.new_full((num_blocks, Q, H), -torch.inf, dtype=wide_dtype(q.dtype))
    if out.numel() == 0 or S == 0:
        return out, lse
    for uses in _uses(index, kv, 4.0 * Q * S * H * D):
        k, v = _pick(kv, uses.images).unbind(2)
        bias, blind = _key_bias(key_mask, uses)
        dropout = _cross_dropout(philox, dropout_p, uses, Q)
        output, statistics = attend(_fold(q, uses.blocks), k, v, bias, scale, dropout)
        if blind is not None:
            output = output.masked_fill(blind[..., None], 0)
            statistics = statistics.masked_fill(blind, -torch.inf)
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
    dkv = kv.new_zeros(kv.shape)
    shared = q.shape[0] == 1 and N != 1
    # queries that all blocks share add up before they are rounded
    dq = q.new_zeros(q.shape, dtype=lse.dtype if shared else q.dtype)
    if out.numel() == 0 or S == 0:
        return dq.to(q.dtype), dkv
    for uses in _uses(index, kv, 4.0 * Q * S * H * D):
        k, v = _pick(kv, uses.images).unbind(2)
        bias, blind = _key_bias(key_mask, uses)
        d_output, statistics = _fold(dout, uses.blocks), _fold(lse, uses.blocks)
        if blind is not None:
            d_output = d_output.masked_fill(blind[..., None], 0)
            statistics = statistics.masked_fill(blind, 0)
        grads = attend_backward(
            d_output,
            _fold(q, uses.blocks),
            k,
            v,
            _fold(out, uses.blocks),
            statistics,
            bias,
            scale,
            _cross_dropout(philox, dropout_p, uses, Q),
        )
        if shared:
            dq += grads[0].unflatten(1, (-1, Q)).sum((0, 1), dtype=dq.dtype)
        else:
            _unfold(dq, uses.blocks, grads[0])
        images = torch.from_numpy(uses.images)
        dkv[images, :, 0] = grads[1].to(dkv.dtype)
        dkv[images, :, 1] = grads[2].to(dkv.dtype)
    return dq.to(q.dtype), dkv
