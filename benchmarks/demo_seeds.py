"""Run the demo on several seeds and keep what it reaches in one result file.

    python benchmarks/demo_seeds.py                       # seeds 0 to 4, one after another
    python benchmarks/demo_seeds.py --source digits --seeds 0

Each run is `python -m blip2fast.demo --seed N`. Writes `results/DATE_demo.json` (`DATE_digits.json`
for handwriting, `-onednn` appended under `BLIP2FAST_LINEAR=onednn`), which `report.py` makes the
tables of. A seed that ran at the same commit is not run again; other runs reuse phases as the demo
does, unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from blip2fast.demo.run import machine
from blip2fast.demo.settings import REPOSITORY
from blip2fast.demo.table import check_gates
from blip2fast.scenes.world import Source

RESULTS = REPOSITORY / "benchmarks" / "results"
NAMES: dict[Source, str] = {"shapes": "demo", "digits": "digits"}
OF_A_SEED = ("table", "attention", "captions", "phases", "from_nothing")


def run_demo(source: Source, seed: int, output: Path, *options: str) -> dict[str, Any]:
    """The summary of one run of the demo, with its unmet gates, if any.

    Raises:
        RuntimeError: the run ended without a summary.
    """
    summary = _finished(output)
    if summary is None:
        command = ["-m", "blip2fast.demo", "--source", source, "--seed", str(seed), *options]
        subprocess.run(
            [sys.executable, *command, "--output", str(output)], cwd=REPOSITORY, check=False
        )
        summary = _finished(output)
    if summary is None:
        raise RuntimeError(f"seed {seed}: the demo left no summary of this commit in {output}")
    return summary


def combine(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result file of runs that differ in nothing but their seed.

    Raises:
        ValueError: they differ in something else.
    """
    first = summaries[0]
    settings = [{n: v for n, v in s["settings"].items() if n != "seed"} for s in summaries]
    for found, own in zip(summaries, settings, strict=True):
        if own != settings[0] or found["machine"] != first["machine"]:
            raise ValueError(
                f"seed {found['settings']['seed']} ran with other settings, on another machine or "
                f"at another commit than seed {first['settings']['seed']}: run it again"
            )
    return {
        "source": first["source"],
        "settings": settings[0],
        "machine": first["machine"],
        "runs": [
            {
                "seed": found["settings"]["seed"],
                "unmet_gates": check_gates(found),
                **{name: found[name] for name in OF_A_SEED},
            }
            for found in summaries
        ],
    }


def _finished(output: Path) -> dict[str, Any] | None:
    file = output / "summary.json"
    if not file.is_file():
        return None
    summary: dict[str, Any] = json.loads(file.read_text())
    return summary if summary["machine"]["commit"] == machine()["commit"] else None


def main() -> int:
    """The command line; 1 if a gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=get_args(Source), default="shapes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs", "demo_seeds"))
    parser.add_argument("--fresh", action="store_true", help="reuse nothing of earlier runs")
    given = parser.parse_args()
    folder = given.output.resolve()
    options = ["--fresh"] if given.fresh else []
    result = combine(
        [
            run_demo(given.source, seed, folder / f"{given.source}{seed}", *options)
            for seed in given.seeds
        ]
    )
    rounding = "-onednn" if result["machine"]["linear"] == "onednn" else ""
    name = f"{datetime.date.today().isoformat()}_{NAMES[given.source]}{rounding}.json"
    target = RESULTS / name
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)
    unmet = [f"seed {run['seed']}: {gate}" for run in result["runs"] for gate in run["unmet_gates"]]
    print("\n".join(unmet) or "every gate is met on every seed")
    return int(bool(unmet))


if __name__ == "__main__":
    sys.exit(main())
