"""`Blip2`: what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip2_models import SIZE, pictures, write_run, write_transformers
from stage1_cases import SMALL

from blip2fast import Blip2, Blip2Stage1
from blip2fast.checkpoints.trained import (
    Description,
    read_description,
    read_parameters,
    save_model,
)
from blip2fast.command_line import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("opt"), "opt")


@pytest.fixture(scope="module")
def blip2(run: Path) -> Blip2:
    return Blip2.from_pretrained(run)


ONE = pictures(1)[0]
CASES: dict[str, tuple[Callable[[Blip2], Any], str]] = {
    "none": (lambda m: m.caption(), "no images: give images"),
    "empty list": (lambda m: m.caption([]), "the list is empty; give at least one"),
    "both": (
        lambda m: m.caption(ONE, image_embeds=torch.zeros(1, 5, 24)),
        "give images or image_embeds, not both",
    ),
    "no image": (lambda m: m.caption([ONE, 3]), "an image is a int; give a PIL image"),
    "no list": (lambda m: m.caption({1: ONE}), "images is a dict; give a list"),
    "shape": (lambda m: m.caption(torch.zeros(SIZE, SIZE)), r"an array of shape \(16, 16\)"),
    "type": (
        lambda m: m.caption(np.zeros((3, SIZE, SIZE), np.int32)),
        r"shape \(3, 16, 16\) and torch.int32: expected a picture",
    ),
    "sizes": (
        lambda m: m.caption([torch.zeros(3, SIZE, SIZE), torch.zeros(3, 8, 8)]),
        r"different sizes after their transform: \[\(3, 8, 8\), \(3, 16, 16\)\]",
    ),
    "size": (lambda m: m.caption(torch.zeros(3, 8, 8)), r"expected \(B, \*\(3, 16, 16\)\)"),
    "embeds": (lambda m: m.caption(image_embeds=torch.zeros(4)), r"image_embeds has shape \(4,\)"),
    "missing file": (lambda m: m.caption("no/such.png"), "image no/such.png: no such file"),
    "no questions": (lambda m: m.answer(ONE, []), "no questions: a list of them is empty"),
    "empty question": (lambda m: m.answer(ONE, [" "]), "the question ' ' is empty"),
    "counts": (
        lambda m: m.answer([ONE, ONE], ["a ?", "b ?", "c ?"]),
        "3 questions for 2 images: give one for all, or one",
    ),
    "nested of one": (lambda m: m.answer(ONE, [["a ?"]]), "expected a list of texts"),
    "caption prompt": (
        lambda m: m.caption(ONE, prompt="Question: {}"),
        "has a place for a question; use answer",
    ),
    "question prompt": (lambda m: m.answer(ONE, "a ?", prompt="x"), "'x' has no {} for the"),
    "chat without": (lambda m: m.chat(), "no images: give images"),
    "marker": (lambda m: m.answer(ONE, "is <image> it ?"), "marker"),
    "chat question": (lambda m: m.chat(ONE)(""), "the question '' is empty"),
    "beams": (lambda m: m.caption(ONE, num_beams=0), "num_beams=0, num_captions=1"),
    "captions": (
        lambda m: m.caption(ONE, num_captions=6),
        "num_captions=6 of num_beams=5: raise num_beams",
    ),
    "idle": (lambda m: m.caption(ONE, top_p=0.5), "top_p=0.5 has no effect; set do_sample"),
    "batch": (lambda m: m.caption(ONE, batch_size=0), "batch_size is 0; expected at least 1"),
    "max_length": (lambda m: m.caption(ONE, max_length=9), "give max_new_tokens instead"),
    "too long": (lambda m: m.answer(ONE, "red " * 99), "max_position_embeddings=96; shorten"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(blip2: Blip2, case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call(blip2)


def test_refuses_a_file_that_is_no_image(blip2: Blip2, tmp_path: Path) -> None:
    (tmp_path / "it.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"image .*it\.png: is not a picture"):
        blip2.caption([ONE, tmp_path / "it.png"])


def renamed(run: Path, folder: Path, **changes: Any) -> Path:
    """The run, with other values in its description."""
    description = dataclasses.replace(read_description(run), **changes)
    save_model(folder, read_parameters(run), description)
    return folder


def test_an_unknown_encoder_is_an_error_of_pictures_alone(run: Path, tmp_path: Path) -> None:
    for name, why in (
        ("my own features", "from 'my own features', which is not a known encoder"),
        ("no/such/folder, block 2", "image encoder 'no/such/folder': not found"),
    ):
        blip2 = Blip2.from_pretrained(renamed(run, tmp_path / name[:2], image_encoder=name))
        assert blip2.caption(image_embeds=torch.randn(2, 5, 24))
        with pytest.raises(ValueError, match=why) as caught:
            blip2.caption(ONE)
        assert "Give from_pretrained image_encoder=..." in str(caught.value)
        again = Blip2.from_pretrained(tmp_path / name[:2], image_encoder=str(run.parent / "vision"))
        assert again.caption(ONE)


def test_refuses_an_encoder_of_another_width(run: Path, tmp_path: Path) -> None:
    other = renamed(run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"gives tokens of width 48.*trained on 24"):
        Blip2.from_pretrained(other, image_encoder=wide_vision(tmp_path))


def wide_vision(folder: Path) -> str:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE)
    ViTModel(config).save_pretrained(folder / "wide")
    return str(folder / "wide")


def test_refuses_a_language_model_that_is_gone(run: Path, tmp_path: Path) -> None:
    moved = renamed(run, tmp_path / "run", language_model="no/such/model")
    with pytest.raises(ValueError, match="language model 'no/such/model': not found"):
        Blip2.from_pretrained(moved)
    assert Blip2.from_pretrained(moved, language_model=str(run.parent / "language")).caption(ONE)


def test_refuses_what_cannot_write(run: Path, tmp_path: Path) -> None:
    model = Blip2Stage1(SMALL)
    state = dict(model.state_dict())
    save_model(tmp_path / "one", state, Description(1, dataclasses.asdict(SMALL)))
    with pytest.raises(ValueError, match="trained in stage 1, without a language model"):
        Blip2.from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="is a 'opt' model; give a run"):
        Blip2.from_pretrained(run.parent / "language")
    (tmp_path / "begun" / "checkpoints" / "step-00000007").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"has not ended; give a checkpoint of it, .*step-00000007"
    ):
        Blip2.from_pretrained(tmp_path / "begun")
    with pytest.raises(ValueError, match=r"nothing': not found: give a folder"):
        Blip2.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="offload='disk': expected 'none' or 'stream'"):
        Blip2.from_pretrained(run, offload="disk")  # type: ignore[arg-type]


def test_a_transformers_folder_has_its_own_parts(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path, "opt")
    with pytest.raises(ValueError, match=r"language_model='x': .* has its own"):
        Blip2.from_pretrained(folder, language_model="x")


def test_the_command_writes_a_line_for_each_image(
    run: Path, blip2: Blip2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / f"{n}.png") for n in range(2)]
    for image, path in zip(pictures(2), paths, strict=True):
        image.save(path)
    main(["caption", *paths, "--model", str(run), "--num-beams", "2"])
    want = blip2.caption(paths, num_beams=2)
    assert capsys.readouterr().out == f"{paths[0]}\t{want[0]}\n{paths[1]}\t{want[1]}\n"
    main(["caption", paths[0], "--model", str(run), "--question", "colour ?"])
    assert capsys.readouterr().out == f"{paths[0]}\t{blip2.answer(paths[0], 'colour ?')}\n"
    with pytest.raises(SystemExit, match=r"error: image .*9\.png: no such file"):
        main(["caption", str(tmp_path / "9.png"), "--model", str(run)])
