"""`python -m blip2fast.demo`: from nothing to a trained BLIP-2 and one table, in minutes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from rich.console import Console

from blip2fast.demo.data import SPLIT_SIZES, cache_features, write_texts
from blip2fast.demo.phases import Clock, Phases
from blip2fast.demo.report import evaluate_demo
from blip2fast.demo.settings import (
    REPOSITORY,
    TRAINING_RUNS,
    DemoSettings,
    Places,
    cores,
    digest,
    fast,
    training_processes,
)
from blip2fast.demo.table import check_gates, render
from blip2fast.demo.training import TrainingRun, train
from blip2fast.ops.linear import SETTING as LINEAR_SETTING
from blip2fast.reporting import draw_samples, write_report
from blip2fast.scenes.world import Source
from blip2fast.training.config_files import config_values, load_config

PACKAGES = ("blip2fast", "torch", "transformers", "deepspeed", "numpy")
TITLES = {
    "stage1": "stage 1: queries learn from image-text pairs",
    "stage2": "stage 2: soft prompts into the frozen language model",
    "vqa": "fine-tuning on questions",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m blip2fast.demo`.

    Args:
        arguments: those of the command line; None: `sys.argv[1:]`.

    Returns:
        As `start`.
    """
    parser = argparse.ArgumentParser(prog="python -m blip2fast.demo", description=__doc__)
    parser.add_argument(
        "--source", choices=get_args(Source), default="shapes", help="drawn shapes or handwriting"
    )
    parser.add_argument("--output", type=Path, help="folder; runs/scenes or runs/digits by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="reuse nothing of an earlier run")
    parser.add_argument(
        "--fast", action="store_true", help="tiny sizes: shows that it runs, meets no gate"
    )
    given = parser.parse_args(arguments)
    try:
        return start(given.source, given.output, given.seed, given.fresh, given.fast)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def start(source: Source, output: Path | None, seed: int, fresh: bool, tiny: bool) -> int:
    """Run the demo, as a command.

    Args:
        source: drawn shapes or handwriting.
        output: its folder; None: `runs/scenes`, or `runs/digits`.
        seed: of the scenes, the training runs and the controls.
        fresh: reuse nothing of an earlier run.
        tiny: sizes that show that it runs, and meet no gate.

    Returns:
        0 when every gate is met, or `tiny`; 1 otherwise.
    """
    settings = DemoSettings(source=source, seed=seed)
    output = output or Path("runs", "scenes" if source == "shapes" else "digits")
    console = Console()
    summary = run_demo(fast(settings) if tiny else settings, output, console, fresh)
    if tiny:
        return 0
    failed = check_gates(summary)
    for gate in failed:
        console.print(f"[red]gate not met[/red] {gate}", highlight=False)
    return 1 if failed else 0


def run_demo(
    settings: DemoSettings, output: Path, console: Console, fresh: bool = False
) -> dict[str, Any]:
    """Run all phases in order, then print the table; the README lists the contents of `output`.

    Args:
        settings: what to build and train.
        output: the output folder.
        fresh: do not reuse phases of an earlier run.

    Returns:
        The summary, as written to `output/summary.json`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    clock = Clock()
    places = Places(output, settings.source)
    output.mkdir(parents=True, exist_ok=True)
    phases = Phases(output, version("blip2fast"), console, fresh)
    names = ("source", "seed", "captions_per_scene", "question_rounds", *SPLIT_SIZES.values())
    scenes = {name: getattr(settings, name) for name in names}
    phases.run(
        "scenes and texts",
        lambda: write_texts(settings, places),
        scenes,
        products=[
            places.captions("train"),
            places.questions("held_out"),
            places.images("held_out"),
        ],
    )
    phases.run(
        "frozen features",
        lambda: cache_features(settings, places, console),
        digest(places.image_tower),
        after=["scenes and texts"],
        products=[places.features(split) for split in SPLIT_SIZES],
    )
    _train(phases, settings, places, after="frozen features")
    evaluation_clock = Clock()
    console.print("[bold]evaluation[/bold]")
    table, details = evaluate_demo(settings, places, console)
    for name in TRAINING_RUNS:
        drawn = draw_samples(places.run(name), images=places.images("held_out"))
        write_report(places.run(name), drawn.samples, notes=drawn.notes)
    phases.times["evaluation"] = {**evaluation_clock.read(), "reused": False}
    summary = {
        "source": settings.source,
        "table": table,
        **details,
        "phases": phases.times,
        "this_run": clock.read(),
        "from_nothing": {
            key: sum(phase[key] for phase in phases.times.values())
            for key in ("seconds", "cpu_seconds")
        },
        "settings": dataclasses.asdict(settings),
        "machine": machine(),
    }
    _write(summary, places, console)
    return summary


def _train(phases: Phases, settings: DemoSettings, places: Places, after: str) -> None:
    """Run the training phases that are due, in a single start of the launcher."""
    processes = training_processes()
    due: dict[str, TrainingRun] = {}
    for name in TRAINING_RUNS:
        run = _training_run(settings, places, name, processes)
        if phases.due(
            TITLES[name],
            [config_values(run.load()), processes, digest(places.language_tower)],
            after=[after],
            products=[places.run(name) / file for file in ("model.safetensors", "metrics.jsonl")],
        ):
            due[TITLES[name]] = run
        after = TITLES[name]
    titles = list(due)

    @contextmanager
    def watch(number: int) -> Iterator[None]:
        clock = phases.begin(titles[number])
        yield
        phases.end(titles[number], clock)

    if due:
        train(list(due.values()), processes, places.training_log, phases.console, watch)


def _training_run(settings: DemoSettings, places: Places, name: str, processes: int) -> TrainingRun:
    config = settings.config(name)
    overrides = (
        *places.overrides(name),
        f"seed={settings.seed}",
        *settings.overrides.get(name, ()),
    )
    # The configurations are for two processes; a single process takes the batch of both.
    if processes == 1:
        whole = 2 * load_config(config, overrides).optim.batch_size
        overrides += (f"optim.batch_size={whole}",)
    return TrainingRun(config, overrides)


def machine() -> dict[str, Any]:
    """Hardware and software on which the results depend besides the settings."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "gpu": gpu,
        "processes": training_processes(),
        "linear": os.environ.get(LINEAR_SETTING, "auto"),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The checkout's commit, with `+` if files differ from it; None outside a checkout."""
    if not (REPOSITORY / "pyproject.toml").is_file():
        return None  # installed: what git knows there is another repository
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _write(summary: dict[str, Any], places: Places, console: Console) -> None:
    text = json.dumps(summary, indent=1, default=str) + "\n"
    (places.output / "summary.json").write_text(text, encoding="utf-8")
    title = f"Held-out scenes ({summary['source']}); losses as they are, the rest in %"
    rendered = render(summary["table"], title)
    with (places.output / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(rendered)
    wide = console if console.width >= 120 else Console(file=sys.stdout, width=120)
    wide.print(rendered)
    lines = {
        **{n + (", reused" if p["reused"] else ""): p for n, p in summary["phases"].items()},
        "in total, from nothing": summary["from_nothing"],
    }
    for name, spent in lines.items():
        times = f"{spent['seconds']:7.1f} s ({spent['cpu_seconds']:.0f} s of CPU)"
        console.print(f"  {times}  {name}", highlight=False)
    console.print(f"Everything is in {places.output}: tensorboard --logdir {places.output}")
