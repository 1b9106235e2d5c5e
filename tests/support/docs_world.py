"""The files that the pages of docs/ name, with small models in the place of real ones.

Names of the hub are folders here, which come before the hub.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import benchmark_files as files
from blip2_models import (
    language_config,
    qformer_words,
    word_tokenizer,
    write_run,
    write_transformers,
)
from finished_runs import CAPTIONS, as_run
from retrieval_models import write_pictures, write_stage1
from stage2_models import SIZE, spread_weights
from transformers import CLIPVisionConfig, CLIPVisionModel, OPTForCausalLM

_PHOTOS = ("cat", "scene", "another", "photo", "a", "b", "picture")
_COUNT = 5


def write_docs_world(folder: Path) -> Path:
    """Write everything under `folder`, from which the pages' commands are given."""
    pictures = folder / "photos"
    write_pictures(pictures, _COUNT)
    for name in _PHOTOS:
        for suffix in (".png", ".jpg"):
            shutil.copy(pictures / "0.png", folder / f"{name}{suffix}")
    (folder / "questions.txt").write_text("what is it ?\nwhere is it ?\n")
    _write_models(folder)
    _write_records(folder)
    _write_benchmarks(folder)
    return folder


def _write_models(folder: Path) -> None:
    held_out = folder / "runs" / "scenes" / "images" / "held_out"
    write_pictures(held_out, _COUNT)
    made = folder / "made"
    stage1 = as_run(write_stage1(made / "stage1"), 1, held_out)
    stage2 = as_run(write_run(made / "stage2", "opt", prompt="a photo of"), 2, held_out)
    for name in ("scenes/stage1", "mine/stage1", "stage1", "vitg_stage1"):
        _copy(stage1, folder / "runs" / name)
    runs = ("scenes/stage2", "scenes/vqa", "mine/stage2", "stage2", "vitg_opt2.7b_coco_caption")
    for name in (*runs, "vitg_opt2.7b_stage2"):
        _copy(stage2, folder / "runs" / name)
    write_transformers(folder / "Salesforce" / "blip2-opt-2.7b", "opt")
    language = OPTForCausalLM(language_config("opt"))
    spread_weights(language, 1)
    for name in ("opt-2.7b", "opt-6.7b"):
        language.save_pretrained(folder / "facebook" / name)
        word_tokenizer("opt").save_pretrained(folder / "facebook" / name)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=SIZE, patch_size=8)
    CLIPVisionModel(vision).save_pretrained(folder / "openai" / "clip-vit-large-patch14")
    for name in ("google-bert/bert-base-uncased", "bert-base-uncased"):
        qformer_words().save_pretrained(folder / name)


def _copy(run: Path, place: Path) -> None:
    shutil.copytree(run, place)


def _write_records(folder: Path) -> None:
    names = [f"{number}.png" for number in range(_COUNT)]
    rows = list(zip(names, CAPTIONS, strict=True))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    (folder / "cc3m").mkdir()
    with (folder / "cc3m" / "0.csv").open("w", newline="", encoding="latin-1") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    lines = "".join(json.dumps({"image": n, "captions": [text]}) + "\n" for n, text in rows)
    for name in ("web", "held_out", "data/captions", "data/coco/captions_train"):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines)
    (folder / "data" / "coco" / "captions_test.jsonl").write_text(lines)
    for images in (
        "data/images",
        "data/coco/images",
        "flickr30k-images",
        "gqa/images",
        "train2014",
    ):
        shutil.copytree(folder / "photos", folder / images)


def _write_benchmarks(folder: Path) -> None:
    entries = [(f"{n}.png", "test", [text]) for n, text in enumerate(CAPTIONS)]
    files.karpathy(folder / "dataset_flickr30k.json", entries, coco=False)
    files.karpathy(folder / "dataset_coco.json", entries)
    files.coco_captions(folder / "captions_train2014.json", entries)
    shutil.copytree(folder / "photos", folder / "coco" / "val2014")
    (folder / "val2014").mkdir()
    for n in range(2):
        name = f"COCO_val2014_{n:012d}.jpg"
        shutil.copy(folder / "photos" / f"{n}.png", folder / "val2014" / name)
        shutil.copy(folder / "photos" / f"{n}.png", folder / "gqa" / "images" / f"{n}.jpg")
    questions = [(n, "what is it ?", ["ring"] * 10) for n in range(2)]
    files.vqa(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        folder / "v2_mscoco_val2014_annotations.json",
        questions,
    )
    files.gqa(folder / "testdev_balanced_questions.json", [("0", "what is it ?", "ring")])
