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


def gather_text(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> tuple[Tensor, ...]:
    """Gather `[b, T]` token ids and masks of all ranks, padded to the longest T among them.

    Raises:
        ValueError: the ranks hold batches of different sizes.
    """
    if world_size() == 1:
        return input_ids, attention_mask
    shapes = gather_detached(torch.tensor([input_ids.shape], device=input_ids.device)).tolist()
    if any(b != shapes[0][0] for b, _ in shapes):
        sizes = [b for b, _ in shapes]
        raise ValueError(
            f"batch size: expected the same on every rank, got {sizes}; drop the last partial batch"
        )
    extra = max(t for _, t in shapes) - input_ids.shape[1]
    if extra:
        input_ids = torch.nn.functional.pad(input_ids, (0, extra), value=pad_token_id)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, extra), value=0)
    return gather_detached(input_ids), gather_detached(attention_mask)
