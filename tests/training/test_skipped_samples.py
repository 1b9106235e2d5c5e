"""Runs that replace samples they cannot use (`data.on_error: skip`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from small_run import be_one_of_two, config, distance, free_port, write_world
from transformers import ViTConfig, ViTModel

from blip2fast.data.batches import BatchPlan
from blip2fast.data.order import Mixture
from blip2fast.data.records import read_captions
from blip2fast.training.build import build_run
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train

SIZE = 28
BAD = (14, 18)  # records of the training set: an empty file, and one that is cut off; drawn twice
OPTIM = {"batch_size": 4, "max_steps": 6, "warmup_steps": 1}


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with image files, two of which are bad, and a held-out one that is."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "images").mkdir()
    draws = np.random.default_rng(0)
    for split in ("train", "eval"):
        for record in read_captions(folder / f"{split}.jsonl"):
            pixels = draws.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{record.image}.png")
        lines = (folder / f"{split}.jsonl").read_text()
        for record in read_captions(folder / f"{split}.jsonl"):
            lines = lines.replace(f'"{record.image}"', f'"{record.image}.png"')
        (folder / f"{split}_files.jsonl").write_text(lines)
    whole = (folder / "images" / f"train{BAD[1]}.png").read_bytes()
    (folder / "images" / f"train{BAD[0]}.png").write_bytes(b"")
    (folder / "images" / f"train{BAD[1]}.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "eval2.png").write_bytes(b"not a picture")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "image_size": SIZE, "patch_size": 14}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder / "vit")
    return folder


def skipping(world: Path, **more: Any) -> dict[str, Any]:
    """The data section of a run on image files that skips what it cannot use."""
    found = {"features": None, "eval_features": None, "image_size": SIZE, "augment": False}
    found |= {"images": str(world / "images"), "eval_images": str(world / "images")}
    found |= {"image_encoder": str(world / "vit"), "on_error": "skip", "max_skipped": 3}
    found |= {s: str(world / f"{n}_files.jsonl") for s, n in NAMES.items()}
    return found | more


NAMES = {"records": "train", "eval_records": "eval"}


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def counts(run: Path) -> dict[int, int]:
    """Replaced samples by step."""
    lines = [line for line in read_metrics(run) if "loss" in line]
    return {line["step"]: line.get("replaced", 0) for line in lines}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of stage 1 over more than an epoch."""
    output = tmp_path_factory.mktemp("whole") / "out"
    more = {"save_every": 2, "optim": OPTIM}
    train(config(world, output, data=skipping(world), **more), say=_quiet)
    return output


def test_a_run_goes_on_and_says_what_it_replaced(world: Path, whole: Path) -> None:
    train_file, eval_file = (world / f"{name}_files.jsonl" for name in ("train", "eval"))
    held_out, *others = listed(whole)
    assert (held_out["step"], held_out["split"]) == (0, "held_out")
    assert held_out["where"] == f"{eval_file}, line 3"
    assert "eval2.png: is not a picture" in held_out["reason"]
    # each once, though the run drew them again in its second epoch
    assert {(each["where"], each["image"]) for each in others} == {
        (f"{train_file}, line {n + 1}", f"train{n}.png") for n in BAD
    }
    assert any("is empty" in each["reason"] for each in others)
    assert any("cut off or damaged" in each["reason"] for each in others)
    plan = BatchPlan(22, 4, 0)
    drawn = [set(plan.batch(step).indices.tolist()) & set(BAD) for step in range(6)]
    first = {n: next(s for s, found in enumerate(drawn, 1) if n in found) for n in BAD}
    replaced = counts(whole)
    assert len([step for step, found in enumerate(drawn, 1) if found]) > 1
    for entry in others:
        number = int(entry["image"].removeprefix("train").removesuffix(".png"))
        assert entry["step"] <= first[number]
    for step, found in enumerate(drawn, 1):
        assert replaced[step] == len(found), step


def test_a_resumed_run_replaces_by_the_same(world: Path, whole: Path, tmp_path: Path) -> None:
    """With workers, and from a step between the two: weights and list are those of a whole run."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for step in (4, 6):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    (output / "model.safetensors").unlink()
    data = skipping(world, workers=1, max_skipped=0.2)  # of 22, rounded up: 5
    train(config(world, output, data=data, optim=OPTIM, save_every=2, resume=True), say=_quiet)
    assert distance(output, whole) == 0
    assert (output / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert counts(output) == counts(whole)


def test_the_limit_ends_the_run_with_one_line(world: Path, tmp_path: Path) -> None:
    settings = {"data": skipping(world, max_skipped=1), "optim": OPTIM}
    with pytest.raises(ValueError, match="2 of 22 records") as caught:
        train(config(world, tmp_path / "out", **settings), say=_quiet)
    message = str(caught.value)
    assert "more than the 1 of max_skipped 1: " in message
    assert "No checkpoint was saved" in message
    assert all(f"line {n + 1}" in message for n in BAD)
    assert "\n" not in message
    assert len([e for e in listed(tmp_path / "out") if e["split"] == "train"]) == 2


def test_raise_names_the_bad_picture(world: Path, tmp_path: Path) -> None:
    data = skipping(world, on_error="raise", max_skipped=None, workers=1)
    with pytest.raises(ValueError, match=r"train(14|18).png: is (empty|cut off)") as caught:
        train(config(world, tmp_path / "out", data=data, optim=OPTIM), say=_quiet)
    assert str(caught.value).endswith("names all of them by line), or set data.on_error: skip")
    with pytest.raises(ValueError, match=r"max_skipped 3 goes with data.on_error: skip"):
        config(world, tmp_path / "out", data={"max_skipped": 3})


def test_bad_rows_and_missing_features_of_stage_2(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty caption, a row that is no JSON, and an image that the cache lacks."""
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[4] = '{"image": "train4", "captions": [" "]}'
    lines[6] = '{"image": '
    lines[8] = lines[8].replace("train8", "nobody")
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    held_out = (world / "eval.jsonl").read_text().replace("eval1", "nobody")
    (tmp_path / "e.jsonl").write_text(held_out)
    data = {"records": str(tmp_path / "r.jsonl"), "eval_records": str(tmp_path / "e.jsonl")}
    data |= {"on_error": "skip", "max_skipped": 3}
    settings = {"data": data, "optim": {**OPTIM, "max_steps": 5}}
    train(config(world, tmp_path / "out", 2, **settings), say=_quiet)
    said = capsys.readouterr().out
    assert "2 record(s) left out, as on_error is skip; the first: " in said
    assert "1 held-out record(s) left out" in said
    found = listed(tmp_path / "out")
    by_line = {each["where"].removeprefix(f"{tmp_path}/"): each for each in found}
    assert by_line.keys() == {"r.jsonl, line 5", "r.jsonl, line 7", "e.jsonl, line 2"} | (
        {"r.jsonl, line 9"}
    )
    assert "empty caption" in by_line["r.jsonl, line 5"]["reason"]
    assert "not valid JSON" in by_line["r.jsonl, line 7"]["reason"]
    assert by_line["r.jsonl, line 9"]["image"] == "nobody"
    assert by_line["e.jsonl, line 2"]["split"] == "held_out"
    data["max_skipped"] = 1
    with pytest.raises(ValueError, match=r"2 of 22 records .*r.jsonl, line 5: .*r.jsonl, line 7"):
        build_run(config(world, tmp_path / "o2", 2, data=data), 0, 1)


def test_a_wrong_folder_is_refused_at_once(world: Path, tmp_path: Path) -> None:
    data = skipping(world, images=str(tmp_path), max_skipped=None)
    with pytest.raises(ValueError, match=r"2 of 22 images or more .* 'train0.png': no such file"):
        build_run(config(world, tmp_path / "out", data=data), 0, 1)


def test_replacements_depend_on_the_sample_alone() -> None:
    """Whatever the processes and passes that share a step; of the sample's source; not of the step.

    A step of all records has no others, and may repeat one.
    """
    one = BatchPlan(40, 8, 7)
    expected = [list(one.replacements(3, place)) for place in range(8)]
    assert len({tuple(each) for each in expected}) == 8
    for rank in range(2):
        two = BatchPlan(40, 2, 7, rank, 2, 2)
        for part in range(2):
            for place in range(2):
                first = two.first_place(6 + part)
                found = list(two.replacements(6 + part, place))
                assert found == expected[first + place]
    step = set(one.batch(3).indices.tolist())
    for each in expected:
        assert not step & set(each[:10])
        assert len(each) == len(set(each)) > 30
    mixed = BatchPlan(40, 8, 7, mixture=Mixture((10, 30), (1.0, 1.0)))
    for place, index in enumerate(mixed.batch(0).indices.tolist()):
        replaced = set(mixed.replacements(0, place))
        assert replaced <= (set(range(10)) if index < 10 else set(range(10, 40)))
        assert index not in replaced
    assert list(BatchPlan(4, 4, 0).replacements(0, 0))


def _work(rank: int, port: int, world: Path, output: Path) -> None:
    be_one_of_two(rank, port)
    optim = {**OPTIM, "batch_size": 2}
    train(config(world, output / "two", data=skipping(world), optim=optim), say=_quiet)
    refused = config(world, output / "limit", data=skipping(world, max_skipped=1), optim=optim)
    with pytest.raises(ValueError, match="2 of 22 records"):
        train(refused, say=_quiet)
    (output / f"refused-{rank}").touch()
    torch.distributed.destroy_process_group()


def test_two_processes_agree(world: Path, whole: Path, tmp_path: Path) -> None:
    mp.start_processes(_work, (free_port(), world, tmp_path), nprocs=2, start_method="spawn")
    assert (tmp_path / "two" / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert counts(tmp_path / "two") == counts(whole)
    assert all((tmp_path / f"refused-{rank}").is_file() for rank in range(2))
