"""What is read is what was written: cut, changed, swapped and missing files are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, weights, write_world

from blip2fast.checkpoints.resume import Checkpoint
from blip2fast.checkpoints.trained import (
    load_trained,
    read_description,
    read_parameters,
    save_model,
    trained_names,
)
from blip2fast.data import manifest
from blip2fast.training.trainer import train

SETTINGS: dict[str, Any] = {"save_every": 2, "keep_last": 9}
FILES = (
    "model.safetensors",
    "model.json",
    "optimizer.safetensors",
    "process_00000.pt",
    "state.json",
)
BEFORE, LAST = "step-00000004", "step-00000006"


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train(config(world, folder, 2, **SETTINGS), say=_quiet)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _change(path: Path) -> None:
    """One bit in the middle, where no reader of the format would notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap(path: Path) -> None:
    """The file of another checkpoint, of the same size where it is of tensors."""
    path.write_bytes((path.parent.parent / "step-00000002" / path.name).read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, r"has \d+ bytes, but the manifest states \d+: it is cut short or mixed up"),
    "changed": (_change, r"has the SHA-256 \w{16}\.\.\., but the manifest states \w{16}\.\.\."),
    "swapped": (_swap, r"has .*, but the manifest states"),
    "missing": (Path.unlink, r"is missing; the manifest states \d+ bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(
    world: Path, run: Path, file: str, damage: str
) -> None:
    """It is not passed over in silence either: nothing is trained, nothing is deleted."""
    last, before = (run / "checkpoints" / name for name in (LAST, BEFORE))
    spoil, message = DAMAGE[damage]
    spoil(last / file)
    there = sorted(run.rglob("*"))
    expected = (
        rf"{re.escape(str(last / file))} {message}.*\. The checkpoint before it is whole: "
        rf"delete {re.escape(str(last))} to resume from {re.escape(str(before))}$"
    )
    with pytest.raises(ValueError, match=expected):
        train(config(world, run, 2, resume=True, **SETTINGS), say=_quiet)
    names = {path.name for path in there}
    assert {p.name for p in run.rglob("*")} - {"config.yaml", "deepspeed.json"} <= names


def test_the_one_before_is_named_only_if_it_is_whole(world: Path, run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in (LAST, BEFORE):
        _cut(checkpoints / name / "optimizer.safetensors")
    resume = config(world, run, 2, resume=True, **SETTINGS)
    with pytest.raises(ValueError, match=r"to resume from .*step-00000002$"):
        train(resume, say=_quiet)
    (checkpoints / "step-00000002" / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint before it: delete .*6 and start"):
        train(resume, say=_quiet)


def test_a_damaged_manifest_is_refused(world: Path, run: Path) -> None:
    file = run / "checkpoints" / LAST / "manifest.json"
    resume = config(world, run, 2, resume=True, **SETTINGS)
    values = json.loads(file.read_text())
    for text, message in (
        (file.read_text()[:100], r"manifest.json is cut short or damaged .*before it is whole"),
        (json.dumps(values | {"format": 1}), r"is of format 1, but this version reads format 2"),
        (json.dumps({"format": 2, "files": 3}), r"is not the manifest of a trained model"),
        ("[]", r"is not the manifest of a trained model"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            train(resume, say=_quiet)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json: it was written by an earlier ver"):
        train(resume, say=_quiet)


def test_a_damaged_model_of_a_run_names_its_checkpoint(run: Path) -> None:
    last = run / "checkpoints" / LAST
    for file in ("model.safetensors", "model.json"):
        copy = (run / file).read_bytes()
        _change(run / file)
        message = rf"{file} has the SHA-256 .*The checkpoint {last} is whole: use it"
        with pytest.raises(ValueError, match=message):
            load_trained(run)
        (run / file).write_bytes(copy)
    shutil.rmtree(run / "checkpoints")
    _cut(run / "model.safetensors")
    with pytest.raises(ValueError, match=r"Put back a copy, or train again$"):
        load_trained(run)
    with pytest.raises(ValueError, match=r"no trained model at .*nowhere: manifest.json is"):
        load_trained(run / "nowhere")


def test_files_that_the_manifest_does_not_name_are_not_read(run: Path) -> None:
    folder = run / "checkpoints" / LAST
    shutil.copy(folder / "process_00000.pt", folder / "process_00001.pt")
    checkpoint = Checkpoint(folder, 6, 2, {}, {})
    assert checkpoint.process(0)["progress"]["skipped"] == 0
    with pytest.raises(ValueError, match=r"process_00001.pt is not among the files of .*manifest"):
        checkpoint.process(1)


def test_what_killed_runs_left_is_deleted_on_resuming(world: Path, run: Path) -> None:
    """Half-written, and half-deleted; also where no further checkpoint is written."""
    checkpoints = run / "checkpoints"
    (checkpoints / LAST).rename(checkpoints / f"{LAST}.partial")
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000002.old.partial")
    train(config(world, run, 2, resume=True, **{**SETTINGS, "save_every": 0}), say=_quiet)
    assert [path.name for path in checkpoints.iterdir()] == [BEFORE]


def test_a_model_whose_files_were_not_renamed_yet_is_read(
    world: Path, run: Path, tmp_path: Path
) -> None:
    """A kill right after the manifest was replaced; the next model is written all the same."""
    expected = weights(run)
    for name in ("model.safetensors", "model.json"):
        (run / name).rename(run / f"{name}.partial")
    found = read_parameters(run)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    settings = {"init_from": str(run), "optim": {"max_steps": 1, "warmup_steps": 0}}
    train(config(world, tmp_path / "next", 2, **settings), say=_quiet)
    save_model(run, found, read_description(run))
    manifest.check(run)
    assert not list(run.glob("*.partial"))


def test_only_what_is_trained_is_saved(finished: Path) -> None:
    model = load_trained(finished)
    trained = set(trained_names(model))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith("language_model.") for name in frozen)
    checkpoint = finished / "checkpoints" / LAST
    assert weights(finished).keys() == weights(checkpoint).keys() == trained
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {*FILES, "manifest.json"}
    assert set(manifest.read_manifest(checkpoint)) == set(FILES)


def test_a_resumed_finished_run_returns_its_evaluation(world: Path, run: Path) -> None:
    """A run that was killed after its last checkpoint and before its last evaluation."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    metrics = train(config(world, run, 2, resume=True, **SETTINGS), say=_quiet)
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True) == lines
    assert metrics == {k: v for k, v in json.loads(lines[-1]).items() if k != "step"}


@pytest.mark.parametrize(
    "values", [[], 7, {}, {"frozen": 3}, {"frozen": {"image_encoder": 3}}, {"x": 1, "frozen": {}}]
)
def test_a_description_of_something_else_is_one_line(tmp_path: Path, values: Any) -> None:
    manifest.replace_files(tmp_path / "m", {"model.json": manifest.write_json(values)})
    with pytest.raises(ValueError, match=r"m/model.json does not describe a trained model \("):
        read_description(tmp_path / "m")
