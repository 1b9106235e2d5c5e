"""Collectives over the batch: gather features and tokens from every rank.

With one process (or no process group) every function returns its input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

GradMode = Literal["local", "full"]


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_detached(x: Tensor) -> Tensor:
    """Concatenate `x [b, ...]` of all ranks along the batch; no gradient, own rank included.

    Every rank must pass the same shape.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.local_batch = x.shape[0]
        return gather_detached(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # a rank's features are used by every rank's loss: sum what each of them sends back
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = rank() * ctx.local_batch
        return grad[start : start + ctx.local_batch]


def gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate `x [b, ...]` of all ranks; gradients flow back to the rank that owns a row.

    The gradient is that of the *sum* of the ranks' losses: data parallelism, which averages
    parameter gradients over ranks, turns it into that of their mean.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _GatherWithGrad.apply(x)
    return gathered
