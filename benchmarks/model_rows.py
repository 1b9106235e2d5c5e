"""Rows of the kernel model's file: what is kept of a launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from cards import kind
from predict import Kernel, Prediction
from sass import Instruction, Item

Row = dict[str, Any]


def significant(value: float) -> float:
    """Four digits: the model is not worth more, and files stay the same where sums differ."""
    return float(f"{value:.4g}")


def inner_loop(kernel: Kernel) -> dict[str, int]:
    """Instructions of the innermost loop with the most products, or the longest; where there is no
    loop, of the longest way from start to end: by kind, as they stand in the code.
    """

    def all_of(items: Sequence[Item]) -> Iterator[Instruction]:
        for item in items:
            if isinstance(item, Instruction):
                yield item
            else:
                yield from all_of(item[1])

    def inner(items: Sequence[Item]) -> Iterator[list[Item]]:
        for item in items:
            if not isinstance(item, Instruction):
                yield from (list(inner(item[1])) or [item[1]])

    held = [list(all_of(items)) for way in kernel.ways for items in inner(way)]
    held = held or [list(all_of(way)) for way in kernel.ways]
    longest = max(held, key=lambda x: (sum(kind(i) == "tensor" for i in x), len(x)))
    return dict(sorted(Counter(map(kind, longest)).items()))


def launch_row(kernel: Kernel, found: Prediction, trips: Sequence[float]) -> Row:
    """A launch: what its code needs, how it fills the card, and what its time is made of."""
    return {
        "kernel": kernel.name,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack_bytes,
        "shared_bytes": kernel.shared_bytes,
        "warps": kernel.warps,
        "blocks": found.occupancy.blocks,
        "limit": found.occupancy.limit,
        "programs": kernel.grid,
        "waves": significant(found.waves),
        "trips": [significant(x) for x in trips],
        "inner_loop": inner_loop(kernel),
        "seconds": significant(found.seconds),
        "bound": found.bound,
        "parts_s": {name: significant(x) for name, x in sorted(found.parts_s.items())},
    }
