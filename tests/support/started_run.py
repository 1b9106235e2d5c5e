"""A long training run in processes of its own, by each of the ways to start one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from small_run import free_port, values

from blip2fast import train as train_script

TRAIN = Path(train_script.__file__)
BIN = Path(sys.executable).parent
LONG = 100_000
# twelve times what it takes beside three others on two cores
START_SECONDS = 300


def _commands(kind: str) -> list[str]:
    if kind == "python":
        return [sys.executable]
    if kind == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return [
        *(str(BIN / "torchrun"), "--nproc_per_node", "2"),
        *("--master_port", str(free_port())),
    ]


def process_tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def started(world: Path, output: Path, kind: str, workers: int) -> subprocess.Popen[str]:
    """A long run that has logged a step."""
    file = output.with_suffix(".yaml")
    optim = {"max_steps": LONG, "batch_size": 4 if kind == "python" else 2}
    data = {"workers": workers, "eval_records": None, "eval_features": None}
    file.write_text(yaml.safe_dump(values(world, output, 2, optim=optim, data=data)))
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [*_commands(kind), str(TRAIN), "--config", str(file)],
        stdout=output.with_suffix(".out").open("w"),
        stderr=output.with_suffix(".err").open("w"),
        text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        # a shell starts what it puts into the background with SIGINT ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics, limit = output / "metrics.jsonl", time.monotonic() + START_SECONDS
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None, output.with_suffix(".err").read_text()
        if time.monotonic() > limit:
            _end_and_tell(process, output)
        time.sleep(0.2)
    return process


def _end_and_tell(process: subprocess.Popen[str], output: Path) -> None:
    """Fail with what a run that does not start has said, and with where its processes are."""
    for each in reversed(process_tree(process.pid)):
        each.send_signal(signal.SIGABRT)  # which Python answers with the stacks of its threads
        time.sleep(0.5)
    process.wait(timeout=30)
    said = [output.with_suffix(kind).read_text() for kind in (".out", ".err")]
    raise AssertionError(f"no step within {START_SECONDS} s:\n" + "\n".join(said))
