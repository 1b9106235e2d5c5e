"""Collectives over the batch: gather features and tokens from every rank.

With one process (or no process group) every function returns its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

GradMode = Literal["local", "full"]


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within the block, act as a single process: collectives return only the local batch."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _is_one_of_several() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks in a group (None: all of them); 1 without a process group, or `alone`."""
    return dist.get_world_size(group) if _is_one_of_several() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """Index of this rank in a group (None: of all); 0 without a process group, or `alone`."""
    return dist.get_rank(group) if _is_one_of_several() else 0


def gather_detached(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Concatenate `x [b, ...]` of all ranks along the batch; no gradient, own rank included.

    Every rank must pass the same shape.
    """
    if world_size(group) == 1:
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts)


class HostCopy:
    """An asynchronous copy to the host that synchronises only when it is read.

    Work queued on the GPU between the copy and the read keeps it busy while the host waits.

    Args:
        x: On any device.
    """

    def __init__(self, x: Tensor) -> None:
        self._host = x.detach().to("cpu", non_blocking=x.is_cuda)
        self._copied = torch.cuda.Event() if x.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(x.device))

    def tolist(self) -> Any:
        """The values; waits for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.local_batch, ctx.group = x.shape[0], group
        return gather_detached(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # every rank's loss uses this rank's features: sum the gradients from all ranks
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = rank(ctx.group) * ctx.local_batch
        return grad[start : start + ctx.local_batch], None


def gather_with_grad(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Concatenate `x [b, ...]` of all ranks; gradients flow back to the rank that owns a row.

    The gradient is that of the *sum* of the ranks' losses: data parallelism, which averages
    parameter gradients over ranks, turns it into that of their mean.
    """
    if world_size(group) == 1:
        return x
    gathered: Tensor = _GatherWithGrad.apply(x, group)
    return gathered


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sent_back = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(sent_back, grad.contiguous(), group=ctx.group)
        return sent_back, None


def exchange(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """All-to-all: send `x[r]` of `x [ranks, ...]` to rank r; receive one slice from every rank.

    The slices received are in rank order. Differentiable: gradients take the reverse path.
    """
    if world_size(group) == 1:
        return x
    received: Tensor = _Exchange.apply(x, group)
    return received
