"""Runs `blip2fast/train.py` under the DeepSpeed launcher, with a progress bar from its metrics."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import config_values, load_config

LAUNCHER_PORT = 29500  # DeepSpeed's default
TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"


def progress_bar(console: Console) -> Progress:
    """The progress bar used by all phases."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@dataclass(frozen=True)
class TrainingRun:
    """A configuration file for train.py, and `key=value` overrides."""

    config: Path
    overrides: tuple[str, ...]

    def load(self) -> RunConfig:
        return load_config(self.config, self.overrides)


def train(
    runs: Sequence[TrainingRun],
    processes: int,
    log: Path,
    console: Console,
    watch: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Train with `deepspeed blip2fast/train.py --config <config> --set ... --config ...`.

    The launcher is started once for all runs, as each start takes seconds, mostly for imports.

    Args:
        runs: executed in order; a run may start from the output of an earlier one.
        processes: number of processes; on CPU they share the cores evenly.
        log: file for the output of the launcher and train.py.
        watch: makes a context that is entered with a run's number when the run begins, and left
            when its model is written.

    Raises:
        ChildProcessError: training failed; the message ends with the last lines of the log.
    """
    command = [*launcher(processes), os.path.relpath(TRAIN_SCRIPT)]
    for run in runs:
        command += ["--config", os.path.relpath(run.config)]
        for override in needed(run.config, run.overrides):
            command += ["--set", override]
    shown = shlex.join(["deepspeed", *command[1:]])
    console.print(f"  $ {shown}", highlight=False, soft_wrap=True)
    configs = [run.load() for run in runs]
    for config in configs:
        # train.py refuses an output folder that holds another run; these runs start from scratch.
        shutil.rmtree(config.output_dir, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            for number, config in enumerate(configs):
                with watch(number), progress_bar(console) as progress:
                    bar = progress.add_task("steps", total=config.optim.max_steps, note="starting")
                    last = number == len(configs) - 1
                    if not _follow(process, Path(config.output_dir), progress, bar, last):
                        raise ChildProcessError(_what_failed(config, process, log))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _follow(
    process: subprocess.Popen[bytes], output: Path, progress: Progress, bar: TaskID, last: bool
) -> bool:
    """Show a run's metrics until its model is written; for the last run, until the launcher exits.

    Returns:
        Whether the run succeeded.
    """
    metrics = MetricsTail(output / "metrics.jsonl")
    while True:
        ended = process.poll() is not None
        written = (output / "model.json").exists()
        for line in metrics.new_lines():
            progress.update(bar, completed=line.get("step", 0), note=_note(line))
        if ended or (written and not last):
            return written and process.returncode in (None, 0)
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue


def _what_failed(config: RunConfig, process: subprocess.Popen[bytes], log: Path) -> str:
    with log.open(encoding="utf-8") as lines:
        tail = "".join(deque(lines, maxlen=25))
    return f"{config.output_dir} failed with status {process.returncode}; {log}:\n{tail}"


def needed(config: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides that differ from the configuration, to keep the command short."""
    plain, changed = (config_values(load_config(config, some)) for some in ((), overrides))

    def value(values: Any, key: str) -> Any:
        return functools.reduce(lambda section, name: section[name], key.split("."), values)

    keys = {override: override.partition("=")[0] for override in overrides}
    return [o for o, key in keys.items() if value(plain, key) != value(changed, key)]


def launcher(processes: int) -> list[str]:
    """The DeepSpeed launcher command of this environment, for processes on this machine only.

    Raises:
        RuntimeError: the launcher is not installed next to the running Python.
    """
    found = Path(sys.executable).with_name("deepspeed")
    if not found.is_file():
        raise RuntimeError(f"no DeepSpeed launcher at {found}; install the package's requirements")
    command = [str(found), "--num_gpus", str(processes)]
    with socket.socket() as usual:
        try:
            usual.bind(("127.0.0.1", LAUNCHER_PORT))
        except OSError:
            usual.bind(("127.0.0.1", 0))  # the port is taken
            command += ["--master_port", str(usual.getsockname()[1])]
    return command


class MetricsTail:
    """Reads the lines appended to a JSON lines file since the last call.

    Lines already present at creation, from an earlier run, are skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        """The complete new lines; an unterminated last one is left for the next call."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.position:
            self.position = 0  # the file was truncated and restarted
        with self.path.open("rb") as file:
            file.seek(self.position)
            complete = file.read().rpartition(b"\n")[0]
        if not complete:
            return []
        self.position += len(complete) + 1
        return [json.loads(line) for line in complete.splitlines() if line.strip()]


def _note(line: dict[str, Any]) -> str:
    losses = (name for name in line if name.startswith("loss_")) if "loss_itc" in line else ["loss"]
    return " ".join(f"{n.removeprefix('loss_')} {line[n]:.3f}" for n in losses if n in line)
