"""Result files: pytest-benchmark's JSON reduced to what the tables and plots need.

One file a suite, machine and day, `results/DATE_SUITE_MACHINE.json`: `runs` holds the conditions of
each run, `cells` the numbers by benchmark, each with the place of its run in `runs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fingerprint import short_name

RESULTS = Path(__file__).parent / "results"
_NAME = re.compile(r"(?P<date>\d{4}-\d\d-\d\d)_(?P<suite>\w+)_(?P<machine>[a-z0-9-]+)\.json")
_KEPT = ("contenders", "work", "ceilings")


@dataclass(frozen=True)
class ResultFile:
    """A suite's results on a machine.

    Attributes:
        suite: The stem of the benchmark file, without `bench_`.
        machine: Its device, in letters and digits; of processors also family, model and stepping,
            which results before 2026-11-27 did not record.
        date: ISO.
        runs: Conditions of each run.
        cells: By name, numbers of each benchmark.
    """

    suite: str
    machine: str
    date: str
    runs: list[dict[str, Any]]
    cells: dict[str, dict[str, Any]]

    @property
    def on_gpu(self) -> bool:
        """Whether the device was a GPU."""
        return bool(self.runs[0]["device"] != self.runs[0]["processor"])

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return RESULTS / f"{self.date}_{self.suite}_{self.machine}.json"

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        """Read what `write` wrote.

        Raises:
            ValueError: the name is not that of a result file.
        """
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise ValueError(f"{path}: expected DATE_SUITE_MACHINE.json")
        held = json.loads(path.read_text())
        return cls(name["suite"], name["machine"], name["date"], held["runs"], held["cells"])

    def write(self, folder: Path = RESULTS) -> Path:
        """Write it into a folder; what is there of other cells stays."""
        path = folder / self.path.name
        whole = merge(ResultFile.read(path), self) if path.exists() else self
        held = {"runs": whole.runs, "cells": whole.cells}
        path.write_text(json.dumps(rounded(held), indent=1) + "\n")
        return path


def slug(device: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` to `"h100-80gb-hbm3"`."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join(word for word in words if word not in ("nvidia", "r", "tm", "processor"))


def machine_name(run: dict[str, Any]) -> str:
    """The device, and of a processor what tells it from others of its name."""
    found = run.get("fingerprint")
    return "-".join([slug(run["device"]), *([slug(short_name(found))] if found else [])])


def reduce(raw: dict[str, Any]) -> list[ResultFile]:
    """What one pytest-benchmark JSON says, a file for each suite in it.

    Benchmarks without contenders or conditions are left out.
    """
    files: dict[tuple[str, str, str], ResultFile] = {}
    for benchmark in raw["benchmarks"]:
        info = benchmark["extra_info"]
        if not {"contenders", "conditions"} <= info.keys():
            continue
        suite = Path(benchmark["fullname"].split("::")[0]).stem.removeprefix("bench_")
        run = {name: value for name, value in info["conditions"].items() if name != "dtype"}
        key = (suite, machine_name(run), run["date"])
        file = files.setdefault(key, ResultFile(*key, [run], {}))
        if run not in file.runs:
            file.runs.append(run)
        cell = {name: info[name] for name in _KEPT if name in info}
        cell |= {"dtype": info["conditions"]["dtype"], "run": file.runs.index(run)}
        file.cells[benchmark["name"].removeprefix("bench_")] = cell
    return list(files.values())


def merge(old: ResultFile, new: ResultFile) -> ResultFile:
    """Both files' cells; of a cell in both the new one. Runs without cells go."""
    cells = {name: (old.runs[cell["run"]], cell) for name, cell in old.cells.items()}
    cells |= {name: (new.runs[cell["run"]], cell) for name, cell in new.cells.items()}
    runs: list[dict[str, Any]] = []
    for run, _ in cells.values():
        if run not in runs:
            runs.append(run)
    placed = {name: cell | {"run": runs.index(run)} for name, (run, cell) in cells.items()}
    return ResultFile(new.suite, new.machine, new.date, runs, placed)


def rounded(value: Any) -> Any:
    """Floats to five significant digits, in everything."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def newest(paths: Iterable[Path], suite: str) -> list[ResultFile]:
    """The latest file of a suite for each machine, GPUs before processors."""
    latest: dict[str, ResultFile] = {}
    for path in sorted(paths):
        name = _NAME.fullmatch(path.name)
        if name is not None and name["suite"] == suite:
            latest[name["machine"]] = ResultFile.read(path)
    return sorted(latest.values(), key=lambda file: (file.runs[0]["cuda"] is None, file.machine))
