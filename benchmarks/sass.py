"""Machine code as `cuobjdump --dump-sass` prints it: instructions, loops, and a warp's time alone.

Since Volta the compiler schedules in the instruction itself: cycles to wait after it, scoreboards
that a load sets and those that an instruction waits for. With latencies for what scoreboards stand
for, a warp can be replayed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

_FIRST = re.compile(
    r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z][A-Z0-9_]*)(?P<rest>[^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/"
)
_SECOND = re.compile(r"^\s*/\* 0x(?P<word>[0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        at: Address in bytes.
        name: Without suffixes: `"FFMA"`.
        suffixes: What follows it, each with its dot: `".E.128"`.
        operands: The rest of the text.
        guard: The predicate, `"!P0"`, or an empty string.
        stall: Cycles until the same warp's next instruction.
        sets: Scoreboards set until the result is there, and until operands were read; None: none.
        waits: Scoreboards that must be clear before.
    """

    at: int
    name: str
    suffixes: str
    operands: str
    guard: str = ""
    stall: int = 1
    sets: tuple[int | None, int | None] = (None, None)
    waits: tuple[int, ...] = ()

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes."""
        found = _TARGET.search(self.operands) if self.name in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    """The instructions of one function; what follows the last exit as padding is left out.

    Raises:
        ValueError: there are none.
    """
    found: list[Instruction] = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        first, second = _FIRST.search(line), _SECOND.match(following)
        if first is None or second is None:
            continue
        # bits 105 to 121 of 128: stall 4, yield 1, two scoreboards of 3, and 6 to wait for
        control = int(second["word"], 16) >> 41
        written, read, mask = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        suffixes, _, operands = first["rest"].partition(" ")
        found.append(
            Instruction(
                int(first["at"], 16),
                first["name"],
                suffixes,
                operands.strip(),
                first["guard"] or "",
                control & 15,
                (None if written == 7 else written, None if read == 7 else read),
                tuple(i for i in range(6) if mask >> i & 1),
            )
        )
    if not found:
        raise ValueError(f"no instructions in {text[:80]!r}")
    while len(found) > 1 and (found[-1].name == "NOP" or found[-1].target == found[-1].at):
        found.pop()
    return found


@dataclass(frozen=True)
class Loop:
    """A loop of machine code: instructions `first` to `last`, by place, with those within.

    Attributes:
        first, last: Places of the first instruction and of the branch back.
        inner: Loops inside, in order.
    """

    first: int
    last: int
    inner: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Code:
    """A function.

    Attributes:
        instructions: In order of address.
    """

    instructions: Sequence[Instruction]

    @classmethod
    def of(cls, text: str) -> Code:
        """From `cuobjdump`'s text."""
        return cls(parse(text))

    @cached_property
    def jumps(self) -> dict[int, int]:
        """By place, where branches go. A call of what never returns is one: a way out of a long
        loop. Other calls, of subroutines for divisions by odd numbers, are not.
        """
        place = {x.at: i for i, x in enumerate(self.instructions)}
        found = {i: place[x.target] for i, x in enumerate(self.instructions) if x.target in place}

        def returns(start: int) -> bool:
            seen, left = set(), [start]
            while left:
                i = left.pop()
                if i in seen or i >= len(self.instructions):
                    continue
                seen.add(i)
                x = self.instructions[i]
                if x.name == "RET":
                    return True
                if x.name == "BRA" and i in found:
                    left.append(found[i])
                if x.guard or x.name not in ("BRA", "EXIT"):
                    left.append(i + 1)
            return False

        calls = [i for i in found if self.instructions[i].name == "CALL"]
        return {i: to for i, to in found.items() if i not in calls or not returns(to)}

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in order: what lies between a branch back and where it goes."""
        spans: dict[int, int] = {}
        for i, to in self.jumps.items():
            if to < i:
                spans[to] = max(i, spans.get(to, 0))

        def within(first: int, last: int) -> tuple[Loop, ...]:
            found: list[Loop] = []
            for start in sorted(spans):
                end = spans[start]
                inside = first <= start and end <= last and (start, end) != (first, last)
                if inside and not (found and start <= found[-1].last):
                    found.append(Loop(start, end, within(start, end)))
            return tuple(found)

        return within(-1, len(self.instructions))

    @cached_property
    def leaders(self) -> list[int]:
        """Places where straight pieces of code begin."""
        found = {0, *self.jumps.values(), *(i + 1 for i in self.jumps)}
        found |= {i + 1 for i, x in enumerate(self.instructions) if x.name in ("EXIT", "RET")}
        return sorted(p for p in found if p < len(self.instructions))

    def edges(self) -> dict[int, list[int]]:
        """By the beginning of each straight piece, those that may follow."""
        ends = [*self.leaders[1:], len(self.instructions)]
        found: dict[int, list[int]] = {}
        for begin, end in zip(self.leaders, ends, strict=True):
            last = self.instructions[end - 1]
            found[begin] = []
            if end - 1 in self.jumps:
                found[begin].append(self.jumps[end - 1])
            leaves = last.name in ("EXIT", "BRA", "RET") and not last.guard
            # a branch may also be guarded by its first operand
            if last.name == "BRA" and re.match(r"!?U?P\d", last.operands):
                leaves = False
            if not leaves and end < len(self.instructions):
                found[begin].append(end)
        return found

    def _reached(self, start: int, edges: dict[int, list[int]]) -> set[int]:
        seen, left = {start}, [start]
        while left:
            for piece in edges[left.pop()]:
                if piece not in seen:
                    seen.add(piece)
                    left.append(piece)
        return seen

    def paths(self, is_hot: Callable[[Instruction], bool]) -> list[set[int]]:
        """Ways through the code, a set of places for each: pieces from which hot instructions are
        reached, or that are reached from them. Hot pieces of which neither reaches the other are on
        different ways; without any hot instruction everything is one way.
        """
        edges = self.edges()
        back: dict[int, list[int]] = {piece: [] for piece in edges}
        for piece, following in edges.items():
            for other in following:
                back[other].append(piece)
        ends = dict(zip(self.leaders, [*self.leaders[1:], len(self.instructions)], strict=True))
        hot = [
            piece
            for piece in self.leaders
            if any(is_hot(x) for x in self.instructions[piece : ends[piece]])
        ]
        # subroutines after the last exit are not reached
        whole = self._reached(0, edges)
        hot = [piece for piece in hot if piece in whole]
        if not hot:
            return [{i for p in whole for i in range(p, ends[p])}]
        touching = {p: self._reached(p, edges) | self._reached(p, back) for p in hot}
        ways: list[list[int]] = []
        for piece in hot:
            for way in ways:
                if all(other in touching[piece] for other in way):
                    way.append(piece)
                    break
            else:
                ways.append([piece])
        return [
            {
                i
                for p in set.intersection(whole, *(touching[h] for h in way))
                for i in range(p, ends[p])
            }
            for way in ways
        ]


Item = Instruction | tuple[Loop, list["Item"]]


def outline(code: Code, way: set[int]) -> list[Item]:
    """The instructions of a way in order; a loop is itself with what it holds."""

    def between(first: int, last: int, loops: Sequence[Loop]) -> Iterator[Item]:
        place = first
        for loop in loops:
            yield from (code.instructions[i] for i in range(place, loop.first) if i in way)
            held = list(between(loop.first, loop.last + 1, loop.inner))
            if held:
                yield loop, held
            place = loop.last + 1
        yield from (code.instructions[i] for i in range(place, last) if i in way)

    return list(between(0, len(code.instructions), code.loops))


class Warp:
    """Replays one warp that has a processor to itself.

    Args:
        latency: Cycles from an instruction's issue until its result is there.
        tensor_cycles: Cycles that an asynchronous product keeps the tensor cores.
    """

    def __init__(
        self,
        latency: Callable[[Instruction], float],
        tensor_cycles: Callable[[Instruction], float],
    ) -> None:
        self.latency, self.tensor_cycles = latency, tensor_cycles
        self.now = 0.0
        self.boards = [0.0] * 6
        self.copies: list[float] = []  # asynchronous, by group
        self.copy = 0.0
        self.product = 0.0  # when the tensor cores are free

    def run(self, items: Sequence[Item], trips: Callable[[Loop], float]) -> float:
        """Cycles until the last instruction was issued."""
        for item in items:
            if isinstance(item, Instruction):
                self._issue(item)
                continue
            loop, held = item
            times = trips(loop)
            begin = self.now
            if times > 0:
                self.run(held, trips)
            if times > 1:
                begin = self.now
                self.run(held, trips)
                self._skip((times - 2) * (self.now - begin))
            elif 0 < times < 1:
                # some programs do not enter
                self.now = begin + times * (self.now - begin)
        return self.now

    def _skip(self, cycles: float) -> None:
        self.now += cycles
        self.boards = [x + cycles for x in self.boards]
        self.copies = [x + cycles for x in self.copies[-8:]]
        self.copy += cycles
        self.product += cycles

    def _issue(self, x: Instruction) -> None:
        for board in x.waits:
            self.now = max(self.now, self.boards[board])
        if x.name == "LDGSTS":
            self.copy = max(self.copy, self.now + self.latency(x))
        elif x.name == "LDGDEPBAR":
            self.copies.append(self.copy)
        elif x.name == "DEPBAR" and self.copies:
            left = int(x.operands.rsplit(",", 1)[-1].strip(" {}"), 16) if "," in x.operands else 0
            done = self.copies[: len(self.copies) - left]
            self.now = max([self.now, *done[-1:]])
        elif x.name == "HGMMA":
            self.product = max(self.product, self.now) + self.tensor_cycles(x)
        elif x.name == "WARPGROUP" and "DEPBAR" in x.suffixes:
            # of several groups the earlier ones are taken for done
            left = int(x.operands.rsplit(",", 1)[-1].strip(), 16)
            if left == 0:
                self.now = max(self.now, self.product + self.latency(x))
        elif x.name == "BAR":
            self.now += self.latency(x)
        for board, kind in zip(x.sets, (self.latency(x), 10.0), strict=True):
            if board is not None:
                self.boards[board] = max(self.boards[board], self.now + kind)
        self.now += max(x.stall, 1)
