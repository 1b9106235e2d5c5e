"""What a log line says of a step besides its losses. docs/logs.md lists all of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2fast.training.log import Progress

_GIB = 2**30


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`lr`, the highest rate of the optimizer's groups; where they differ, also `lr_<group>`.

    Args:
        groups: as in `torch.optim.Optimizer.param_groups`; one without a `name` has its number.
    """
    rates = {str(group.get("name", n)): float(group["lr"]) for n, group in enumerate(groups)}
    found = {"lr": max(rates.values())}
    if len(set(rates.values())) > 1:
        found |= {f"lr_{name}": rate for name, rate in rates.items()}
    return found


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has taken: on the GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / _GIB if sys.platform == "darwin" else most * 1024 / _GIB


def timed(batches: Iterator[dict[str, Tensor]], progress: Progress) -> Iterator[dict[str, Tensor]]:
    """The same batches; `progress.waited` counts the time that each is waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        progress.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch
