"""How far a timed run is: a line for each benchmark, and what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

# the machine's pace counts from here on; before, the expected one does
_SETTLED_S = 10.0


def clock_time(seconds: float) -> str:
    """`"0:07"`, `"12:30"` or `"1:02:03"`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """The time that benchmarks took, and an estimate of what the others will.

    Args:
        expected: Seconds of each benchmark, in order.
        limit: Seconds of the whole run, None: as long as it takes.
        before: Seconds of the run until now.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        expected: Sequence[float],
        limit: float | None = None,
        before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = list(expected)
        self._limit = limit
        self._clock = clock
        self._start = clock()
        self._before = before
        # of those that ran: one that is left out says nothing about the pace
        self._ran_expected = self._ran = 0.0
        self._begun = self._start
        self.begun = 0

    @property
    def elapsed(self) -> float:
        """Seconds of the run."""
        return self._before + self._clock() - self._start

    def begin(self) -> None:
        """The next benchmark begins."""
        self.begun += 1
        self._begun = self._clock()

    def end(self, ran: bool = True) -> None:
        """It ended; `ran`: it was timed."""
        if ran:
            self._ran += self._clock() - self._begun
            self._ran_expected += self._expected[self.begun - 1]

    def pace(self) -> float:
        """Seconds here for an expected second."""
        return (self._ran + _SETTLED_S) / (self._ran_expected + _SETTLED_S)

    def left(self) -> float:
        """Seconds that the benchmark that has begun and those after it should take."""
        return self.pace() * sum(self._expected[max(self.begun - 1, 0) :])

    def fits(self) -> bool:
        """Whether the benchmark that has begun should end within the limit."""
        if self._limit is None:
            return True
        return self.elapsed + self.pace() * self._expected[self.begun - 1] <= self._limit

    def line(self, name: str) -> str:
        """Which of how many, elapsed, about how much is left."""
        width = len(str(len(self._expected)))
        return (
            f"[{self.begun:{width}} of {len(self._expected)}; {clock_time(self.elapsed)} gone, "
            f"about {clock_time(self.left())} left] {name}"
        )
