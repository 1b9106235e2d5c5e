"""What a log line says of a step besides its losses. docs/logs.md lists all of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from blip2fast.training.log import Progress

_GIB = 2**30
Item = TypeVar("Item")


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`lr`, the highest rate of the optimizer's groups; where they differ, also each rate.

    A rate is named `lr_<group>` after the first group that has it.

    Args:
        groups: as in `torch.optim.Optimizer.param_groups`; one without a `name` has its number.
    """
    first: dict[float, str] = {}
    for number, group in enumerate(groups):
        first.setdefault(float(group["lr"]), str(group.get("name", number)))
    found = {"lr": max(first)}
    if len(first) > 1:
        found |= {f"lr_{name}": rate for rate, name in first.items()}
    return found


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken: on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / _GIB if sys.platform == "darwin" else most * 1024 / _GIB


def timed(batches: Iterator[Item], progress: Progress) -> Iterator[Item]:
    """The same batches; `progress.waited` counts the time that each is waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        progress.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch
