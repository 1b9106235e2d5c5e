"""How much of the data may be unusable where `on_error: skip` leaves it out, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

OnError = Literal["raise", "skip"]
MOST_SKIPPED = 0.01
_MOST_TOLD = 3


@dataclass(frozen=True)
class LeftOut:
    """What is left out of the data.

    Attributes:
        where: file and line, or record of a table.
        reason: why it cannot be used.
        image: the key that cannot be used; empty if it is the row.
    """

    where: str
    reason: str
    image: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def most_skipped(max_skipped: float | None, total: int) -> int:
    """How many of `total` may be unusable.

    Args:
        max_skipped: a count, or below 1 a share, which is rounded up; None: `MOST_SKIPPED`.
        total: usable or not.
    """
    limit = MOST_SKIPPED if max_skipped is None else max_skipped
    return limit if isinstance(limit, int) else math.ceil(limit * total)


def check_skipped(
    found: Sequence[LeftOut | str], max_skipped: float | None, total: int, what: str, count: int = 0
) -> None:
    """Refuse data of which more is unusable than the limit allows.

    Args:
        found: what is unusable, of which the first few are told.
        max_skipped: as in `most_skipped`.
        total: of which `found` are.
        what: the total is of, such as "records of the run".
        count: how many are unusable, if more than `found`.

    Raises:
        ValueError: one line with the count, the limit and the first few.
    """
    limit, count = most_skipped(max_skipped, total), max(count, len(found))
    if count <= limit:
        return
    shown = "; ".join(str(each) for each in found[:_MOST_TOLD])
    more = f"; and {count - _MOST_TOLD} more" if count > _MOST_TOLD else ""
    stated = MOST_SKIPPED if max_skipped is None else max_skipped
    raise ValueError(
        f"{count} of {total} {what} cannot be used, more than the {limit} of max_skipped {stated}: "
        f"{shown}{more}"
    )
