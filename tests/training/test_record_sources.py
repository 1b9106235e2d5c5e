"""Runs on records of several layouts, mixed or not, draw what a run on JSON lines draws."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import config, distance, write_world

from blip2fast.data.importing import import_records
from blip2fast.data.records import read_captions
from blip2fast.training.build import build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.trainer import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    records = read_captions(folder / "train.jsonl")
    with (folder / "flat.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "filepath", "title"])
        table.writerows([n, r.image, r.captions[0]] for n, r in enumerate(records))
    import_records(folder / "train.jsonl", folder / "table")
    return folder


def batch(given: RunConfig, step: int) -> dict[str, torch.Tensor]:
    return build_run(given, 0, 1).batches[step]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_table_is_its_source(world: Path, tmp_path: Path, stage: int) -> None:
    for step in (0, 7):
        expected = batch(config(world, tmp_path, stage), step)
        table = {"records": str(world / "table")}
        found = batch(config(world, tmp_path, stage, data=table), step)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sources_with_weights(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [
        {"source": str(world / "table"), "weight": 3},
        {"source": str(world / "flat.csv"), "weight": 1},
    ]
    run = build_run(config(world, tmp_path, data={"records": sources}), 0, 1)
    assert "flat.csv: ignored 'id' (22 rows)" in caplog.text
    plan = run.batches.plan
    assert plan.num_records == 44
    drawn = np.concatenate([plan.batch(step).indices for step in range(11)])
    assert (drawn < 22).sum() == 33
    assert run.batches[3]["input_ids"].shape[0] == 4


def test_bad_sources_are_one_line(world: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("filepath,title\ntrain0,\n")
    given = config(world, tmp_path, data={"records": str(tmp_path / "r.csv")})
    with pytest.raises(ValueError, match=r"r.csv, line 2: image 'train0' has an empty caption"):
        build_run(given, 0, 1)
    (tmp_path / "r.csv").write_text("filepath,title\nnobody,a ring\n")
    with pytest.raises(ValueError, match=r"image 'nobody' is not among the 22 of"):
        build_run(given, 0, 1)


def test_positives_by_text(world: Path, tmp_path: Path) -> None:
    run = build_run(config(world, tmp_path, data={"positives": "text"}), 0, 1)
    ids, texts = [], []
    for step in range(5):
        found = run.batches[step]
        ids += found["image_ids"].tolist()
        texts += [tuple(row[row > 0].tolist()) for row in found["input_ids"]]
    assert len(set(ids)) == len(set(texts)) < 20
    with pytest.raises(ValueError, match="positives belongs to stage 1, but stage is 2"):
        config(world, tmp_path, 2, data={"positives": "text"})


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs are large ones, whose order is computed and not kept."""
    monkeypatch.setattr("blip2fast.data.order.MOST_SHUFFLED", 10)
    monkeypatch.setattr("blip2fast.training.restart.MOST_SHUFFLED", 10)


@pytest.mark.usefixtures("large")
def test_a_mixed_run_resumes_to_the_last_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the border of an epoch, with the order of large runs; without it, it is refused."""
    sources = [
        {"source": str(world / "table"), "weight": 3},
        {"source": str(world / "flat.csv"), "weight": 1},
    ]
    settings: dict[str, Any] = {"data": {"records": sources}, "save_every": 3}
    settings["optim"] = {"batch_size": 11}  # four steps an epoch
    whole = tmp_path / "whole"
    train(config(world, whole, **settings), say=lambda _: None)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    (resumed / "model.safetensors").unlink()
    train(config(world, resumed, resume=True, **settings), say=lambda _: None)
    assert distance(resumed, whole) == 0
    monkeypatch.setattr("blip2fast.training.restart.MOST_SHUFFLED", 100)
    with pytest.raises(ValueError, match="shuffle is 'feistel' there, None here"):
        train(config(world, resumed, resume=True, **settings), say=lambda _: None)


def test_a_changed_source_is_noticed_as_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    """Whatever holds the records: a file, a table, or a folder."""
    (tmp_path / "folder").mkdir()
    metadata = tmp_path / "folder" / "metadata.csv"
    metadata.write_text((world / "flat.csv").read_text().replace("filepath", "file_name"))
    sources = [str(world / "table"), str(world / "flat.csv"), str(tmp_path / "folder")]

    def contents() -> str:
        run = build_run(config(world, tmp_path, data={"records": sources}), 0, 1)
        assert run.batches.plan.num_records == 66
        return run.contents["contents of data.records"]

    before = contents()
    assert contents() == before
    metadata.write_text(metadata.read_text().replace("ring", "disc").replace("star", "disc"))
    assert contents() != before


def test_a_change_between_the_records_that_are_looked_at_is_noticed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large table, every record counts: by the hash that its import stated."""
    for module in ("data.sources", "training.data_identity"):
        monkeypatch.setattr(f"blip2fast.{module}.MOST_CHECKED", 10)
    monkeypatch.setattr("blip2fast.data.sources.SAMPLED", 2)
    lines = (world / "train.jsonl").read_text().splitlines()
    found = set()
    for number, changed in enumerate((lines[3], lines[3].replace("a ", "the ", 1))):
        (tmp_path / "r.jsonl").write_text("\n".join([*lines[:3], changed, *lines[4:]]))
        import_records(tmp_path / "r.jsonl", tmp_path / str(number))
        settings = {"records": str(tmp_path / str(number))}
        run = build_run(config(world, tmp_path, data=settings), 0, 1)
        found.add(run.contents["contents of data.records"])
    assert len(found) == 2
