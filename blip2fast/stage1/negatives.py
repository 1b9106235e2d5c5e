"""Fetches the rows of sampled negatives from the ranks that hold them.

LAVIS all-gathers the image tokens of every pair, although a rank only uses those of its negatives.
Here an all-to-all sends only the rows that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from blip2fast.ops.collectives import gather_detached, rank, world_size
from blip2fast.ops.tracing import has_values


@dataclass(frozen=True)
class Route:
    """The all-to-all plan for one list of rows.

    Attributes:
        sent_rows: Local rows to send, ordered by destination rank.
        place: `[k]`, list index of each received row; rows arrive ordered by source rank.
        send_counts, receive_counts: Number of rows to and from each rank.
    """

    sent_rows: Tensor
    place: Tensor
    send_counts: list[int]
    receive_counts: list[int]


class NegativeExchange:
    """Sends a list of rows from the ranks that hold them to the ranks that need them.

    Build it once per list of negatives and reuse it for each tensor. With several ranks, the
    constructor synchronises the host, which needs the row counts of all ranks; `for_lists` builds
    several exchanges with one synchronisation. Every rank of the group must construct it, and then
    call the same methods in the same order.

    Args:
        index: `[k]` int64, the rows this rank needs, as indices into the global batch; the same k
            on every rank.
        batch: Number of rows on each rank.
        group: The process group; None: all ranks.
        route: A route computed by `for_lists`; None: compute it here.

    Raises:
        ValueError: `index` is not `[k]` int64 or is out of range (not checked on a single GPU).
    """

    def __init__(
        self,
        index: Tensor,
        batch: int,
        group: ProcessGroup | None = None,
        route: Route | None = None,
    ) -> None:
        self.ranks, self.group, self.batch = world_size(group), group, batch
        _check_list(index)
        self.index = index
        if self.ranks == 1:
            if index.numel() and has_values(index):
                _check_range(int(index.min()), int(index.max()), batch)
            return
        self.route = _routes(index[None], batch, group)[0] if route is None else route
        # list entry n is received row arrival[n]
        self.arrival = self.route.place.argsort()

    @classmethod
    def for_lists(
        cls, indices: Sequence[Tensor], batch: int, group: ProcessGroup | None = None
    ) -> list[NegativeExchange]:
        """Exchanges for several lists, with one collective and one host synchronisation.

        Args:
            indices: Lists `[k]` as in the constructor, of equal length.
            batch, group: As in the constructor.

        Raises:
            ValueError: as the constructor, or the lists differ in length.
        """
        for index in indices:
            _check_list(index)
        if len({len(index) for index in indices}) > 1:
            lengths = [len(index) for index in indices]
            raise ValueError(f"indices: expected lists of one length, got {lengths}; pad them")
        if world_size(group) == 1 or not indices:
            return [cls(index, batch, group) for index in indices]
        routes = _routes(torch.stack(list(indices)), batch, group)
        return [
            cls(index, batch, group, route) for index, route in zip(indices, routes, strict=True)
        ]

    def rows(self, x: Tensor) -> Tensor:
        """The requested rows of `x [batch, ...]`, which is sharded over the ranks.

        Differentiable: the gradient of a row returns to the rank that holds it, summed over the
        ranks that requested it (the gradient of the sum of the ranks' losses).

        Args:
            x: `[batch, ...]`; the same dtype and trailing shape on every rank.

        Returns:
            `[k, ...]`.

        Raises:
            ValueError: `x` does not have `batch` rows.
        """
        self._check_rows("x", x.shape[0])
        if self.ranks == 1:
            return x[self.index]
        route = self.route
        moved = self._move(x[route.sent_rows], route.send_counts, route.receive_counts)
        return moved[self.arrival]

    def _move(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        moved: Tensor = _Move.apply(sent, send_counts, receive_counts, self.group)
        return moved

    def _check_rows(self, name: str, rows: int) -> None:
        if rows != self.batch:
            raise ValueError(f"{name}: expected {self.batch} rows on this rank, got {rows}")


def _routes(indices: Tensor, batch: int, group: ProcessGroup | None) -> list[Route]:
    """The routes of n lists `[n, k]`, from one gather and one copy to the host.

    Uses sorting, because boolean masks and `bincount` have data-dependent output sizes and would
    synchronise.
    """
    ranks, own = world_size(group), rank(group)
    wanted = gather_detached(indices, group).view(ranks, *indices.shape).transpose(0, 1)
    owner = torch.div(wanted, batch, rounding_mode="floor").clamp(0, ranks - 1)
    asked_of_me, mine = owner == own, owner[:, own]
    # rows held by this rank first, ordered by the requesting rank
    order = owner.ne(own).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    sent_rows = wanted.flatten(1).gather(1, order) - own * batch
    place = mine.argsort(dim=1, stable=True)
    every_rank = torch.arange(ranks, device=indices.device)
    counts = [asked_of_me.sum(2), (mine[:, :, None] == every_rank).sum(1)]
    # all ranks check the same range, so an error is raised on all of them
    span = torch.stack([wanted.amin((1, 2)), wanted.amax((1, 2))], dim=1)
    numbers = torch.cat([*counts, span], dim=1).tolist()
    for *_, low, high in numbers:
        _check_range(low, high, batch * ranks)
    return [
        Route(sent_rows[n][: sum(row[:ranks])], place[n], row[:ranks], row[ranks:-2])
        for n, row in enumerate(numbers)
    ]


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


def _check_list(index: Tensor) -> None:
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index: expected [k] int64, got {index.dtype} {tuple(index.shape)}")


def _check_range(low: int, high: int, rows: int) -> None:
    if low < 0 or high >= rows:
        raise ValueError(
            f"index: expected rows 0 to {rows - 1} of the batch of all ranks, got {low} to {high}; "
            "-1 is a row without a negative (`ITCOutput.without_negative`)"
        )
