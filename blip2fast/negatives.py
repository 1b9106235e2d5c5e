"""Fetch what belongs to the sampled negatives from the ranks that hold it.

LAVIS gathers the image tokens of every pair on every rank; a rank reads as many of them as it has
negatives. Here only those travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from blip2fast.gathering import gather_detached, rank, world_size


class NegativeExchange:
    """The way of a list of rows from the ranks that hold them to the ranks that want them.

    Built once for a list of negatives and used for all that belongs to them. On several ranks
    building it makes the host wait, for how many rows each rank wants of each; every rank of
    the group must build it, and then call the same methods in the same order.

    Args:
        index: `[k]` int64, the rows wanted here, as indices into the batch of all ranks; the same
            k on every rank.
        batch: Rows that each rank holds.
        group: The ranks; None: all.

    Raises:
        ValueError: `index` is not `[k]` int64, or leaves the batch (not seen on one GPU).
    """

    def __init__(self, index: Tensor, batch: int, group: ProcessGroup | None = None) -> None:
        self.ranks, self.group, self.batch = world_size(group), group, batch
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"index: expected [k] int64, got {index.dtype} {tuple(index.shape)}")
        self.index = index
        if self.ranks == 1:
            if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
                _check_range(int(index.min()), int(index.max()), batch)
            return
        owner = torch.div(index, batch, rounding_mode="floor").clamp(0, self.ranks - 1)
        # arrivals come in the order of their owners
        self.place = owner.argsort(stable=True)
        wanted = gather_detached(index, group).view(self.ranks, -1)
        asked_of_me = torch.div(wanted, batch, rounding_mode="floor") == rank(group)
        self.sent_rows = wanted[asked_of_me] - rank(group) * batch
        counts = [asked_of_me.sum(1), owner.bincount(minlength=self.ranks)]
        # all ranks see the same range, so that an error is raised on all of them
        counts.append(torch.stack(wanted.aminmax()))
        self.send_counts, self.receive_counts, span = (
            part.tolist() for part in torch.cat(counts).cpu().split([self.ranks, self.ranks, 2])
        )
        _check_range(span[0], span[1], batch * self.ranks)

    def rows(self, x: Tensor) -> Tensor:
        """The wanted rows of `x [batch, ...]`, of which every rank holds its own part.

        Differentiable: the gradient of a row goes back to the rank that holds it, summed over all
        who wanted it (the gradient of the sum of the ranks' losses).

        Args:
            x: `[batch, ...]`; the same type and trailing shape on every rank.

        Returns:
            `[k, ...]`.

        Raises:
            ValueError: `x` does not have `batch` rows.
        """
        self._check_rows("x", x.shape[0])
        if self.ranks == 1:
            return x[self.index]
        return self._to_place(self._move(x[self.sent_rows], self.send_counts, self.receive_counts))

    def ragged(self, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted sequences of a packed list of sequences.

        Makes the host wait for their lengths. Differentiable in `values`.

        Args:
            values: `[total, ...]`, the sequences one after another.
            cu_seqlens: `[batch + 1]` integers, where each starts, and the end.

        Returns:
            `[total wanted, ...]` and where each starts, `[k + 1]` in the type of `cu_seqlens`.

        Raises:
            ValueError: `cu_seqlens` does not say where `batch` sequences start.
        """
        self._check_rows("cu_seqlens", cu_seqlens.shape[0] - 1)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        wanted = self.rows(lengths)
        ends = torch.nn.functional.pad(wanted.cumsum(0), (1, 0))
        if self.ranks == 1:
            return values[_spans(starts[self.index], wanted)], ends.to(cu_seqlens.dtype)
        sent_lengths, arriving = lengths[self.sent_rows], wanted[self.place]
        moved = self._move(
            values[_spans(starts[self.sent_rows], sent_lengths)],
            _sums(sent_lengths, self.send_counts),
            _sums(arriving, self.receive_counts),
        )
        arrived_at = arriving.cumsum(0) - arriving
        # sequence n of the list arrived as number inverse[n]
        inverse = self.place.argsort()
        return moved[_spans(arrived_at[inverse], wanted)], ends.to(cu_seqlens.dtype)

    def _to_place(self, arrived: Tensor) -> Tensor:
        return arrived[self.place.argsort()]

    def _move(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        moved: Tensor = _Move.apply(sent, send_counts, receive_counts, self.group)
        return moved

    def _check_rows(self, name: str, rows: int) -> None:
        if rows != self.batch:
            raise ValueError(f"{name}: expected {self.batch} rows on this rank, got {rows}")


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent: Tensor, send: list[int], receive: list[int], group: ProcessGroup | None
    ) -> Tensor:
        ctx.counts, ctx.group = (send, receive), group
        return _all_to_all(sent, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.counts
        return _all_to_all(grad, receive, send, ctx.group), None, None, None


def _all_to_all(
    sent: Tensor, send: list[int], receive: list[int], group: ProcessGroup | None
) -> Tensor:
    received = sent.new_empty(sum(receive), *sent.shape[1:])
    dist.all_to_all_single(received, sent.contiguous(), receive, send, group=group)
    return received


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """The indices of spans one after another: `starts[0], starts[0] + 1, ..., starts[1], ...`."""
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(starts - ends + lengths, lengths)
    return shift + torch.arange(shift.shape[0], device=shift.device)


def _sums(lengths: Tensor, counts: list[int]) -> list[int]:
    sums: list[int] = torch.stack([part.sum() for part in lengths.split(counts)]).tolist()
    return sums


def _check_range(low: int, high: int, rows: int) -> None:
    if low < 0 or high >= rows:
        raise ValueError(
            f"index: expected rows 0 to {rows - 1} of the batch of all ranks, got {low} to {high}; "
            "-1 is a row without a negative (`ITCOutput.without_negative`)"
        )
