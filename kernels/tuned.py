"""Launch parameters that were fastest in a sweep on a GPU: `tuned.json` in an op's folder.

    {"90": {"self_forward/causal": [{"block_m": 32, "block_n": 64, "num_warps": 2, ...}]}}

holds, for compute capability 9.0 and one class of calls, an entry for each kernel or part of the
work with its own tiles. The op's `config.py` defines the classes and computes whatever depends on
sizes; other calls and other GPUs use its formula. `benchmarks/tune.py` writes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

FILE_NAME = "tuned.json"
Entry = Mapping[str, Any]
# fields that are not counts
_FLAGS = {"interleaved", "joined"}
_MAY_BE_0 = {"uses"}
_MAY_BE_NONE = {"max_registers"}
_formula = [False]


@contextmanager
def formula_alone() -> Iterator[None]:
    """Within the block, calls use the formula, which is the baseline of a sweep."""
    before = _formula[0]
    _formula[0] = True
    try:
        yield
    finally:
        _formula[0] = before


class Tuned:
    """The tuned parameters of one op. The file is read once, on first use.

    Args:
        folder: The op's folder; without the file nothing is tuned.
        classes: The fields of each class's entries.
        lists: How many entries a class may have, if not one.
    """

    def __init__(
        self,
        folder: Path,
        classes: Mapping[str, tuple[str, ...]],
        lists: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.path = folder / FILE_NAME
        self.classes = classes
        self.lists = lists or {}

    def entries(self, capability: int, name: str) -> tuple[Entry, ...]:
        """The entries of a class; empty if nothing is tuned.

        Args:
            capability: The GPU's compute capability times 10.
            name: Name of the class.

        Raises:
            ValueError: the file is malformed.
        """
        return () if _formula[0] else self.table.get((capability, name), ())

    @cached_property
    def table(self) -> dict[tuple[int, str], tuple[Entry, ...]]:
        """All entries, by capability and class."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        try:
            return self._parse(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{self.path}: malformed: {error}") from None

    def _parse(self, data: Any) -> dict[tuple[int, str], tuple[Entry, ...]]:
        found = {}
        for capability, classes in _items(data, "the file"):
            if not capability.isdecimal():
                raise ValueError(f"{capability!r} is no compute capability")
            for name, entries in _items(classes, capability):
                if name not in self.classes:
                    raise ValueError(f"no class {name!r}; there are {', '.join(self.classes)}")
                counts = self.lists.get(name, (1,))
                if not isinstance(entries, list) or len(entries) not in counts:
                    raise ValueError(f"{name}: expected a list of {' or '.join(map(str, counts))}")
                for entry in entries:
                    self._check(name, dict(_items(entry, name)))
                found[int(capability), name] = tuple(entries)
        return found

    def _check(self, name: str, entry: Entry) -> None:
        expected = self.classes[name]
        if set(entry) != set(expected):
            raise ValueError(f"{name}: expected {', '.join(expected)}, not {', '.join(entry)}")
        for field, value in entry.items():
            right = value is None and field in _MAY_BE_NONE
            if field in _FLAGS:
                right = isinstance(value, bool)
            elif isinstance(value, int):
                # bool is a subclass of int
                least = 0 if field in _MAY_BE_0 else 1
                right = not isinstance(value, bool) and value >= least
            if not right:
                raise ValueError(f"{name}: {field} cannot be {value!r}")


def _items(data: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: expected an object")
    return list(data.items())
