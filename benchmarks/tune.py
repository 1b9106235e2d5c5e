"""Write down what a sweep found quickest, where the kernels look for it: `kernels/<op>/tuned.json`.

    python benchmarks/tune.py SWEEP.json [--kernels DIR] [--combined FILE]
    python benchmarks/tune.py --install FILE [--kernels DIR]    # what another machine found

A class of calls gets the configuration with the least geometric mean time over the dropout rates
that ran, and over the cases of the class, among those that agree with the reference and ran in all
of them. It keeps the default, which is the formula and is not written down, unless that is at least
3 % slower. Classes that the sweep has nothing of, and other GPUs, keep what they have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from kernel_configurations import CASES, Configuration

from blip2fast.kernels.tuned import FILE_NAME, Tuned

KERNELS = Path(__file__).parents[1] / "kernels"
OPS = sorted({case.tunes[0] for case in CASES})
# how much slower the default must be
GAIN = 1.03
# sweeps that say their capability need no name
CAPABILITIES = {"H100": 90, "H200": 90}
Files = dict[str, dict[str, Any]]


class Refused(Exception):
    """A file that nothing can be made of, in one line."""


@dataclass(frozen=True)
class Winner:
    """What a class gets.

    Attributes:
        op, name: Folder in `kernels/`, and the class.
        cases: What was timed.
        winner: A configuration, `"default"` or `""` where none ran and agreed.
        default_s, winner_s: Geometric mean times; None: not of all cases and rates.
        of_floor: The winner's share of the floor, the geometric mean.
    """

    op: str
    name: str
    cases: tuple[str, ...]
    winner: str
    default_s: float | None = None
    winner_s: float | None = None
    of_floor: float | None = None

    def __str__(self) -> str:
        cells = [f"{'+'.join(self.cases):56}", _microseconds(self.default_s)]
        cells += [f"{self.winner or 'none ran and agreed':32}", _microseconds(self.winner_s)]
        if self.default_s and self.winner_s:
            cells.append(f"{self.default_s / self.winner_s:6.2f}")
        else:
            cells.append(f"{'':6}")
        cells.append("" if self.of_floor is None else f"{100 * self.of_floor:5.0f} %")
        return " ".join(cells)


def _microseconds(seconds: float | None) -> str:
    return f"{'' if seconds is None else format(1e6 * seconds, '.1f'):>10}"


HEADER = f"{'case':56} {'default us':>10} {'winner':32} {'us':>10} {'ratio':>6} of floor"


def winners(rows: Sequence[Mapping[str, Any]]) -> Iterator[Winner]:
    """Of each class that the sweep timed, in the order of the cases."""
    classes: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        if any(row["case"] == case.name and "median_s" in row for row in rows):
            classes.setdefault(case.tunes, []).append(case.name)
    for (op, name), cases in classes.items():
        timed = [row for row in rows if row["case"] in cases and "median_s" in row]
        places = {(row["case"], row["dropout"]) for row in timed}
        times: dict[str, float] = {}
        eligible = []
        for configuration in dict.fromkeys(row["configuration"] for row in timed):
            own = [row for row in timed if row["configuration"] == configuration]
            if {(row["case"], row["dropout"]) for row in own} == places:
                times[configuration] = geometric_mean(row["median_s"] for row in own)
                if all(row["agrees"] for row in own):
                    eligible.append(configuration)
        found = min(eligible, key=times.__getitem__, default="")
        if "default" in eligible and times["default"] < GAIN * times[found]:
            found = "default"
        shares = [row["of_floor"] for row in timed if row["configuration"] == found]
        yield Winner(
            op,
            name,
            tuple(cases),
            found,
            times.get("default"),
            times.get(found),
            geometric_mean(shares) if shares and min(shares) > 0 else None,
        )


def configuration_of(cases: Sequence[str], name: str) -> Configuration:
    """A configuration, which all cases of a class have under its name."""
    found = [case.configurations[name] for case in CASES if case.name in cases]
    if any(each != found[0] for each in found):
        raise Refused(f"{name}: not the same in {' and '.join(cases)}")
    return found[0]


def entries_of(op: str, name: str, configuration: Configuration) -> list[dict[str, Any]]:
    """A class's entries, from a launcher's keyword arguments."""
    if "tiles" in configuration:
        tiles = configuration["tiles"]
        several = tiles if isinstance(tiles, tuple) else (tiles,)
    else:
        several = (configuration["config"],)
        if op == "itc" and name.startswith("backward"):
            several += (configuration.get("text_config", configuration["config"]),)
    fields = tuned_of(op, KERNELS).classes[name]
    return [{field: getattr(each, field) for field in fields} for each in several]


def tuned_of(op: str, kernels: Path) -> Tuned:
    """What an op has, read from a folder."""
    own = import_module(f"blip2fast.kernels.{op}.config").TUNED
    return Tuned(kernels / op, own.classes, own.lists)


def read_files(kernels: Path) -> Files:
    """The file of every op, checked; empty where there is none."""
    found: Files = {}
    for op in OPS:
        tuned = tuned_of(op, kernels)
        found[op] = json.loads(tuned.path.read_text()) if tuned.table else {}
    return found


def write_files(files: Files, kernels: Path) -> None:
    """All or, where one cannot be written, the first of them; each whole or not at all."""
    for op, data in files.items():
        write(kernels / op / FILE_NAME, data)


def write(path: Path, data: Any) -> None:
    """The same text for the same data."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1, sort_keys=True) + "\n")
        # as any other file: mkstemp's own is for its user alone
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def tune(sweep: Mapping[str, Any], files: Files) -> list[Winner]:
    """Put the winners into `files`."""
    capability, rows = str(capability_of(sweep)), sweep["rows"]
    if not any("median_s" in row for row in rows):
        raise Refused("the sweep has no times")
    found = list(winners(rows))
    for winner in found:
        classes = files[winner.op].setdefault(capability, {})
        if winner.winner in ("", "default"):
            classes.pop(winner.name, None)
        else:
            configuration = configuration_of(winner.cases, winner.winner)
            classes[winner.name] = entries_of(winner.op, winner.name, configuration)
        if not classes:
            del files[winner.op][capability]
    return found


def capability_of(sweep: Mapping[str, Any]) -> int:
    """The compute capability, times 10, of the GPU of a sweep."""
    conditions = sweep["conditions"]
    if "capability" in conditions:
        return int(conditions["capability"])
    device = str(conditions.get("device", ""))
    for name, capability in CAPABILITIES.items():
        if name in device:
            return capability
    raise Refused(f"the sweep is of no GPU: {device or 'no device named'}")


def install(combined: Any, kernels: Path) -> None:
    """Write the files of `--combined`, all checked before the first is written."""
    if not isinstance(combined, dict) or not set(combined) <= set(OPS):
        raise Refused(f"expected an object of {', '.join(OPS)}")
    with tempfile.TemporaryDirectory() as folder:
        for op, data in combined.items():
            (Path(folder) / op).mkdir()
            write(Path(folder) / op / FILE_NAME, data)
            _ = tuned_of(op, Path(folder)).table
    write_files(combined, kernels)


def read(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from None


def lines(found: Iterable[Winner]) -> Iterator[str]:
    """The table."""
    yield HEADER
    yield from map(str, found)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", nargs="?", type=Path, help="JSON file of sweep.py")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="where the ops' folders are")
    parser.add_argument(
        "--combined", type=Path, help="write the files of all ops here, as one, too"
    )
    parser.add_argument("--install", type=Path, metavar="FILE", help="write what --combined wrote")
    given = parser.parse_args(arguments)
    if (given.sweep is None) == (given.install is None):
        parser.error("either SWEEP.json or --install FILE")
    try:
        if given.install is not None:
            install(read(given.install), given.kernels)
            return 0
        sweep = read(given.sweep)
        if not isinstance(sweep, dict) or not {"conditions", "rows"} <= set(sweep):
            raise Refused(f"{given.sweep}: no sweep")
        files = read_files(given.kernels)
        found = tune(sweep, files)
        write_files(files, given.kernels)
        if given.combined is not None:
            write(given.combined, files)
    except (Refused, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in lines(found):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
