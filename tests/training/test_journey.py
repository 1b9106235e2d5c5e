"""From 200 pictures with names to captions, by the commands that a user gives, in each layout."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from small_run import COLOURS, THINGS, values, weights, write_world
from transformers import OPTForCausalLM, ViTConfig, ViTModel

from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import QuestionRecord
from blip2fast.data.table import RecordTable
from blip2fast.train import main as train_main
from blip2fast.training.config_files import load_config
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train as run_training

SIZE, COUNT = 32, 200
QUESTION = "what is it"


def draw(colour: str, thing: str, place: int) -> Image.Image:
    """A coloured thing on white, at one of several places."""
    image = Image.new("RGB", (48, 40), "white")
    pen = ImageDraw.Draw(image)
    x, y = 4 + place % 4 * 4, 4 + place // 4 % 4 * 2
    if thing == "disc":
        pen.ellipse((x, y, x + 20, y + 20), fill=colour)
    elif thing == "ring":
        pen.ellipse((x, y, x + 20, y + 20), outline=colour, width=4)
    elif thing == "cross":
        pen.line((x, y + 10, x + 20, y + 10), fill=colour, width=5)
        pen.line((x + 10, y, x + 10, y + 20), fill=colour, width=5)
    else:
        pen.polygon([(x + 10, y), (x + 20, y + 20), (x, y + 20)], fill=colour)
    return image


def names() -> dict[str, str]:
    """Captions by the file of the picture; some are in a folder of their own.

    They are sorted, as a folder is read, so that every layout has the records in this order.
    """
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    found = {}
    for n in range(COUNT):
        colour, thing = pairs[n % len(pairs)]
        key = f"{'more/' if n % 3 else ''}{n:03d}.{'png' if n % 2 else 'jpg'}"
        found[key] = f"a {colour} {thing}"
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with names, tokenizers, a vision model and a language model; all small."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "pictures" / "more").mkdir(parents=True)
    for key, caption in names().items():
        _, colour, thing = caption.split()
        draw(colour, thing, int(Path(key).stem)).save(folder / "pictures" / key)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "image_size": SIZE, "patch_size": 8}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder / "vit")
    # weights this large let soft prompts reach what a random language model writes
    language = OPTForCausalLM.from_pretrained(folder / "opt")
    for weight in language.parameters():
        weight.data *= 10 if weight.dim() > 1 else 1
    language.save_pretrained(folder / "opt")
    (folder / "numbered").mkdir()
    for number, key in enumerate(names()):
        os.link(folder / "pictures" / key, folder / "numbered" / f"{number:04d}.png")
    json_lines(folder / "pictures", folder)
    encode(folder, folder / "pictures", folder / "r.jsonl", folder / "features")
    return folder


def encode(world: Path, images: Path, records: Path, out: Path) -> None:
    """`blip2fast features`, a picture at a time, so that its tokens depend on no other."""
    command = ["features", "--images", str(images), "--records", str(records), "--out", str(out)]
    main([*command, "--encoder", str(world / "vit"), "--batch-size", "1"])


@dataclass(frozen=True)
class Source:
    """Where a layout's records are, and what to say of them.

    Attributes:
        path: what to import.
        images: the folder of its images.
        options: of `data import` and `data check`.
    """

    path: Path
    images: Path
    options: tuple[str, ...] = ()


def json_lines(pictures: Path, folder: Path) -> Source:
    rows = [{"image": key, "caption": caption} for key, caption in names().items()]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(folder / "r.jsonl", pictures)


def json_list(pictures: Path, folder: Path) -> Source:
    rows = [
        {"image": key, "caption": caption, "image_id": f"coco_{n}"}
        for n, (key, caption) in enumerate(names().items())
    ]
    (folder / "r.json").write_text(json.dumps(rows))
    return Source(folder / "r.json", pictures)


def columns(name: str, separator: str, *header: str) -> Callable[[Path, Path], Source]:
    def write(pictures: Path, folder: Path) -> Source:
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([header, *names().items()])
        return Source(folder / name, pictures)

    return write


def coco(pictures: Path, folder: Path) -> Source:
    images = [{"id": n, "file_name": key} for n, key in enumerate(names())]
    captions = [{"image_id": n, "caption": c} for n, c in enumerate(names().values())]
    content = {"images": images, "annotations": captions[::-1]}
    (folder / "captions.json").write_text(json.dumps(content))
    return Source(folder / "captions.json", pictures)


def karpathy(pictures: Path, folder: Path) -> Source:
    images: list[dict[str, Any]] = [
        {"filename": key, "split": "train" if n % 2 else "restval", "sentences": [{"raw": caption}]}
        for n, (key, caption) in enumerate(names().items())
    ]
    images.append({"filename": "none.jpg", "split": "test", "sentences": [{"raw": "a disc"}]})
    (folder / "splits.json").write_text(json.dumps({"images": images}))
    return Source(folder / "splits.json", pictures, ("--split", "train+restval"))


def parquet(pictures: Path, folder: Path) -> Source:
    """With the pictures in the rows; the import packs them into a shard beside the table."""
    images = [{"bytes": (pictures / key).read_bytes(), "path": key} for key in names()]
    pq.write_table(
        pa.table({"image": images, "text": list(names().values())}), folder / "r.parquet"
    )
    return Source(folder / "r.parquet", folder / "table")


def datasets_folder(pictures: Path, folder: Path) -> Source:
    datasets = pytest.importorskip("datasets")
    found = {"image": list(names()), "caption": list(names().values())}
    datasets.Dataset.from_dict(found).save_to_disk(str(folder / "saved"))
    return Source(folder / "saved", pictures)


def webdataset(pictures: Path, folder: Path) -> Source:
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key, caption in names().items():
            name = key.replace("/", "_")
            (folder / "caption.txt").write_text(caption)
            tar.add(pictures / key, name)
            tar.add(folder / "caption.txt", Path(name).with_suffix(".txt"))
    return Source(folder / "00000.tar", folder)


def imagefolder(pictures: Path, folder: Path) -> Source:
    shutil.copytree(pictures, folder / "pictures", copy_function=os.link)
    with (folder / "pictures" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *names().items()])
    return Source(folder / "pictures", folder / "pictures")


def texts_beside(pictures: Path, folder: Path) -> Source:
    shutil.copytree(pictures, folder / "pictures", copy_function=os.link)
    for key, caption in names().items():
        (folder / "pictures" / key).with_suffix(".txt").write_text(caption)
    return Source(folder / "pictures", folder / "pictures")


LAYOUTS = {
    "json_lines": json_lines,
    "json_list": json_list,
    "csv": columns("r.csv", ",", "filepath", "title"),
    "tsv": columns("r.tsv", "\t", "image", "text"),
    "coco": coco,
    "karpathy": karpathy,
    "parquet": parquet,
    "imagefolder": imagefolder,
    "datasets": datasets_folder,
    "webdataset": webdataset,
    "texts_beside": texts_beside,
}


def question_lines(pictures: Path, folder: Path) -> Source:
    rows = [vars(record) for record in questions()]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(folder / "q.jsonl", pictures)


def questions() -> list[QuestionRecord]:
    """Of pictures that are named by their places in `names`: the layouts know no other names."""
    texts = enumerate(names().values())
    return [QuestionRecord(f"{n:04d}.png", QUESTION, text) for n, text in texts]


def vqav2(pictures: Path, folder: Path) -> Source:
    asked = [{"question_id": 10 * n, "image_id": n, "question": QUESTION} for n in range(COUNT)]
    told = [
        {
            "question_id": 10 * n,
            "image_id": n,
            "multiple_choice_answer": caption,
            "answers": [{"answer_id": i, "answer": caption} for i in range(10)],
        }
        for n, caption in enumerate(names().values())
    ]
    (folder / "questions.json").write_text(json.dumps({"questions": asked}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": told[::-1]}))
    options = ("--annotations", str(folder / "annotations.json"), "--image-name", "{:04d}.png")
    return Source(folder / "questions.json", pictures, options)


def gqa(pictures: Path, folder: Path) -> Source:
    content = {
        f"q{n}": {"imageId": n, "question": QUESTION, "answer": caption}
        for n, caption in enumerate(names().values())
    }
    (folder / "balanced.json").write_text(json.dumps(content))
    options = ("--image-name", "{:04d}.png")
    return Source(folder / "balanced.json", pictures, options)


QUESTIONS = {"json_lines": question_lines, "vqav2": vqav2, "gqa": gqa}


def import_and_check(
    world: Path, source: Source, table: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Write the table; the source and it are found to be without fault.

    A source with the pictures in its rows has no images to check before they are in the table.
    """
    images = () if source.images == table else ("--images", str(source.images))
    main(["data", "import", str(source.path), *images, *source.options, "--out", str(table)])
    assert f"{COUNT} records ({task}) of {COUNT} images" in capsys.readouterr().out
    tokenizer = ("--tokenizer", str(world / "qformer_tokenizer"))
    sources = [] if source.images == table else [(str(source.path), *source.options)]
    for each in [*sources, (str(table),)]:
        main(["data", "check", *each, "--images", str(source.images), "--json", *tokenizer])
        found = json.loads(capsys.readouterr().out)
        assert found["usable"]
        assert (found["rows"], found["images"]) == (COUNT, COUNT)
        assert found["images_checked"]["readable"] == COUNT
        assert found["images_checked"]["width"] == [48, 48, 48]
        assert (found["tokens"]["unknown"], found["tokens"]["longest"]) == (0, 5)


def own_name(key: str) -> str:
    """The picture's own name, of a key that may be a place in a shard."""
    name = key.partition("@")[0]
    if name.startswith("images-00000.tar/"):  # packed by their numbers
        return list(names())[int(Path(name).name)]
    return name.removeprefix("00000.tar/").replace("more_", "more/")


def train(
    world: Path, records: Path, features: Path, out: Path, steps: int = 2
) -> tuple[Path, Path]:
    """Both stages, as the command runs them but without its reports; the folders of the runs."""
    for path in write_configs(world, records, features, out, steps):
        run_training(load_config(path))
    return out / "stage1", out / "stage2"


def write_configs(
    world: Path, records: Path, features: Path, out: Path, steps: int = 2
) -> tuple[Path, Path]:
    """The configurations of both stages."""
    data = {"records": str(records), "features": str(features)}
    first = write_config(world, out / "stage1", 1, data, steps)
    return first, write_config(world, out / "stage2", 2, data, steps, out / "stage1")


def write_config(
    world: Path, out: Path, stage: int, data: dict[str, Any], steps: int, start: Path | None = None
) -> Path:
    """The configuration of a run to `out`, beside it; stage 2 starts from the run `start`."""
    data = {**data, "eval_records": None, "eval_features": None}
    optim = {"max_steps": steps, "warmup_steps": steps // 8, "batch_size": 12, "lr": 1e-2}
    settings = values(world, out, stage, data=data, optim=optim)
    if start is not None:
        settings["model"] = {}
        settings["init_from"] = str(start)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def caption(world: Path, model: Path) -> list[str]:
    """Captions of three of the pictures."""
    shown = [str(world / "pictures" / key) for key in list(names())[:3]]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        main(["caption", "--model", str(model), "--num-beams", "1", *shown])
    lines = [line.split("\t") for line in told.getvalue().splitlines()[-3:]]
    assert [path for path, _ in lines] == shown
    return [text for _, text in lines]


def same_weights(run: Path, other: Path) -> bool:
    mine, others = weights(run), weights(other)
    assert mine.keys() == others.keys()
    return all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both stages by one command, straight from the JSON lines, without a table."""
    out = tmp_path_factory.mktemp("reference")
    first, second = write_configs(world, world / "r.jsonl", world / "features", out)
    train_main(["--config", str(first), "--config", str(second)])
    return out / "stage1", out / "stage2"


@pytest.fixture(scope="module")
def captions(world: Path, reference: tuple[Path, Path]) -> list[str]:
    return caption(world, reference[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_pictures_to_captions(
    world: Path,
    reference: tuple[Path, Path],
    captions: list[str],
    tmp_path: Path,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, table = LAYOUTS[layout](world / "pictures", tmp_path), tmp_path / "table"
    import_and_check(world, source, table, "caption", capsys)
    found = [(own_name(r.image), r.captions) for r in RecordTable([table], "caption")]
    assert found == [(key, (text,)) for key, text in names().items()]
    features = world / "features"
    if layout in ("webdataset", "parquet"):  # their keys are places in a shard
        features = tmp_path / "features"
        encode(world, source.images, table, features)
        assert f"{COUNT} images of 17 tokens x 24" in capsys.readouterr().out
        rows = range(COUNT)
        shared = FeatureCache(world / "features").read(rows)
        assert torch.equal(FeatureCache(features).read(rows), shared)
    runs = train(world, table, features, tmp_path)
    for run, expected in zip(runs, reference, strict=True):
        assert same_weights(run, expected)
    assert caption(world, runs[1]) == captions


def test_training_learns_the_pictures(world: Path, tmp_path: Path) -> None:
    for run in train(world, world / "r.jsonl", world / "features", tmp_path, steps=16):
        losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_from_pictures_to_answers(
    world: Path, reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layouts of questions, for which stage 2 goes on from the pairs' stage 1."""
    features, runs = tmp_path / "features", []
    for layout, write in QUESTIONS.items():
        (tmp_path / layout).mkdir()
        source, table = write(world / "numbered", tmp_path / layout), tmp_path / layout / "table"
        import_and_check(world, source, table, "vqa", capsys)
        records = RecordTable([table], "vqa")
        assert [(r.image, r.question, r.answer) for r in records] == [
            (r.image, r.question, r.answer) for r in questions()
        ]
        if not features.exists():
            encode(world, source.images, table, features)
        data = {"records": str(table), "features": str(features), "task": "vqa"}
        out = tmp_path / layout / "stage2"
        run_training(load_config(write_config(world, out, 2, data, 2, reference[0])))
        runs.append(out)
    for run in runs[1:]:
        assert same_weights(run, runs[0])
    assert len(caption(world, runs[-1])) == 3
