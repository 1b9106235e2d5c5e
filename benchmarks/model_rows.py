"""Rows of the kernel model's file: what is kept of a launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from cards import kind
from kernel_work import Programs
from predict import Kernel, Prediction, loops_of
from sass import Instruction, Item

Row = dict[str, Any]


def significant(value: float) -> float:
    """Four digits: the model is not worth more, and files stay the same where sums differ."""
    return float(f"{value:.4g}")


def inner_loop(kernel: Kernel, work: Programs) -> dict[str, int]:
    """Instructions of the loop with the most products of its own, or the longest, by kind, as they
    stand in the code; where nothing is repeated, of the whole way.
    """
    way = kernel.ways[work.way or 0]
    repeated = dict(zip(loops_of(way), work.trips, strict=True))

    def all_of(items: Sequence[Item]) -> Iterator[Instruction]:
        for item in items:
            if isinstance(item, Instruction):
                yield item
            else:
                yield from all_of(item[1])

    def loops(items: Sequence[Item]) -> Iterator[list[Item]]:
        for item in items:
            if not isinstance(item, Instruction) and repeated[item[0]]:
                yield item[1]
                yield from loops(item[1])

    def own_products(items: Sequence[Item]) -> tuple[int, int]:
        own = [item for item in items if isinstance(item, Instruction)]
        return sum(kind(x) == "tensor" for x in own), len(own)

    longest = max(loops(way), key=own_products, default=way)
    return dict(sorted(Counter(map(kind, all_of(longest))).items()))


def launch_row(kernel: Kernel, found: Prediction, work: Programs) -> Row:
    """A launch: what its code needs, how it fills the card, and what its time is made of.

    Args:
        kernel, found: Its code and time.
        work: Of its programs, those whose loops are shown.
    """
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
        "trips": [significant(x) for x in work.trips],
        "inner_loop": inner_loop(kernel, work),
        "seconds": significant(found.seconds),
        "bound": found.bound,
        "parts_s": {name: significant(x) for name, x in sorted(found.parts_s.items())},
    }
