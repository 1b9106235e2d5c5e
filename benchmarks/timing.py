"""Time and memory of calls on a CPU or a CUDA device.

A stopwatch waits for the device before it stops. On CUDA it reads events, and a sampler may replay
a graph of calls over several input sets, so that neither launches nor a warm cache are measured.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
# one sample is made of as many calls as fit this, so that the clock's resolution does not matter
SAMPLE_SECONDS = 2e-3
# a call that takes as long is warm after one
_LONG_SECONDS = 1.0
# input sets together are this many times the L2 cache, so that no call finds its inputs there
_CACHE_FACTOR = 3
_MOST_INPUT_SETS = 64


class Stopwatch(Protocol):
    """Takes the time of consecutive calls."""

    name: str

    def laps(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls in order; seconds that each took, work it left to the device included."""
        ...


class WallClock:
    """For calls that have done their work when they return.

    Args:
        clock: Seconds from any origin.
    """

    name = "wall clock"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def laps(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of each call."""
        taken = []
        for call in calls:
            start = self._clock()
            call()
            taken.append(self._clock() - start)
        return taken


class CudaEvents:
    """For calls that queue their work on the current CUDA stream."""

    name = "events"

    def laps(self, calls: Sequence[Call]) -> list[float]:
        """Seconds between the events before and after each call, gaps between launches included."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch of a device."""
    return CudaEvents() if device.type == "cuda" else WallClock()


class Sampler:
    """Repeats one computation, and gives its time.

    Args:
        watch: Takes the time.
        calls: The same computation on each of several input sets.
        per_call: How many computations one call stands for (a graph holds several).
        sample_seconds: Least length of a sample.

    Attributes:
        timed_by: How, in words.
    """

    def __init__(
        self,
        watch: Stopwatch,
        calls: Sequence[Call],
        per_call: int = 1,
        sample_seconds: float = SAMPLE_SECONDS,
        timed_by: str = "",
    ) -> None:
        self._watch = watch
        self._calls = calls
        self._per_call = per_call
        self.timed_by = timed_by or watch.name
        self._loops = 1
        once = sum(watch.laps([self._run]))  # also warms up
        if once < _LONG_SECONDS:
            once = min(once, sum(watch.laps([self._run])))
        self._loops = max(1, min(1000, round(sample_seconds / max(once, 1e-9))))

    def _run(self) -> None:
        for _ in range(self._loops):
            for call in self._calls:
                call()

    def sample(self) -> dict[str, float]:
        """Seconds of one computation, the mean over the calls of a sample."""
        (taken,) = self._watch.laps([self._run])
        return {"": taken / (self._loops * len(self._calls) * self._per_call)}


class PhaseSampler:
    """A computation in phases, each timed on its own: forward, backward, optimiser.

    Args:
        watch: Takes the time.
        phases: Name and call, in order.
    """

    def __init__(self, watch: Stopwatch, phases: dict[str, Call]) -> None:
        self._watch = watch
        self._phases = phases
        self.timed_by = watch.name
        self.sample()

    def sample(self) -> dict[str, float]:
        """Seconds of each phase, and of all under the empty name."""
        laps = self._watch.laps(list(self._phases.values()))
        return {"": sum(laps), **dict(zip(self._phases, laps, strict=True))}


class OwnTimes:
    """A computation that takes its own time, with whatever it needs before.

    Args:
        call: Gives seconds of all under the empty name, and of parts.
    """

    timed_by = "its own clock"

    def __init__(self, call: Callable[[], dict[str, float]]) -> None:
        self._call = call

    def sample(self) -> dict[str, float]:
        """Seconds of each part, and of all under the empty name."""
        return self._call()


def graph_sampler(calls: Sequence[Call]) -> Sampler:
    """A sampler that replays one CUDA graph of all the calls.

    Raises:
        RuntimeError: the calls cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # memory pools and compiled code are made outside the capture
        for call in calls:
            call()
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Sampler(CudaEvents(), [graph.replay], len(calls), timed_by="graph replays")


def issue_seconds(call: Call, rounds: int = 5) -> float:
    """Seconds that the host takes to queue a call's work on the CUDA device, the least of several.

    The device has nothing else to do, and what it does is not waited for.
    """
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(taken)


def input_sets(input_bytes: int, device: torch.device) -> int:
    """How many input sets to rotate over: one on a CPU, more than the L2 cache holds on CUDA."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_INPUT_SETS, 1 + _CACHE_FACTOR * cache // max(input_bytes, 1))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median_s: float
    q1_s: float
    q3_s: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory that a call holds beyond what was held before it.

    On CUDA what PyTorch's allocator hands out. On Linux the resident memory of the process, after
    free memory has been given back to the system. None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    _give_back_free_memory()
    reset.write_text("5")  # sets the high-water mark to what is resident
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _give_back_free_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: small blocks that are free count as held


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, flags=re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])
