"""A progress bar of rows whose number is not known before they are read."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

_EVERY = 1000


class RowBar:
    """A bar with the rate of rows and the time left, on a terminal.

    How many rows there will be is estimated from the share of the sources that has been read.

    Args:
        sources: how many there are; each counts alike.
    """

    def __init__(self, sources: int) -> None:
        self.rows = 0
        self._sources = sources
        self._bar = tqdm(unit=" rows", unit_scale=True, disable=None)

    def add(self, source: int, share: float) -> None:
        """Count a row of source number `source`, of which `share` has been read."""
        self.rows += 1
        self._bar.update()
        if self.rows % _EVERY == 0 and source + share > 0:
            self._bar.total = self.estimate(source, share)

    def estimate(self, source: int, share: float) -> int:
        """How many rows there are likely to be."""
        return round(self.rows * self._sources / (source + share))

    def __enter__(self) -> RowBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
