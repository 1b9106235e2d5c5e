"""Decisions that all processes of a run make alike; every process must call these."""

from __future__ import annotations

import torch
import torch.distributed as dist


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process."""
    found = torch.tensor([int(flag)], device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def first_process(flag: bool, device: torch.device) -> bool:
    """The `flag` of rank 0."""
    found = torch.tensor([int(flag)], device=device)
    dist.broadcast(found, 0)
    return bool(found.item())
