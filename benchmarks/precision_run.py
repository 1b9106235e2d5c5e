"""Does stage 1 in bf16 follow fp32? Trains both on the embedded scenes, several seeds each.

    python benchmarks/precision_run.py runs/scenes --steps 400 --seeds 3

Needs the data that `make demo` leaves in `runs/scenes`. Writes
`benchmarks/results/DATE_precision.json`
and `docs/precision.svg`: the loss over the steps, and held-out retrieval at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
PRECISIONS = ("fp32", "bf16")
FINAL = ("loss", "loss_itc", "loss_itm", "loss_itg")
HELD_OUT = ("eval_t2i_r1", "eval_i2t_r1", "eval_loss_itc", "eval_loss_itm", "eval_loss_itg")


def train(data: Path, folder: Path, steps: int, seeds: int) -> None:
    """All runs in one start, one process."""
    command = [sys.executable, str(ROOT / "blip2fast" / "train.py")]
    for precision in PRECISIONS:
        for seed in range(seeds):
            command += ["--config", str(ROOT / "configs" / "scenes_stage1.yaml")]
            for value in (
                f"output_dir={folder / f'{precision}-{seed}'}",
                f"data.records={data / 'data' / 'captions_train.jsonl'}",
                f"data.features={data / 'features' / 'train'}",
                f"data.eval_records={data / 'data' / 'captions_held_out.jsonl'}",
                f"data.eval_features={data / 'features' / 'held_out'}",
                f"precision={precision}",
                f"seed={seed}",
                "optim.batch_size=64",
                f"optim.max_steps={steps}",
                f"optim.warmup_steps={steps // 8}",
                "log_every=10",
            ):
                command += ["--set", value]
    subprocess.run(command, check=True, cwd=ROOT)


def read(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, a dict a line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the last five logged losses, and the evaluation at the end."""
    logged = [line for line in lines if "loss" in line][-5:]
    values = {name: statistics.fmean(line[name] for line in logged) for name in FINAL}
    (held_out,) = [line for line in lines if "eval_t2i_r1" in line]
    return values | {name: held_out[name] for name in HELD_OUT if name in held_out}


def plot(runs: dict[str, list[list[dict[str, Any]]]], target: Path) -> None:
    """Losses of every run over its steps, one colour a precision."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 4), FINAL, strict=True):
        for colour, (precision, seeds) in zip(("C0", "C1"), runs.items(), strict=True):
            for number, lines in enumerate(seeds):
                points = [(line["step"], line[name]) for line in lines if name in line]
                label = precision if number == 0 else None
                axis.plot(*zip(*points, strict=True), colour, lw=0.9, label=label)
        axis.set(title=name, xlabel="step")
    figure.axes[0].legend()
    figure.savefig(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the demo's output folder, such as runs/scenes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(given.data.resolve(), Path(folder), given.steps, given.seeds)
        runs = {
            precision: [read(Path(folder) / f"{precision}-{s}") for s in range(given.seeds)]
            for precision in PRECISIONS
        }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    result = {
        "conditions": {
            "commit": commit,
            "command": " ".join(["python", *sys.argv]),
            "device": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "steps": given.steps,
            "batch": 64,
        },
        "runs": {name: [summary(lines) for lines in seeds] for name, seeds in runs.items()},
    }
    today = datetime.date.today().isoformat()
    target = ROOT / "benchmarks" / "results" / f"{today}_precision.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs").mkdir(exist_ok=True)
    plot(runs, ROOT / "docs" / "precision.svg")
    for name, seeds in result["runs"].items():
        print(name, json.dumps(seeds))


if __name__ == "__main__":
    main()
