"""Signals end a run after its step, with a checkpoint, and leave no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import config, distance, timeless, write_world
from started_run import TRAIN, process_tree, started

from blip2fast.checkpoints.files import last_checkpoint, step_of
from blip2fast.training import stopping
from blip2fast.training.stopping import RunStopped
from blip2fast.training.trainer import Trainer, train


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=lambda n: n.name)
def test_a_stopped_run_resumes_as_if_it_had_never_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    settings: dict[str, Any] = {"log_every": 4, "eval_every": 3}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config(world, whole, 2, **settings), say=_quiet)
    original = Trainer._train_step

    def interrupted(self: Trainer, batches: Any) -> None:
        if self.state.step == 1:
            os.kill(os.getpid(), number)
        original(self, batches)

    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(RunStopped, match=rf"{number.name} after step 2 of 6.*resume=true") as e:
            train(config(world, stopped, 2, **settings), say=_quiet)
    assert e.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    assert not (stopped / "model.safetensors").exists()
    train(config(world, stopped, 2, resume=True, **settings), say=_quiet)
    assert timeless(whole) == timeless(stopped)
    assert distance(stopped, whole) == 0


def test_a_signal_after_the_last_step_lets_the_run_complete(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is written; a later configuration of the same start does not begin."""
    original = Trainer.evaluate

    def interrupted(self: Trainer) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(RunStopped, match="the run is complete; stopped by SIGINT"):
        train(config(world, tmp_path / "out", 2), say=_quiet)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", [1, 2])
def test_an_evaluation_that_takes_too_long_is_left_for_the_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Before, the process ended without a checkpoint, and with it all steps since the last."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config(world, whole, stage), say=_quiet)
    original = Trainer.evaluate

    def interrupted(self: Trainer) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupted)
        patch.setattr(stopping, "PATIENCE_SECONDS", -1.0)
        with pytest.raises(RunStopped, match="stopped by SIGTERM after step 6 of 6; saved"):
            train(config(world, stopped, stage), say=_quiet)
    assert not (stopped / "model.safetensors").exists()
    train(config(world, stopped, stage, resume=True), say=_quiet)
    assert timeless(whole) == timeless(stopped)
    assert distance(stopped, whole) == 0


def test_a_stop_that_takes_too_long_ends_the_process() -> None:
    """Also where the interpreter runs no handler, as in a collective that never returns."""
    code = (
        "import ctypes\n"
        "from blip2fast.training.stopping import StopRequest\n"
        "with StopRequest(seconds=1.0):\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        ctypes.CDLL(None).sleep(30)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert said.startswith("error: not stopped within 1 s of SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "workers"),
    [
        ("python", signal.SIGINT, 0),
        ("python", signal.SIGTERM, 2),
        ("python", signal.SIGUSR1, 0),
        ("deepspeed", signal.SIGINT, 0),
        ("deepspeed", signal.SIGTERM, 1),
        ("deepspeed", signal.SIGKILL, 0),
        ("torchrun", signal.SIGTERM, 1),
        ("torchrun", signal.SIGINT, 0),
        ("torchrun", signal.SIGKILL, 0),
    ],
)
def test_a_signal_to_the_process_that_was_started(
    world: Path, tmp_path: Path, kind: str, number: signal.Signals, workers: int
) -> None:
    """Before, a signal to `deepspeed` alone left its ranks training as orphans."""
    output = tmp_path / "out"
    process = started(world, output, kind, workers)
    tree = process_tree(process.pid)
    process.send_signal(number)
    code = process.wait(timeout=60)
    _, alive = psutil.wait_procs(tree, timeout=30)
    # what the killed launcher would have waited for is left to the system, which may take its time
    left = [(p.pid, p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for each in alive:
        each.kill()
    assert left == []
    saved = last_checkpoint(output / "checkpoints")
    assert saved is not None, output.with_suffix(".err").read_text()
    assert step_of(saved) >= 1
    said = output.with_suffix(".err").read_text()
    assert "To go on, run the same command with --set resume=true" in said
    assert code != 0
    if kind == "python":
        assert code == 128 + number
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = started(world, output, "deepspeed", 0)
    tree = process_tree(process.pid)
    ranks = [p for p in tree if str(TRAIN) in p.cmdline() and "--local_rank=1" in p.cmdline()]
    ranks[-1].send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert psutil.wait_procs(tree, timeout=30)[1] == []
    assert last_checkpoint(output / "checkpoints") is not None
    assert "stopped by a signal to another process" in output.with_suffix(".err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"),
    [("deepspeed", signal.SIGUSR1), ("deepspeed", signal.SIGINT), ("torchrun", signal.SIGTERM)],
)
def test_a_signal_to_every_process_of_a_run(
    world: Path, tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    """As Slurm and Ctrl-C send it; DataLoader workers leave it to their process."""
    output = tmp_path / "out"
    process = started(world, output, kind, 1)
    tree = process_tree(process.pid)
    for each in tree:
        each.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert psutil.wait_procs(tree, timeout=40)[1] == []
    assert last_checkpoint(output / "checkpoints") is not None
    said = output.with_suffix(".err").read_text()
    # the signals are sent one after another: a rank may first hear of another's, or what its
    # launcher sends on its own
    assert re.search(r"stopped by .+ after step \d+ of 100000; saved", said), said
