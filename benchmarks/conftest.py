"""Timing rules: parity before time, rounds interleaved between rivals, conditions in the result."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers


@pytest.fixture
def conditions() -> dict[str, Any]:
    """What a number is worth nothing without."""
    return {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
    }


@pytest.fixture
def race(benchmark: Any, conditions: dict[str, Any]) -> Callable[..., None]:
    """Time `ours` with the rivals interleaved round by round, so that noise hits all alike.

    pytest-benchmark's own columns are of ours; medians of all, and the ratios, are in
    `extra_info`.
    """

    def run(ours: Callable[[], Any], rivals: Mapping[str, Callable[[], Any]], rounds: int) -> None:
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def rivals_first() -> None:
            for name, rival in rivals.items():
                times[name].append(seconds(rival))

        benchmark.pedantic(ours, setup=rivals_first, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info |= conditions
        if benchmark.disabled:
            return
        median_s = benchmark.stats.stats.median
        for name, taken in times.items():
            rival_s = sorted(taken)[len(taken) // 2]
            benchmark.extra_info[f"{name}_median_s"] = rival_s
            benchmark.extra_info[f"{name}_over_ours"] = rival_s / median_s

    return run


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call on the CPU."""
    import time

    start = time.perf_counter()
    function()
    return time.perf_counter() - start
