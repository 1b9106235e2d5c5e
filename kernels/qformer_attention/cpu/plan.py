"""Plans self-attention of the backend `sdpa` on a CPU as padded calls.

Padding is computed like real rows, so texts of similar length are padded together. Control flow
reads index tensors; on a CPU that needs no sync. A plan serves all layers of a pass.

Shapes: R rows of the token buffer, N query blocks, Q queries, n texts; m problems of L rows and M
keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blip2fast.kernels.qformer_attention.cpu.core import (
    WORTH_A_CALL_FLOP,
    Dropout,
    Ints,
    even_pieces,
    run_of,
)
from blip2fast.kernels.qformer_attention.layout import KIND_CODES, AttentionLayout, MaskKind

_MAX_BUCKETS = 8
# elements that one core gathers at once; the backward pass, with a working set four times as large,
# took a tenth longer with the forward's pieces (torch 2.13, two cores, 64 x 64 rows of 12 heads)
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 1 << 21, 1 << 19
# of the two passes of a step, each way
_PLANS_KEPT = 4


@dataclass(frozen=True)
class Rows:
    """Rows `[m, L]` of a tensor.

    Attributes:
        shape: `(m, L)`.
        index: `[m * L]`, or a slice if they are consecutive.
    """

    shape: tuple[int, int]
    index: Tensor | slice

    @classmethod
    def of(cls, rows: Ints) -> Rows:
        """From `[m, L]` row numbers."""
        run = run_of(rows)
        m, L = rows.shape
        return cls((m, L), torch.from_numpy(rows.ravel()) if run is None else run)

    def take(self, x: Tensor) -> Tensor:
        """`[m, L, ...]` of `x` `[R, ...]`; a view if the rows are consecutive."""
        index = self.index
        taken = x[index] if isinstance(index, slice) else x.index_select(0, index)
        return taken.unflatten(0, self.shape)


@dataclass(frozen=True)
class Part:
    """One call: m padded problems, whose rows are the last L of their M keys.

    Attributes:
        keys: `[m, M]`; padding points to row 0.
        rows: `[m, L]`; padding points to the last row of the token buffer.
        padding: `[m, L]` bool, which rows are padding; None if none are.
        bias: Added to scores, fp32 `[m or 1, 1, L or 1, M]`: 0 or -inf; None if all is visible.
        numbers: `[m, L]` int64, row of the dropout mask for each row.
        first_column: Column of the dropout mask for the first key.
        seen_blocks: `[m]`, blocks whose queries are keys but not rows of the call, or None.
    """

    keys: Rows
    rows: Rows
    padding: Tensor | None
    bias: Tensor | None
    numbers: Tensor
    first_column: int
    seen_blocks: Tensor | None

    def dropout(self, philox: Tensor | None, p: float) -> Dropout | None:
        """Dropout of this call's weights, or None."""
        if philox is None or p == 0:
            return None
        return Dropout(philox, p, self.numbers, self.first_column)


@dataclass(frozen=True)
class Plan:
    """The calls of a pass; every row of the token buffer is a row of one of them.

    Attributes:
        parts: The calls.
        order: `[R]`, position of each row in the concatenated parts; None: already in order.
    """

    parts: tuple[Part, ...]
    order: Tensor | None

    def rows(self) -> int:
        """Number of rows of all parts, padding included."""
        return sum(part.numbers.numel() for part in self.parts)


@dataclass(frozen=True)
class _Request:
    """A layout keyed by the contents of its index tensors, since each layer passes new ones."""

    contents: tuple[bytes, ...]
    counts: tuple[int, ...]
    layout: AttentionLayout = field(compare=False)


def plan_of(
    layout: AttentionLayout,
    head_elements: int,
    gathered: int,
    worth_flop: float = WORTH_A_CALL_FLOP,
) -> Plan:
    """The plan for a pass, cached for the next layer.

    Args:
        layout: Of the token buffer, on the CPU.
        head_elements: H * D.
        gathered: Elements of the token buffer that a core gathers at once.
        worth_flop: FLOPs that are worth a call of their own.
    """
    indices = (layout.cu_seqlens, layout.kinds, layout.blocks, layout.block_text)
    request = _Request(
        tuple(x.numpy().tobytes() for x in indices),
        (
            layout.num_blocks,
            layout.num_queries,
            layout.num_rows,
            int(layout.has_bidirectional),
            head_elements,
            int(worth_flop),
            gathered * torch.get_num_threads(),
        ),
        layout,
    )
    return _kept_plan(request)


@lru_cache(maxsize=_PLANS_KEPT)
def _kept_plan(request: _Request) -> Plan:
    layout = request.layout
    head_elements, worth_flop, gathered = request.counts[-3:]
    groups = [
        piece
        for group in _groups(layout, head_elements, worth_flop)
        for piece in group.pieces(gathered // (3 * head_elements))
    ]
    if not groups:
        return Plan((), None)
    R = layout.num_rows
    # a cached plan must hold no inference-mode tensors: a later call may train
    with torch.inference_mode(False):
        rows = np.concatenate([group.rows.ravel() for group in groups])
        order = np.empty(R + 1, np.int64)
        order[rows] = np.arange(len(rows))
        in_place = len(rows) == R and (rows[1:] > rows[:-1]).all()
        return Plan(
            tuple(group.part(R) for group in groups),
            None if in_place else torch.from_numpy(order[:R]),
        )


@dataclass(frozen=True)
class _Group:
    """m padded problems over the token buffer; their rows are the last L of their M keys.

    Attributes:
        keys: `[m, M]`, rows of the token buffer; padding points to row 0.
        rows: `[m, L]`, rows that are computed; padding points to row R, past the buffer's end.
        lengths: `[m]`, number of real keys.
        causal: Whether the mask is causal.
        first_column: As in `Part`.
        seen_blocks: As in `Part`.
    """

    keys: Ints
    rows: Ints
    lengths: Ints
    causal: bool = False
    first_column: int = 0
    seen_blocks: Ints | None = None

    def pieces(self, keys: int) -> Iterator[_Group]:
        """Split into groups of at most this many keys, padding included."""
        m, M = self.keys.shape
        for piece in even_pieces(m, keys // M):
            seen = None if self.seen_blocks is None else self.seen_blocks[piece]
            yield replace(
                self,
                keys=self.keys[piece],
                rows=self.rows[piece],
                lengths=self.lengths[piece],
                seen_blocks=seen,
            )

    def part(self, num_rows: int) -> Part:
        """Convert to a call on a token buffer of R rows."""
        padding = self.rows == num_rows
        return Part(
            Rows.of(self.keys),
            Rows.of(np.minimum(self.rows, num_rows - 1)),
            torch.from_numpy(padding) if padding.any() else None,
            self._bias(),
            torch.from_numpy(self.rows),
            self.first_column,
            None if self.seen_blocks is None else torch.from_numpy(self.seen_blocks),
        )

    def _bias(self) -> Tensor | None:
        L, M = self.rows.shape[1], self.keys.shape[1]
        if self.causal:
            # padding comes last: keys up to a real row are real
            return torch.full((1, 1, L, M), -torch.inf).triu_(M - L + 1)
        if (self.lengths == M).all():
            return None
        hidden = torch.from_numpy(np.arange(M) >= self.lengths[:, None])
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]


def _groups(
    layout: AttentionLayout, head_elements: int, worth_flop: float = WORTH_A_CALL_FLOP
) -> list[_Group]:
    """Padded problems that together compute every row of the token buffer exactly once."""
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
        # with an empty BIDIRECTIONAL text, the block's queries still have to be computed
        rows_of_queries = seen > 0 and kind is MaskKind.BIDIRECTIONAL
        chosen = np.flatnonzero((kinds == code) & ((lengths > 0) | rows_of_queries))
        groups += [
            _text_group(layout, kind, chosen[bucket], starts, lengths)
            for bucket in _buckets(lengths[chosen], seen, head_elements, worth_flop)
        ]
    return groups


def _buckets(
    lengths: Ints, seen: int, head_elements: int, worth_flop: float = WORTH_A_CALL_FLOP
) -> list[Ints]:
    """Bucket texts by length, given their `lengths` `[m]` and the queries that each sees."""
    if not len(lengths):
        return []
    by_length = np.argsort(lengths, kind="stable")
    work = 4.0 * float(((lengths + seen) ** 2).sum()) * head_elements
    count = int(min(max(work // worth_flop, 1), _MAX_BUCKETS, len(lengths)))
    if lengths[by_length[0]] == lengths[by_length[-1]]:
        count = 1
    return np.array_split(by_length, count)


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
