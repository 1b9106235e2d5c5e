"""Which share of a step goes to what, from the profiler's list of kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# the first whose words stand in a kernel's name
KINDS = {
    "itc": ("itc",),
    "attention": ("qformer_attention", "cross_attention", "fmha", "flash", "softmax"),
    "glue": ("layer_norm", "layernorm", "gelu", "dropout", "cross_entropy"),
    "gemm": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk"),
    "optimiser": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name; `"rest"` where no word is known."""
    name = kernel.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "rest"


def shares(kernels: list[tuple[str, float]], total: float) -> dict[str, float]:
    """Share of a time for each kind of kernel; `"gaps"` is when none ran.

    Args:
        kernels: Name and time of each, all on one stream.
        total: Of the whole step, in the same unit.
    """
    taken: dict[str, float] = defaultdict(float)
    for name, time in kernels:
        taken[kind_of(name)] += time
    taken["gaps"] = max(0.0, total - sum(taken.values()))
    return {kind: time / total for kind, time in sorted(taken.items(), key=lambda x: -x[1])}


def longest(kernels: list[tuple[str, float]], most: int = 40) -> dict[str, list[float]]:
    """Launches and total time of the kernels that take longest, by name."""
    taken: dict[str, list[float]] = {}
    for name, time in kernels:
        both = taken.setdefault(name[:120], [0, 0.0])
        both[0] += 1
        both[1] += time
    return dict(sorted(taken.items(), key=lambda x: -x[1][1])[:most])


def step_shares(step: Callable[[], Any]) -> dict[str, Any]:
    """Profile one step on the CUDA device, after two that warm up.

    Returns:
        `shares` of the step's time, and `kernels_us`: launches and microseconds of the longest.
    """
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    total_us = 1e3 * start.elapsed_time(end)  # without the profiler, which widens the gaps
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.elapsed_us())
        for event in profiled.events()
        if event.device_type.name == "CUDA"
    ]
    return {"shares": shares(kernels, total_us), "kernels_us": longest(kernels)}
