"""Contenders for one computation: looked at for agreement, then timed in turns.

A contender that cannot run gives its reason as a result. One that is wrong, or breaks, is not
timed, and fails the benchmark once the others have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from machines import Ceilings
from timing import (
    Call,
    OwnTimes,
    PhaseSampler,
    Sampler,
    Spread,
    graph_sampler,
    input_sets,
    peak_bytes,
    stopwatch,
)

Inputs = TypeVar("Inputs")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Contender:
    """One way to compute something, bound to its inputs.

    Attributes:
        phases: Calls to run in order; one call under the empty name where there are no phases.
        canonical: From what the last call returned to what the suite compares.
        replayable: Whether its kernels are timed from a graph of launches, on CUDA.
        own_times: A call that takes its own time: seconds of all under the empty name, and of
            parts. What it does before and after is not counted, as the start of a run.
    """

    phases: Mapping[str, Call]
    canonical: Callable[[Any], Any] = lambda result: result
    replayable: bool = True
    own_times: Callable[[], dict[str, float]] | None = None

    def run(self) -> Any:
        """Run every phase; what the last returned."""
        result = None
        for call in self.phases.values():
            result = call()
        return result


Provider = Callable[[Inputs], Contender]


def plain(function: Callable[..., Any]) -> Callable[..., Contender]:
    """A provider of one call from a function of the inputs, timed launches included."""
    return lambda inputs: Contender({"": lambda: function(inputs)}, replayable=False)


@dataclass(frozen=True)
class Work:
    """The least that a computation takes.

    Attributes:
        flops: Multiplications and additions.
        bytes: Every input read once, every output written once.
        input_bytes: Size of one input set.
    """

    flops: float
    bytes: float
    input_bytes: int = 0

    def floor(self, rates: Ceilings) -> tuple[float, str]:
        """The shortest time in seconds, and which of the two rates sets it."""
        compute, memory = self.flops / rates.flops_per_s, self.bytes / rates.bytes_per_s
        return max(compute, memory), "compute" if compute > memory else "memory"


@dataclass
class Entry:
    """A contender in a race: its sampler and its samples, or why it has none."""

    name: str
    sampler: Sampler | PhaseSampler | OwnTimes | None = None
    reason: str = ""
    failure: str = ""
    peak_bytes: int | None = None
    samples: list[dict[str, float]] = field(default_factory=list)

    def take(self) -> float:
        """Take one sample; its seconds."""
        if self.sampler is None:
            raise ValueError(f"{self.name} does not run: {self.reason or self.failure}")
        self.samples.append(self.sampler.sample())
        return self.samples[-1][""]

    def result(self, work: Work | None, rates: Ceilings | None) -> dict[str, Any]:
        """What goes into the result file."""
        if self.reason or self.failure:
            return {"does_not_run": self.reason} if self.reason else {"failed": self.failure}
        spread = Spread.of([sample[""] for sample in self.samples])
        result: dict[str, Any] = {**vars(spread), "peak_bytes": self.peak_bytes}
        result["timed_by"] = self.sampler.timed_by if self.sampler else ""
        phases = [name for name in self.samples[0] if name]
        if phases:
            result["phases_s"] = {
                name: Spread.of([s[name] for s in self.samples]).median_s for name in phases
            }
        if work is not None and rates is not None:
            result["flops_per_s"] = work.flops / spread.median_s
            result["bytes_per_s"] = work.bytes / spread.median_s
            result["of_floor"] = work.floor(rates)[0] / spread.median_s
        return result


class Race(Generic[Inputs]):
    """Prepares contenders and takes their samples in turns.

    Args:
        make_inputs: From a seed to one input set.
        agree: Raises AssertionError where a contender's result for an input set is wrong.
        device: Where they run.
        timed: Whether to time them; otherwise they are only looked at.
    """

    def __init__(
        self,
        make_inputs: Callable[[int], Inputs],
        agree: Callable[[Inputs, Any], None],
        device: torch.device,
        timed: bool,
    ) -> None:
        self._make_inputs = make_inputs
        self._agree = agree
        self._device = device
        self._timed = timed
        self._sets: list[Inputs] = []
        self.entries: list[Entry] = []

    def enter(
        self,
        name: str,
        provider: Provider[Inputs],
        judged: Provider[Inputs] | None = None,
        input_bytes: int = 0,
    ) -> None:
        """Check one contender, and make its sampler.

        Args:
            name: What results call it.
            provider: Binds it to an input set.
            judged: The form whose result is looked at, where the timed one draws at random.
            input_bytes: Size of an input set.
        """
        entry = Entry(name)
        self.entries.append(entry)
        try:
            self._check(judged or provider)
            if self._timed:
                self._prepare(entry, provider, input_bytes)
        except (ImportError, NotImplementedError) as missing:
            entry.reason = one_line(missing)
        except AssertionError as wrong:
            entry.failure = f"wrong: {one_line(wrong)}"
        except _breakdowns() as error:
            if is_out_of_memory(error):
                entry.reason = "out of memory"
            else:
                entry.failure = f"{type(error).__name__}: {one_line(error)}"
        if entry.reason or entry.failure:
            entry.sampler = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _inputs(self, count: int) -> Sequence[Inputs]:
        while len(self._sets) < count:
            self._sets.append(self._make_inputs(len(self._sets)))
        return self._sets[:count]

    def _check(self, provider: Provider[Inputs]) -> None:
        (inputs,) = self._inputs(1)
        contender = provider(inputs)
        self._agree(inputs, contender.canonical(contender.run()))

    def _prepare(self, entry: Entry, provider: Provider[Inputs], input_bytes: int) -> None:
        watch = stopwatch(self._device)
        first = provider(self._inputs(1)[0])
        if first.own_times is not None:
            entry.sampler = OwnTimes(first.own_times)
            return
        if len(first.phases) > 1:
            entry.sampler = PhaseSampler(watch, dict(first.phases))
            entry.peak_bytes = peak_bytes(first.run, self._device)
            return
        count = input_sets(input_bytes, self._device) if first.replayable else 1
        others = [provider(inputs) for inputs in self._inputs(count)[1:]]
        calls = [contender.run for contender in (first, *others)]
        if self._device.type == "cuda" and first.replayable:
            entry.sampler = self._captured(calls)
        else:
            entry.sampler = Sampler(watch, calls)
        entry.peak_bytes = peak_bytes(first.run, self._device)

    def _captured(self, calls: Sequence[Call]) -> Sampler:
        try:
            return graph_sampler(calls)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            timed_by = f"events (no graph: {one_line(error)})"
            return Sampler(stopwatch(self._device), calls, timed_by=timed_by)

    def running(self) -> list[Entry]:
        """The entries that have a sampler."""
        return [entry for entry in self.entries if entry.sampler is not None]

    def rounds(
        self, seconds: float, least: int, most: int = 100, long_round: float = math.inf
    ) -> int:
        """How many more rounds fit after a first, contenders having as many seconds on average.

        Args:
            seconds: Of each contender.
            least, most: Rounds, the first included.
            long_round: Seconds of a round from which on one fewer is enough.
        """
        once = sum(entry.take() for entry in self.running())
        fit = seconds * len(self.running()) / max(once, 1e-9)
        return max(1, int(min(max(fit, least - (once > long_round)), most)) - 1)

    def failures(self) -> str:
        """What was wrong or broke, a line each."""
        return "\n".join(f"{e.name}: {e.failure}" for e in self.entries if e.failure)


def one_line(error: BaseException, most: int = 200) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def own_reasons(impl: str, call: Call) -> Any:
    """Run one of our backends; of a refusal keep what concerns this backend."""
    try:
        return call()
    except NotImplementedError as error:
        start = f"  {impl}: "
        lines = [x.removeprefix(start) for x in str(error).splitlines() if x.startswith(start)]
        raise NotImplementedError("; ".join(lines) or str(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _breakdowns() -> tuple[type[Exception], ...]:
    """What a contender may end in; errors of Triton's compiler are no RuntimeErrors."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return MemoryError, RuntimeError
    return MemoryError, RuntimeError, TritonError
