"""Self-attention of the backend `sdpa` on a CPU: where rows come from and where results go.

Padding costs what it computes, so texts of like length are padded together. Control flow looks at
index tensors, which on a CPU makes nobody wait.

Shapes: R rows of the token buffer, N query blocks, Q queries, n texts, H heads, D head width; m
problems of L rows and M keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blip2fast.masks import MaskKind
from blip2fast.ops._attention_core import (
    CHUNK_ELEMENTS,
    WORTH_A_CALL_FLOP,
    Dropout,
    Ints,
    attend,
    attend_backward,
    even_pieces,
    pick,
)
from blip2fast.ops.attention_layout import KIND_CODES, AttentionLayout, wide_dtype

_MAX_BUCKETS = 8


@dataclass(frozen=True)
class _Group:
    """m padded problems over the token buffer; their rows are the last L of their M keys.

    Attributes:
        keys: `[m, M]`, rows of the token buffer; padding names row 0.
        rows: `[m, L]`, rows that are computed; padding names row R, past the buffer's end.
        lengths: `[m]`, keys that are real.
        causal: Whether a row sees no key after its own.
        first_column: The first key's place among the keys that dropout numbers.
        seen_blocks: `[m]`, whose queries the rows see without being among them, or None.
    """

    keys: Ints
    rows: Ints
    lengths: Ints
    causal: bool = False
    first_column: int = 0
    seen_blocks: Ints | None = None

    def chunks(self, width: int) -> Iterator[_Group]:
        """The same in parts that a cache holds; a row has `width` elements."""
        m, M = self.keys.shape
        for part in even_pieces(m, CHUNK_ELEMENTS * torch.get_num_threads() // (M * width)):
            seen = None if self.seen_blocks is None else self.seen_blocks[part]
            yield replace(
                self,
                keys=self.keys[part],
                rows=self.rows[part],
                lengths=self.lengths[part],
                seen_blocks=seen,
            )

    def bias(self) -> Tensor | None:
        """Added to scores, `[m or 1, 1, L or 1, M]`: 0 or -inf; None where all is seen."""
        L, M = self.rows.shape[1], self.keys.shape[1]
        if self.causal:
            # padding comes last: what is not later than a real row is real
            return torch.full((1, 1, L, M), -torch.inf).triu_(M - L + 1)
        if (self.lengths == M).all():
            return None
        hidden = torch.from_numpy(np.arange(M) >= self.lengths[:, None])
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]

    def dropout(self, philox: Tensor | None, p: float) -> Dropout | None:
        """Where the mask of this group's weights is."""
        if philox is None or p == 0:
            return None
        return Dropout(philox, p, torch.from_numpy(self.rows), self.first_column)


def _buckets(lengths: Ints, seen: int, head_elements: int) -> list[Ints]:
    """Split texts, given their `lengths` `[m]` and the queries that each sees, by length."""
    if not len(lengths):
        return []
    by_length = np.argsort(lengths, kind="stable")
    work = 4.0 * float(((lengths + seen) ** 2).sum()) * head_elements
    count = int(min(max(work // WORTH_A_CALL_FLOP, 1), _MAX_BUCKETS, len(lengths)))
    if lengths[by_length[0]] == lengths[by_length[-1]]:
        count = 1
    return np.array_split(by_length, count)


def _groups(layout: AttentionLayout, head_elements: int) -> list[_Group]:
    """Problems in which every row of the token buffer is a row once."""
    N, Q = layout.num_blocks, layout.num_queries
    if layout.has_bidirectional:
        alone = np.flatnonzero(layout.block_text.numpy() < 0)
    else:
        alone = np.arange(N)
    groups = []
    if len(alone) and Q:
        rows = alone[:, None] * Q + np.arange(Q)
        groups.append(_Group(rows, rows, np.full(len(alone), Q)))
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
    keys, rows = np.where(real, text_rows, 0), np.where(real, text_rows, R)
    if kind is MaskKind.UNIMODAL:
        return _Group(keys, rows, size, first_column=Q)
    blocks = layout.blocks.numpy()[texts].astype(np.int64)
    query_rows = blocks[:, None] * Q + np.arange(Q)
    keys = np.concatenate([query_rows, keys], 1)
    if kind is MaskKind.BIDIRECTIONAL:
        return _Group(keys, np.concatenate([query_rows, rows], 1), size + Q)
    return _Group(keys, rows, size + Q, causal=True, seen_blocks=blocks if Q else None)


@dataclass(frozen=True)
class _Collected:
    """Results of all rows in the order of their problems, padding among them.

    Attributes:
        buffers: `[rows, ...]` each.
        order: `[R]`, where each row of the token buffer is; None: in its place.
    """

    buffers: tuple[Tensor, ...]
    order: Tensor | None

    @classmethod
    def of(
        cls, parts: list[_Group], num_rows: int, *buffers: tuple[Tensor, tuple[int, ...]]
    ) -> _Collected:
        """Room for the results of `parts`, of the type of a tensor and of a shape."""
        rows = np.concatenate([part.rows.ravel() for part in parts])
        order = np.empty(num_rows + 1, np.int64)
        order[rows] = np.arange(len(rows))
        in_place = len(rows) == num_rows and (rows[1:] > rows[:-1]).all()
        return cls(
            tuple(like.new_empty(len(rows), *shape) for like, shape in buffers),
            None if in_place else torch.from_numpy(order[:num_rows]),
        )

    def result(self, which: int) -> Tensor:
        """`[R, ...]` of one of the buffers."""
        buffer = self.buffers[which]
        return buffer if self.order is None else buffer.index_select(0, self.order)


def _parts(layout: AttentionLayout, H: int, D: int) -> list[_Group]:
    return [part for group in _groups(layout, H * D) for part in group.chunks(3 * H * D)]


def _take(x: Tensor, rows: Ints) -> Tensor:
    """`x[rows]` for `x` `[R, ...]`, `rows` `[m, L]`; a view where rows are consecutive."""
    return pick(x, rows).unflatten(0, rows.shape)


def self_forward(
    qkv: Tensor, layout: AttentionLayout, scale: float, dropout_p: float, philox: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out [R, H, D], lse [R, H])` from `qkv` `[R, 3, H, D]`."""
    R, _, H, D = qkv.shape
    parts = _parts(layout, H, D)
    if not parts:
        return qkv.new_empty(R, H, D), qkv.new_empty(R, H, dtype=wide_dtype(qkv.dtype))
    wide = qkv.new_empty(0, dtype=wide_dtype(qkv.dtype))
    collected = _Collected.of(parts, R, (qkv, (H, D)), (wide, (H,)))
    start = 0
    for part in parts:
        m, L = part.rows.shape
        q, k, v = _take(qkv, part.keys).unbind(2)
        dropout = part.dropout(philox, dropout_p)
        results = attend(q[:, q.shape[1] - L :], k, v, part.bias(), scale, dropout)
        end = start + m * L
        for buffer, result in zip(collected.buffers, results, strict=True):
            buffer[start:end].unflatten(0, (m, L)).copy_(result)
        start = end
    return collected.result(0), collected.result(1)


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
    parts = _parts(layout, H, D)
    if not parts:
        return qkv.new_empty(R, 3, H, D)
    collected = _Collected.of(parts, R, (qkv, (3, H, D)))
    # what queries get from texts that only read them, added up before it is rounded
    seen = None
    start = 0
    for part in parts:
        m, L = part.rows.shape
        q, k, v = _take(qkv, part.keys).unbind(2)
        rows = np.minimum(part.rows, R - 1)
        d_output = _take(dout, rows)
        if (part.rows == R).any():
            # padding has no gradient
            padding = torch.from_numpy(part.rows == R)
            d_output = d_output.masked_fill_(padding[..., None, None], 0)
        grads = attend_backward(
            d_output,
            q[:, q.shape[1] - L :],
            k,
            v,
            _take(out, rows),
            _take(lse, rows),
            part.bias(),
            scale,
            part.dropout(philox, dropout_p),
        )
        end = start + m * L
        for i, grad in enumerate(grads):
            buffer = collected.buffers[0][start:end, i].unflatten(0, (m, L))
            buffer.copy_(grad[:, grad.shape[1] - L :])
        start = end
        if part.seen_blocks is not None:
            if seen is None:
                seen = lse.new_zeros(N, Q, 2, H, D)
            blocks = torch.from_numpy(part.seen_blocks)
            for i, grad in enumerate(grads[1:]):
                seen[:, :, i].index_add_(0, blocks, grad[:, :Q].to(seen.dtype))
    dqkv = collected.result(0)
    if seen is not None:
        dqkv[: N * Q, 1:].add_(seen.flatten(0, 1))
    return dqkv
