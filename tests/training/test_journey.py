"""From a folder of pictures to captions, by the commands that a user gives, in each layout."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from small_run import COLOURS, THINGS, values, write_world
from transformers import OPTForCausalLM, ViTConfig, ViTModel

from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.table import RecordTable
from blip2fast.train import main as train_main
from blip2fast.training.log import read_metrics

SIZE, COUNT = 32, 48
LAYOUTS = ("json lines", "csv", "coco", "imagefolder", "webdataset", "texts")


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
    return folder


def names() -> dict[str, str]:
    """Captions by the file of the picture; some are in a folder of their own."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    found = {}
    for n in range(COUNT):
        colour, thing = pairs[n % len(pairs)]
        key = f"{'more/' if n % 3 else ''}{n:03d}.{'png' if n % 2 else 'jpg'}"
        found[key] = f"a {colour} {thing}"
    return found


def lay_out(world: Path, folder: Path, layout: str) -> tuple[Path, Path]:
    """Write the pictures' names in a layout; returns the source and the folder of images."""
    pictures = world / "pictures"
    if layout == "json lines":
        rows = [{"image": key, "caption": caption} for key, caption in names().items()]
        (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "r.jsonl", pictures
    if layout == "csv":
        with (folder / "r.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("filepath", "title"), *names().items()])
        return folder / "r.csv", pictures
    if layout == "coco":
        images = [{"id": n, "file_name": key} for n, key in enumerate(names())]
        captions = [{"image_id": n, "caption": c} for n, c in enumerate(names().values())]
        content = {"images": images, "annotations": captions}
        (folder / "captions.json").write_text(json.dumps(content))
        return folder / "captions.json", pictures
    if layout == "webdataset":
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for key, caption in names().items():
                name = key.replace("/", "_")
                (folder / "caption.txt").write_text(caption)
                tar.add(pictures / key, name)
                tar.add(folder / "caption.txt", Path(name).with_suffix(".txt"))
        return folder / "00000.tar", folder
    shutil.copytree(pictures, folder / "pictures")
    if layout == "imagefolder":
        with (folder / "pictures" / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *names().items()])
    else:
        for key, caption in names().items():
            (folder / "pictures" / key).with_suffix(".txt").write_text(caption)
    return folder / "pictures", folder / "pictures"


def import_and_check(
    world: Path, folder: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The folder of images; the table is at `folder / "table"`."""
    source, images = lay_out(world, folder, layout)
    tokenizer = str(world / "qformer_tokenizer")
    main(["data", "import", str(source), "--images", str(images), "--out", str(folder / "table")])
    assert f"{COUNT} records (caption) of {COUNT} images" in capsys.readouterr().out
    for each in (source, folder / "table"):
        command = ["data", "check", str(each), "--images", str(images), "--json"]
        main([*command, "--tokenizer", tokenizer])
        found = json.loads(capsys.readouterr().out)
        assert found["usable"]
        assert (found["rows"], found["images"]) == (COUNT, COUNT)
        assert found["images_checked"]["readable"] == COUNT
        assert found["images_checked"]["width"] == [48, 48, 48]
        assert (found["tokens"]["unknown"], found["tokens"]["longest"]) == (0, 5)
    return images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_in(
    world: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import_and_check(world, tmp_path, layout, capsys)
    records = RecordTable([tmp_path / "table"], "caption")
    found = {record.image.partition("@")[0]: record.captions for record in records}
    expected = {key: (caption,) for key, caption in names().items()}
    if layout == "webdataset":
        expected = {f"00000.tar/{k.replace('/', '_')}": c for k, c in expected.items()}
    assert found == expected


@pytest.mark.parametrize("layout", ["csv", "webdataset"])
def test_to_captions(
    world: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = import_and_check(world, tmp_path, layout, capsys)
    table, cache = str(tmp_path / "table"), str(tmp_path / "features")
    command = ["features", "--images", str(images), "--records", table, "--out", cache]
    main([*command, "--encoder", str(world / "vit"), "--batch-size", "16"])
    assert f"{COUNT} images of 17 tokens x 24" in capsys.readouterr().out
    assert len(FeatureCache(cache)) == COUNT
    data = {"records": table, "features": cache, "eval_records": table, "eval_features": cache}
    optim = {"max_steps": 16, "batch_size": 12, "lr": 1e-2}
    for stage in (1, 2):
        settings = values(world, tmp_path / f"stage{stage}", stage, data=data, optim=optim)
        if stage == 2:
            settings["model"] = {}
            settings["init_from"] = str(tmp_path / "stage1")
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        train_main(["--config", str(tmp_path / "run.yaml")])
        capsys.readouterr()
        losses = [
            line["loss"] for line in read_metrics(tmp_path / f"stage{stage}") if "loss" in line
        ]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    shown = [str(world / "pictures" / key) for key in list(names())[:3]]
    main(["caption", "--model", str(tmp_path / "stage2"), "--num-beams", "1", *shown])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines[-3:]] == shown
    assert all(line.count("\t") == 1 for line in lines[-3:])
