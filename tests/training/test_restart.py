"""A run that goes on with other settings, and the checkpoints that stay."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import NUM_TOKENS, WIDTH, config, distance, values, write_world

from blip2fast import train as train_script
from blip2fast.checkpoints.kept import read_best
from blip2fast.checkpoints.trained import read_description
from blip2fast.data.batches import PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train


def _quiet(_: str) -> None: ...


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The images of each batch that a run reads."""
    found: list[list[str]] = []
    original = PlannedBatches.take

    def noted(self: PlannedBatches[Any], micro_step: int) -> Any:
        found.append(self.keys(micro_step))
        return original(self, micro_step)

    monkeypatch.setattr(PlannedBatches, "take", noted)
    return found


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_run_goes_on_longer_with_another_rate_and_split(
    world: Path, tmp_path: Path, read: list[list[str]]
) -> None:
    """The samples of each step are those of a run that was that long from the start."""
    output, long = tmp_path / "out", {"max_steps": 9}
    train(config(world, tmp_path / "long", 2, optim=long), say=_quiet)
    expected = [sorted(keys) for keys in read]
    read.clear()
    train(config(world, output, 2, save_every=3), say=_quiet)
    said: list[str] = []
    other = {**long, "lr": 5e-3, "batch_size": 2, "accumulation": 2}
    more = {"optim": other, "eval_every": 4, "zero_stage": 2}
    train(config(world, output, 2, save_every=3, resume=True, **more), say=said.append)
    pairs = [a + b for a, b in zip(read[6::2], read[7::2], strict=True)]
    assert [sorted(keys) for keys in read[:6] + pairs] == expected
    lines = [line for line in read_metrics(output) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    first, second = _history(output)
    assert (first["step"], first["changes"], first["processes"]) == (0, {}, 1)
    assert first["environment"]["torch"] == torch.__version__
    assert first["environment"]["python"] == platform.python_version()
    assert "CPU" in first["environment"]["device"] or torch.cuda.is_available()
    assert second["step"] == 6
    assert second["changes"] == {
        "eval_every": [0, 4],
        "optim.accumulation": [1, 2],
        "optim.batch_size": [4, 2],
        "optim.lr": [0.01, 0.005],
        "optim.max_steps": [6, 9],
        "zero_stage": [0, 2],
    }
    (line,) = [line for line in said if line.startswith("changed since the last start: ")]
    assert "optim.lr 0.01 -> 0.005; optim.max_steps 6 -> 9" in line


def test_a_run_does_not_end_before_its_checkpoint(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(config(world, output, 2, save_every=3), say=_quiet)
    short = config(world, output, 2, resume=True, optim={"max_steps": 5})
    with pytest.raises(ValueError, match=r"max_steps 5 is below step 6 of .*: set at least 6"):
        train(short, say=_quiet)
    assert len(_history(output)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ["itc"]}, "optim.losses"),
        ({"word_mean": "per_pass"}, "optim.word_mean is 'step' there, 'per_pass' here"),
        ({"batch_size": 2}, "samples_per_step is 4 there, 2 here"),
    ],
)
def test_what_changes_the_function_or_the_order_is_refused(
    world: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    output = tmp_path / "out"
    train(config(world, output, 1, save_every=3), say=_quiet)
    with pytest.raises(ValueError, match=f"cannot be resumed: .*{message}"):
        train(config(world, output, 1, resume=True, optim=change), say=_quiet)


def _without_a_record(world: Path) -> None:
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (world / "train.jsonl").write_text("".join(lines[:-1]))


def _with_another_caption(world: Path) -> None:
    text = (world / "train.jsonl").read_text()
    (world / "train.jsonl").write_text(text.replace("it is", "is it", 1))


def _with_other_features(world: Path) -> None:
    folder = world / "train_features"
    cache = FeatureCache(folder)
    keys, features = list(cache.keys), cache.read(range(len(cache))).clone()
    features[0, 0, 0] += 1
    shutil.rmtree(folder)
    with FeatureCache.create(folder, keys, NUM_TOKENS, WIDTH, encoder_id="codes") as writer:
        writer.write(0, features)


def _with_another_tokenizer(world: Path) -> None:
    path = world / "qformer_tokenizer" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_a_record, "contents of data.records is '22 records.* there, '21 records.* here"),
        (_with_another_caption, "contents of data.records is '22 records"),
        (_with_other_features, "contents of the images is '22 images"),
        (_with_another_tokenizer, "the tokenizer is "),
    ],
    ids=["record", "caption", "features", "tokenizer"],
)
def test_changed_data_are_refused_by_what_changed(
    world: Path, tmp_path: Path, change: Any, message: str
) -> None:
    """Before, such a run went on, with other samples than its checkpoint says."""
    run = config(world, tmp_path / "out", 1, save_every=3)
    train(run, say=_quiet)
    train(config(world, tmp_path / "out", 1, save_every=3, resume=True), say=_quiet)
    change(world)
    with pytest.raises(ValueError, match=message):
        train(config(world, tmp_path / "out", 1, resume=True), say=_quiet)


def test_resume_continues_with_the_configuration_of_the_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole, output = tmp_path / "run.yaml", tmp_path / "whole", tmp_path / "out"
    train(config(world, whole, 2, save_every=3), say=_quiet)
    file.write_text(yaml.safe_dump(values(world, output, 2, save_every=3)))
    train_script.main(["--config", str(file)])
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    moved = tmp_path / "moved"
    output.rename(moved)
    train_script.main(["--resume", str(moved), "--set", "log_every=2"])
    assert distance(moved, whole) == 0
    assert not output.exists()
    assert _history(moved)[-1]["changes"] == {"log_every": [1, 2]}
    with pytest.raises(SystemExit) as refused:
        train_script.main(["--resume", str(tmp_path / "nothing")])
    assert "no configuration at" in str(refused.value)
    with pytest.raises(SystemExit):
        train_script.main([])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_goes_on_without_the_model_that_it_started_from(
    world: Path, tmp_path: Path, stage: int
) -> None:
    start, output = tmp_path / "start", tmp_path / "out"
    train(config(world, start, 1), say=_quiet)
    settings = {"init_from": str(start), "save_every": 3}
    train(config(world, output, stage, **settings), say=_quiet)
    expected = tmp_path / "expected"
    shutil.copytree(output, expected)
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    shutil.rmtree(start)
    train(config(world, output, stage, **settings, resume=True), say=_quiet)
    assert distance(output, expected) == 0
    assert _history(output)[-1]["changes"] == {}
    with pytest.raises(ValueError, match=r"init_from .*: no model.json"):
        train(config(world, tmp_path / "new", stage, **settings), say=_quiet)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_some_checkpoints_are_kept_for_good(world: Path, tmp_path: Path) -> None:
    settings = {"save_every": 1, "keep_last": 1, "keep_every": 2}
    train(config(world, tmp_path / "out", 2, **settings), say=_quiet)
    assert _steps(tmp_path / "out") == [2, 4, 6]


@pytest.mark.parametrize("metric", ["loss", "t2i_r1"])
def test_the_best_checkpoint_is_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """It is saved where it is evaluated, whatever `save_every` says, and found after a resume."""
    curve = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 6.0, 6: 4.5}
    sign = 1 if metric == "loss" else -1

    def measured(model: Any, parts: Any, settings: Any, *_: Any) -> dict[str, float]:
        return {metric: sign * curve[steps.pop(0)], "other": 1.0}

    monkeypatch.setattr("blip2fast.training.trainer.validate", measured)
    output = tmp_path / "out"
    settings = {"save_every": 5, "eval_every": 1, "keep_last": 1, "keep_best": metric}
    steps = list(curve)
    train(config(world, output, 1, **settings), say=_quiet)
    assert _steps(output) == [2, 5]
    best = read_best(output / "checkpoints")
    assert best == {
        "step": 2,
        "checkpoint": "step-00000002",
        "metric": metric,
        "value": sign * 3.0,
    }
    assert read_description(output / "checkpoints" / "step-00000002").step == 2
    steps = [6]
    train(config(world, output, 1, **settings, resume=True), say=_quiet)
    assert read_best(output / "checkpoints") == best


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"keep_best": "r1"}, "no such metric; there are loss, loss_itc, .*t2i_r1"),
        (2, {"keep_best": "t2i_r1"}, "no such metric; there are loss, exact"),
        (2, {"keep_best": "loss", "data": {"eval_records": None, "eval_features": None}}, "needs"),
    ],
)
def test_an_unknown_metric_is_refused(
    world: Path, tmp_path: Path, stage: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(world, tmp_path / "out", stage, **changes)


def test_the_metrics_that_are_known_are_those_of_an_evaluation(world: Path, tmp_path: Path) -> None:
    for stage in (1, 2):
        output = tmp_path / str(stage)
        train(config(world, output, stage), say=_quiet)
        found = {name[5:] for name in read_metrics(output)[-1] if name.startswith("eval_")}
        for metric in found:
            config(world, output, stage, keep_best=metric)
