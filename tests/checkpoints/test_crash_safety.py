"""Runs killed by SIGKILL: nothing half-written is read, and what resumes is as if never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_driver import NEW, NEWER, OF_TWO, OLD, STEPS
from small_run import timeless, write_world
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blip2fast.data import manifest

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parents[1] / "support" / "crash_driver.py"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folders and the report of the driver."""
    output = tmp_path_factory.mktemp("killed")
    world = write_world(tmp_path_factory.mktemp("world"))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(world), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output, json.loads((output / "report.json").read_text())


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def _assert_same_runs(resumed: Path, whole: Path) -> None:
    assert timeless(resumed) == timeless(whole)
    assert (resumed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert _checkpoints(resumed) == _checkpoints(whole)
    manifest.check(resumed)
    assert not list(resumed.glob("*.partial"))


def test_a_checkpoint_is_whole_whenever_its_writing_is_killed(
    killed: tuple[Path, dict[str, Any]],
) -> None:
    """At every file that is opened, written by half, flushed, named or deleted."""
    output, report = killed
    moments = report["checkpoint"]
    assert len(moments) >= 25
    last = []
    for moment in moments:
        folder = output / "checkpoint" / str(moment) / "killed" / "checkpoints"
        named = [path for path in folder.iterdir() if path.suffix != ".partial"]
        for path in named:
            manifest.check(path)
        last.append(int(max(path.name for path in named)[5:]))
    assert set(last) == {2, 4}
    assert last == sorted(last), "one moment at which the new checkpoint comes to count"


def test_a_run_killed_while_writing_a_checkpoint_resumes_exactly(
    killed: tuple[Path, dict[str, Any]],
) -> None:
    output, report = killed
    whole = output / "checkpoint" / "0" / "resumed"
    losses = [line["loss"] for line in timeless(whole) if "loss" in line]
    assert len(losses) == STEPS
    assert [line["step"] for line in timeless(whole) if "eval_loss" in line] == [4, 6]
    for moment in report["checkpoint"]:
        _assert_same_runs(output / "checkpoint" / str(moment) / "resumed", whole)


def test_a_run_killed_while_writing_its_model_resumes_exactly(
    killed: tuple[Path, dict[str, Any]],
) -> None:
    output, report = killed
    whole = output / "model" / "0" / "resumed"
    for moment in report["model"]:
        _assert_same_runs(output / "model" / str(moment) / "resumed", whole)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_in_a_step_resumes_exactly(
    killed: tuple[Path, dict[str, Any]], stage: int
) -> None:
    """Stage 1 with two passes a step; stage 2 with a log line that spans the checkpoint."""
    folder = killed[0] / f"step-{stage}"
    assert _checkpoints(folder / "killed") == ["step-00000002"]
    assert timeless(folder / "killed")[-1]["step"] == 3, "it had gone beyond the checkpoint"
    _assert_same_runs(folder / "resumed", folder / "whole")
    steps = [line["step"] for line in timeless(folder / "resumed") if "loss" in line]
    assert steps == ([1, 2, 3, 4, 5, 6] if stage == 1 else [3, 6])


@pytest.mark.parametrize("dies", OF_TWO, ids=str)
def test_a_run_of_two_processes_of_which_one_is_killed_resumes_exactly(
    killed: tuple[Path, dict[str, Any]], dies: tuple[int, int]
) -> None:
    folder = killed[0] / "two" / f"{dies[0]}-{dies[1]}"
    named = [p for p in (folder / "killed" / "checkpoints").iterdir() if p.suffix != ".partial"]
    assert max(path.name for path in named) == f"step-{OF_TWO[dies]:08d}"
    for path in named:
        manifest.check(path)
        assert "process_00001.pt" in manifest.read_manifest(path)
    _assert_same_runs(folder / "resumed", killed[0] / "two" / "whole" / "resumed")


@pytest.mark.parametrize("stage", [1, 2])
def test_tensorboard_shows_the_uninterrupted_run(
    killed: tuple[Path, dict[str, Any]], stage: int
) -> None:
    """Every number once, also those of just before the checkpoint, which a kill must not take."""
    folder = killed[0] / f"step-{stage}" / "resumed"
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in timeless(folder):
        step = line.pop("step")
        for name, value in line.items():
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            expected.setdefault(tag, []).append((step, torch.tensor(value).item()))
    for tag, points in expected.items():
        assert [(e.step, e.value) for e in board.Scalars(tag)] == points, tag


def test_a_model_is_replaced_in_one_step(killed: tuple[Path, dict[str, Any]]) -> None:
    """Tensors and description belong together after any two interrupted attempts to replace them.

    Two renames, one after the other, left new tensors beside an old description.
    """
    found = killed[1]["replaced"]
    assert len(found) >= 200
    outcomes = set()
    for first, second, after_one, after_two, after_three in found:
        where = f"stopped at {first}, then at {second}"
        for step, value in (after_one, after_two, after_three):
            assert step == value, where
        outcomes.add((after_one[0], after_two[0]))
        assert after_three[0] == NEWER, where
    assert outcomes == {(OLD, OLD), (OLD, NEWER), (NEW, NEW), (NEW, NEWER)}


def test_the_driver_kills_where_it_says(killed: tuple[Path, dict[str, Any]]) -> None:
    """The first moment is before anything is written, and a half-written file is among the rest."""
    output, report = killed
    sizes = set()
    for moment in report["checkpoint"]:
        checkpoints = output / "checkpoint" / str(moment) / "killed" / "checkpoints"
        partial = checkpoints / "step-00000004.partial" / "model.safetensors"
        sizes.add(partial.stat().st_size if partial.is_file() else 0)
    whole = (output / "checkpoint" / "0" / "resumed" / "model.safetensors").stat().st_size
    assert sizes == {0, whole // 2, whole}
