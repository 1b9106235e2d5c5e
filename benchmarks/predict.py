"""A kernel's time from its machine code: what a warp issues, its time alone, and what is moved.

A multiprocessor works on as many blocks as it holds. They take as long as one of them alone, or as
long as the busiest unit needs for all of them, whichever is more (a soft maximum). The launch takes
the more of that, over its waves of blocks, and of the time to move its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cards import PARTITIONS, Card, Occupancy, cycles, kind, moved_bytes, occupancy, unit
from kernel_work import NotModelled, Programs
from sass import Code, Instruction, Item, Loop, Warp, outline


@dataclass(frozen=True)
class Constants:
    """What is not in a data sheet.

    Attributes:
        memory_cycles: From a load to its value, beyond the first-level cache.
        cached_cycles: The same of what was asked for ahead, or written shortly before.
        barrier_cycles: Lost at a barrier of a block.
        tensor_cycles: From the last product to its sums in registers.
        sharpness: Exponent of the soft maximum of a multiprocessor's times.
        overlap: The same of computing and moving.
        launch_s: A launch in a captured graph.
        plain_s: One of PyTorch's own small kernels in a captured graph.
    """

    memory_cycles: float = 900
    cached_cycles: float = 300
    barrier_cycles: float = 60
    tensor_cycles: float = 35
    sharpness: float = 4
    overlap: float = 4
    launch_s: float = 1e-6
    plain_s: float = 3.5e-6


# cycles until a result is there
_LATENCIES = {"shared": 33, "special": 40, "shuffle": 25, "uniform": 30, "barrier": 0}


@dataclass(frozen=True)
class Kernel:
    """Machine code and what it needs.

    Attributes:
        name: Of the function.
        code: Its instructions.
        registers, stack_bytes: Of a thread; the stack has what registers did not suffice for.
        shared_bytes, warps: Of a block.
        grid: Blocks.
    """

    name: str
    code: Code
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    grid: int

    @cached_property
    def ways(self) -> list[list[Item]]:
        """Through the code, the shortest first."""
        found = self.code.paths(lambda x: kind(x) == "tensor")
        return [outline(self.code, way) for way in sorted(found, key=len)]

    @cached_property
    def entry(self) -> list[Item]:
        """What a program executes that has nothing to do: up to the first branch away."""
        found: list[Item] = []
        for x in self.code.instructions:
            found.append(x)
            if x.name == "EXIT" or (x.name == "BRA" and (x.target or 0) > x.at + 0x800):
                break
        return found


def loops_of(items: Iterable[Item]) -> list[Loop]:
    """Outer loops before their inner ones."""
    found: list[Loop] = []
    for item in items:
        if not isinstance(item, Instruction):
            found += [item[0], *loops_of(item[1])]
    return found


def executed(items: Sequence[Item], trips: Mapping[Loop, float]) -> Counter[Instruction]:
    """How often a warp executes each instruction."""
    found: Counter[Instruction] = Counter()
    for item in items:
        if isinstance(item, Instruction):
            found[item] += 1
        else:
            for x, times in executed(item[1], trips).items():
                found[x] += times * trips[item[0]]
    return found


@dataclass(frozen=True)
class Part:
    """Programs of a kernel that do the same, on a card.

    Attributes:
        count: How many.
        alone_cycles: Of one warp that has a partition to itself.
        issued: Instructions of a warp, by kind.
        busy_cycles: Of a partition, for one warp, by unit; `"issue"` is the scheduler.
        loaded_bytes: Of a warp.
    """

    count: float
    alone_cycles: float
    issued: Mapping[str, float]
    busy_cycles: Mapping[str, float]
    loaded_bytes: float


@dataclass(frozen=True)
class Prediction:
    """A launch's.

    Attributes:
        seconds: In all.
        bound: What it waits for most: `"memory"`, `"cache"`, `"latency"`, `"issue"` or a unit.
        parts_s: The time that each of these would take by itself.
        occupancy: Blocks of a multiprocessor.
        waves: How often the multiprocessors are filled.
    """

    seconds: float
    bound: str
    parts_s: Mapping[str, float]
    occupancy: Occupancy
    waves: float
    parts: Sequence[Part] = field(default=(), repr=False)


def soft_maximum(values: Iterable[float], exponent: float) -> float:
    """Their maximum, or up to their sum where several are close."""
    held = [x for x in values if x > 0]
    top = max(held, default=0.0)
    return top * sum((x / top) ** exponent for x in held) ** (1 / exponent) if held else 0.0


def part_of(card: Card, kernel: Kernel, programs: Programs, constants: Constants) -> Part:
    """Count and replay the instructions of some programs.

    Raises:
        NotModelled: the code has other ways or loops than the programs take.
    """
    if programs.way is None:
        items, trips = kernel.entry, {}
    else:
        if programs.way >= len(kernel.ways):
            raise NotModelled(f"{len(kernel.ways)} ways, not {programs.way + 1}")
        items = kernel.ways[programs.way]
        loops = loops_of(items)
        if len(loops) != len(programs.trips):
            raise NotModelled(f"{len(loops)} loops in the machine code, not {len(programs.trips)}")
        trips = dict(zip(loops, programs.trips, strict=True))
    counts = executed(items, trips)
    issued: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for x, times in counts.items():
        issued[kind(x)] += times
        busy["issue"] += times
        busy[unit(x)] += times * cycles(card, x)

    def latency(x: Instruction) -> float:
        if x.name in ("LDG", "LDGSTS", "LDL"):
            return constants.memory_cycles
        if x.name == "BAR":
            return constants.barrier_cycles
        if x.name in ("WARPGROUP", "HMMA"):
            return constants.tensor_cycles
        return _LATENCIES.get(kind(x), 20)

    alone = Warp(latency, lambda x: cycles(card, x)).run(items, trips.__getitem__)
    moved = sum(times * moved_bytes(x) for x, times in counts.items())
    return Part(programs.count, alone, issued, busy, moved)


def predict(
    card: Card,
    kernel: Kernel,
    programs: Sequence[Programs],
    moved: float,
    constants: Constants,
    cached: float | None = None,
) -> Prediction:
    """The time of a launch.

    Args:
        card: Which.
        kernel: Its code.
        programs: What its blocks do.
        moved: Bytes from and to memory.
        constants: See there.
        cached: Bytes between the second-level cache and the multiprocessors; None: what the code
            asks for, as if nothing were in a first-level cache.

    Raises:
        NotModelled: no block fits, or as in `part_of`.
    """
    held = occupancy(card, kernel.registers, kernel.shared_bytes, kernel.warps)
    if not held.blocks:
        raise NotModelled(f"a block does not fit: {held.limit}")
    parts = [part_of(card, kernel, each, constants) for each in programs]
    total = 0.0
    times: Counter[str] = Counter()
    for part in parts:
        # blocks on the fullest multiprocessor
        blocks = part.count / card.multiprocessors
        full, rest = divmod(blocks, held.blocks)
        rounds = [(full, float(held.blocks))] if full else []
        if rest and full < 4:
            rounds.append((1.0, float(-(-rest // 1))))
        elif rest:
            # among many waves the last one does not stand out
            rounds.append((rest / held.blocks, float(held.blocks)))
        for turns, at_once in rounds:
            warps = max(at_once * kernel.warps / PARTITIONS, 1.0)
            needs = {name: warps * busy for name, busy in part.busy_cycles.items()}
            needs["latency"] = part.alone_cycles
            total += turns * soft_maximum(needs.values(), constants.sharpness)
            for name, value in needs.items():
                times[name] += turns * value
    found: dict[str, Any] = {name: value / card.clock_hz for name, value in times.items()}
    loaded = (
        cached
        if cached is not None
        else sum(part.loaded_bytes * part.count for part in parts) * kernel.warps
    )
    own = {"memory": moved / card.bytes_per_s, "cache": loaded / card.l2_bytes_per_s}
    seconds = soft_maximum([total / card.clock_hz, *own.values()], constants.overlap)
    found |= own
    return Prediction(
        seconds + constants.launch_s,
        max(found, key=found.__getitem__),
        found,
        held,
        kernel.grid / (held.blocks * card.multiprocessors),
        parts,
    )
