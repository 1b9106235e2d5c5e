"""What of some weights was taken, and what was new or left out, as a few lines of text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_MOST = 6  # patterns listed before they are shortened


@dataclass(frozen=True)
class Report:
    """The fate of every tensor.

    Attributes:
        title: where the weights are, and what they are.
        taken: number of tensors that were taken.
        missing: names that are wanted and not there.
        left: names that are there and not wanted, by reason.
        missing_means: what became of the missing ones, such as "new".
        notes: sentences about what else changes.
    """

    title: str
    taken: int
    missing: list[str]
    left: Mapping[str, list[str]]
    missing_means: str = "missing"
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.title, f"  taken: {self.taken} tensors"]
        missing = "; ".join(patterns(self.missing)) or "none"
        lines.append(f"  {self.missing_means}: {missing}")
        lines += [
            f"  left out ({reason}): {'; '.join(patterns(names))}"
            for reason, names in self.left.items()
        ]
        if not self.left:
            lines.append("  left out: none")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def patterns(names: Iterable[str]) -> list[str]:
    """Names with `*` for numbers, each with its count; shortened to their first part if many."""
    counts = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    if len(counts) > _MOST:
        shorter: Counter[str] = Counter()
        for name, count in counts.items():
            first, dot, _ = name.partition(".")
            shorter[f"{first}.*" if dot else name] += count
        counts = shorter
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
