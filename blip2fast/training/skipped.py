"""What a run replaced or left out (`data.on_error: skip`): its count, list and limit.

`skipped.jsonl` in the run's folder has a line for each record, once: the step that first drew it,
where it is, its image, and why it cannot be used. Step 0: left out before the first step.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from blip2fast.data.batches import Unusable
from blip2fast.data.manifest import naming, replace_file
from blip2fast.data.skipping import LeftOut, check_skipped

SKIPPED = "skipped.jsonl"
_MOST_SAID = 10


@dataclass(frozen=True)
class LeftOutBefore:
    """What a run leaves out before its first step, where `data.on_error` is `skip`.

    Attributes:
        train: rows that make no record.
        held_out: rows that make no record, and records with an unusable image.
        whereabouts: file and line of records of the run, by number.
    """

    train: Sequence[LeftOut]
    held_out: Sequence[LeftOut]
    whereabouts: Callable[[Collection[int]], Mapping[int, str]]


class SkippedSamples:
    """Keeps account of the unusable records of all processes; its file is rank 0's.

    Args:
        folder: the run's output folder. Lines after `start_step` are removed from the list, so a
            resumed run leaves the one of an uninterrupted run.
        before: what was left out before the first step.
        total: records of the run, usable or not.
        max_skipped: as in `blip2fast.data.skipping.most_skipped`.
        start_step: steps already taken.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        before: LeftOutBefore,
        total: int,
        max_skipped: float | None,
        start_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._before, self._total, self._most, self._say = before, total, max_skipped, say
        self._path = folder / SKIPPED
        self._new: list[tuple[int, Unusable]] = []
        self._records: set[int] = set()
        self._listed: list[LeftOut] = []
        self._file: TextIO | None = None
        if dist.get_rank() == 0:
            self._open(start_step)

    def __enter__(self) -> SkippedSamples:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # an error of closing must not take the place of the one that ends the run
        with contextlib.suppress(*() if kind is None else (OSError,)):
            self.close()

    @property
    def news(self) -> bool:
        """Whether this process has replaced samples that the others do not know of."""
        return bool(self._new)

    def add(self, step: int, replaced: Sequence[Unusable]) -> None:
        """Note what was replaced in a batch of optimizer step `step`, counted from 1."""
        self._new += [(step, each) for each in replaced]

    def exchange(self) -> int:
        """Tell all processes; every one of them must call this.

        Returns:
            How many samples were replaced since the last call, over all processes.

        Raises:
            ValueError: more records are unusable than the limit allows, on every process.
        """
        own, self._new = self._new, []
        every: list[Any] = [own]
        if dist.get_world_size() > 1:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
        found = sorted((e for each in every for e in each), key=lambda e: (e[0], e[1].place))
        fault: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._list(found)
            except (ValueError, OSError) as error:
                fault[0] = str(error)
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(fault)
        if fault[0] is not None:
            raise ValueError(fault[0])
        return len({(step, each.place) for step, each in found})

    def flush(self) -> None:
        """Flush the list to disk, before a checkpoint."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Say how much was skipped, and close the list."""
        if self._file is not None:
            with naming(self._path):
                self._file.close()
            count = len(self._listed)
            if count:
                self._say(f"{count} record(s) could not be used; they are listed in {self._path}")
            elif self._path.stat().st_size == 0:
                self._path.unlink()

    def _open(self, start_step: int) -> None:
        lines = _lines(self._path) if start_step else []
        kept = [line for line in lines if 0 < line["step"] <= start_step]
        self._listed = [LeftOut(e["where"], e["reason"], e["image"]) for e in kept]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        start = [("train", each) for each in self._before.train]
        start += [("held_out", each) for each in self._before.held_out]
        first = "".join(_line(0, split, each) for split, each in start)
        replace_file(self._path, lambda aside: aside.write_text(first + text, encoding="utf-8"))
        self._listed = [*self._before.train, *self._listed]
        self._file = self._path.open("a", encoding="utf-8")
        for split, found in (("", self._before.train), ("held-out ", self._before.held_out)):
            if found:
                self._say(
                    f"{len(found)} {split}record(s) left out, as on_error is skip; the first: "
                    f"{found[0]}"
                )

    def _list(self, found: Sequence[tuple[int, Unusable]]) -> None:
        """Write a line for each record that has none, and judge their number."""
        fresh: dict[int, tuple[int, Unusable]] = {}
        for step, each in found:
            if each.record not in self._records:
                fresh.setdefault(each.record, (step, each))
        self._records |= fresh.keys()
        known = {each.where for each in self._listed}
        places = self._before.whereabouts(fresh.keys()) if fresh else {}
        with naming(self._path):
            for record, (step, each) in fresh.items():
                if places[record] in known:
                    continue  # before the resume
                entry = LeftOut(places[record], each.reason, each.image)
                self._listed.append(entry)
                if self._file is not None:
                    self._file.write(_line(step, "train", entry))
                if len(self._listed) <= _MOST_SAID:
                    self._say(f"step {step}: {entry}: replaced")
            if self._file is not None:
                self._file.flush()
        check_skipped(self._listed, self._most, self._total, "records (data.on_error: skip)")


def _line(step: int, split: str, entry: LeftOut) -> str:
    values = {"step": step, "split": split, "where": entry.where, "image": entry.image}
    return json.dumps({**values, "reason": entry.reason}, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the list; a crash may have cut the last one off."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        found.append(values)
    return found
