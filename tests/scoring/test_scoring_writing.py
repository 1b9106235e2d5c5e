"""Captions and answers of a benchmark: metrics, predictions, stops, faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest
import torch
from scoring_cases import BAD, CAPTIONS, COUNT, NAMES, questions, setup

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import read_picture
from blip2fast.evaluation.answer_accuracy import vqa_accuracy
from blip2fast.evaluation.caption_metrics import score_captions
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.inference.inputs import GenerationOptions
from blip2fast.inference.model import Blip2
from blip2fast.scoring.models import ModelSource
from blip2fast.scoring.setup import Setup
from blip2fast.scoring.writing import evaluate_answers, evaluate_captions

QUICK: GenerationOptions = {"num_beams": 2, "max_new_tokens": 5, "length_penalty": 1.0}


@pytest.fixture(scope="module")
def model(world: Path) -> Blip2:
    return Blip2.from_pretrained(world / "stage2" / "run", device="cpu")


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def captions(given: Setup, prompt: str | None = None) -> dict[str, Any]:
    result = evaluate_captions(given, prompt, QUICK)
    assert result is not None
    assert json.loads((given.out / "result.json").read_text()) == result
    return result


def answers(given: Setup) -> dict[str, Any]:
    result = evaluate_answers(given, None, QUICK)
    assert result is not None
    return result


def test_captions_are_the_models_and_scored(world: Path, model: Blip2, tmp_path: Path) -> None:
    result = captions(setup(world, tmp_path, 2), "a photo of")
    paths: list[Any] = [world / "pictures" / name for name in NAMES]
    expected: Any = model.caption(paths, prompt="a photo of", **QUICK)
    rows = rows_in(tmp_path)
    assert [row["caption"] for row in rows] == expected
    assert len(set(expected)) > 2, "the model must tell pictures apart"
    assert [row["references"] for row in rows] == CAPTIONS
    scores = score_captions(expected, CAPTIONS)
    assert result["metrics"] == scores.corpus
    assert [row["CIDEr-D"] for row in rows] == scores.each["CIDEr-D"]
    assert (result["samples"], result["failed"]) == (COUNT, [])
    assert result["not_computed"].keys() == {"METEOR", "SPICE"}
    conditions = result["conditions"]
    assert conditions["num_beams"] == 2
    assert conditions["prompt"] == "a photo of"
    assert {"model_sha256", "data_sha256", "torch", "transformers", "seconds"} <= conditions.keys()


def test_a_bad_picture_is_listed_and_the_others_are_scored(
    world: Path, model: Blip2, tmp_path: Path
) -> None:
    folder = world / "pictures" / "damaged"
    result = captions(setup(world, tmp_path, 2, images=folder))
    (failed,) = result["failed"]
    assert (failed["id"], failed["image"]) == (str(BAD), NAMES[BAD])
    assert f"{NAMES[BAD]}: is cut off or damaged" in failed["error"]
    good: list[Any] = [folder / name for n, name in enumerate(NAMES) if n != BAD]
    expected: Any = model.caption(good, **QUICK)
    references = [texts for n, texts in enumerate(CAPTIONS) if n != BAD]
    assert result["metrics"] == score_captions(expected, references).corpus
    assert [row.get("error") is None for row in rows_in(tmp_path)].count(False) == 1


def test_without_any_picture_there_is_no_score(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 7 samples could be evaluated; the first: image"):
        evaluate_captions(setup(world, tmp_path, 2, images=tmp_path), None, QUICK)


def test_limit_takes_the_first(world: Path, tmp_path: Path) -> None:
    assert captions(setup(world, tmp_path, 2, limit=2))["samples"] == 2
    assert [row["image"] for row in rows_in(tmp_path)] == NAMES[:2]


@pytest.mark.parametrize("cut", [0, 25])
def test_a_stopped_evaluation_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Also where the last line of its file is half-written (`cut` bytes are missing)."""
    captions(setup(world, tmp_path / "whole", 2))
    own, calls = Blip2.caption, []

    def stop(self: Blip2, *given: Any, **more: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(more["images"]))
        return own(self, *given, **more)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(Blip2, "caption", stop)
        with pytest.raises(KeyboardInterrupt):
            captions(setup(world, out, 2))
        file = out / "batches" / "00000.jsonl"
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) - cut])
        assert not (out / "result.json").exists()
        calls.clear()
        captions(setup(world, out, 2))
    # batches of 3, 3 and 1 pictures, of which two (or one) were done
    assert calls == ([1] if cut == 0 else [3, 1])
    predictions = (out / "predictions.jsonl").read_bytes()
    assert predictions == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    again = captions(setup(world, out, 2))
    assert again["conditions"]["batches_of_earlier_starts"] == 3


def test_other_settings_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    captions(setup(world, tmp_path, 2))
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: captions(setup(world, tmp_path, 2), "a dog"), "prompt '', now it is 'a dog'"),
        (lambda: captions(setup(world, tmp_path, 2, batch_size=2)), "batch_size 3, now it is 2"),
        (lambda: captions(setup(world, tmp_path, 2, limit=3)), "data_sha256"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=f"has predictions with {message}") as error:
            change()
        assert "give another --out, or --overwrite" in str(error.value)
    assert captions(setup(world, tmp_path, 2, limit=3, overwrite=True))["samples"] == 3


def test_tokens_of_a_feature_cache(world: Path, tmp_path: Path) -> None:
    encoder = load_image_encoder(str(world / "stage2" / "vision"), layer=1)
    transform = transform_for(str(world / "stage2" / "vision"), encoder.image_size)
    pixels = torch.stack([transform(read_picture(world / "pictures", name)) for name in NAMES[1:]])
    shape = encoder.num_tokens, encoder.width
    cache = FeatureCache.create(tmp_path / "cache", NAMES[1:], *shape, encoder_id=encoder.identity)
    with cache as writer:
        writer.write(0, encoder(pixels))
    cached = captions(setup(world, tmp_path / "a", 2, images=None, features=tmp_path / "cache"))
    captions(setup(world, tmp_path / "b", 2))
    first, second = (
        [row.get("caption") for row in rows_in(tmp_path / name)] for name in ("a", "b")
    )
    assert first == [None, *second[1:]]
    assert "0.png' is not among the 6 of" in cached["failed"][0]["error"]


def test_vqa_accuracy_and_its_types(world: Path, model: Blip2, tmp_path: Path) -> None:
    result = answers(setup(world, tmp_path, 2, questions(world)))
    rows = rows_in(tmp_path)
    for row in rows[:2]:
        path = world / "pictures" / row["image"]
        assert row["answer"] == model.answer(path, row["question"], **QUICK)
        assert row["accuracy"] == vqa_accuracy(row["answer"], row["answers"])
    accuracies = [row["accuracy"] for row in rows]
    assert result["metrics"]["accuracy"] == pytest.approx(sum(accuracies) / 12)
    assert result["metrics"].keys() == {"accuracy", "accuracy_always_normalised"}
    assert result["by"].keys() == {"answer_type", "question_type"}
    assert result["rule"] == "leave one out of several answers"
    assert result["conditions"]["prompt"] == "Question: {} Answer:"


def test_right_answers_count(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of ten said "ring": of nine others 3 or 4 did, so it is wholly right."""

    def answer(self: Blip2, *, questions: list[list[str]], **more: Any) -> list[list[str]]:
        known = {"what is red ?": "The ring.", "what is blue ?": "Star"}
        return [[known.get(each, "dog") for each in asked] for asked in questions]

    monkeypatch.setattr(Blip2, "answer", answer)
    result = answers(setup(world, tmp_path, 2, questions(world)))
    assert result["metrics"]["accuracy"] == pytest.approx(4 / 12)


def test_ok_vqa_and_gqa(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Blip2, *, questions: list[list[str]], **more: Any) -> list[list[str]]:
        return [["rideing" for _ in asked] for asked in questions]

    monkeypatch.setattr(Blip2, "answer", answer)
    paths = files.vqa(
        tmp_path / "q.json", tmp_path / "a.json", [(0, "what is it", ["ride"] * 10)], True
    )
    source = {"source": str(paths[0]), "annotations": str(paths[1]), "image_name": "{}.png"}
    metrics = answers(setup(world, tmp_path / "ok", 2, source))["metrics"]
    assert (metrics["accuracy"], metrics["accuracy_of_raw_answers"]) == (0, 1)

    rows = [("0", "doing what?", "Rideing"), ("1", "where?", "left")]
    source = {"source": str(files.gqa(tmp_path / "gqa.json", rows)), "image_name": "{}.png"}
    result = answers(setup(world, tmp_path / "gqa", 2, source))
    assert result["metrics"] == {"accuracy": 0.5}
    assert result["rule"] == "exact match of any answer"
    assert result["by"]["structural_type"] == {"verify": 0.5}


def test_nocaps_by_domain(world: Path, tmp_path: Path) -> None:
    images = [
        (name, "near-domain" if n < 3 else "out-domain", CAPTIONS[n])
        for n, name in enumerate(NAMES)
    ]
    source = {"source": str(files.coco_captions(tmp_path / "nocaps.json", images))}
    result = captions(setup(world, tmp_path / "out", 2, source))
    texts = [row["caption"] for row in rows_in(tmp_path / "out")]
    assert result["by"]["domain"] == {
        "near-domain": score_captions(texts[:3], CAPTIONS[:3]).corpus,
        "out-domain": score_captions(texts[3:], CAPTIONS[3:]).corpus,
    }


def test_a_question_that_does_not_fit_is_a_fault_of_that_sample(
    world: Path, tmp_path: Path
) -> None:
    rows = [(0, "what is it", ["ring"] * 10), (1, "what is " * 60, ["ring"] * 10)]
    paths = files.vqa(tmp_path / "q.json", tmp_path / "a.json", rows)
    source = {"source": str(paths[0]), "annotations": str(paths[1]), "image_name": "{}.png"}
    result = answers(setup(world, tmp_path / "out", 2, source))
    (failed,) = result["failed"]
    assert failed["id"] == "101"
    assert "96" in failed["error"]


def test_bad_input_is_one_line(world: Path, tmp_path: Path) -> None:
    given = setup(world, tmp_path / "out", 2)
    (tmp_path / "file").write_text("")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: setup(world, tmp_path, 2, batch_size=0), "batch_size is 0; expected at least 1"),
        (lambda: ModelSource("x", "int8"), "dtype 'int8': expected one of fp32, bf16, fp16"),
        (
            lambda: captions(setup(world, tmp_path / "out", 2, images=None)),
            "give --images, a folder of pictures, or --features, a feature cache",
        ),
        (
            lambda: captions(setup(world, tmp_path / "out", 2, images=tmp_path / "none")),
            "--images .*none: not a folder",
        ),
        (lambda: captions(setup(world, tmp_path / "file", 2)), "--out .*file is a file"),
        (lambda: captions(setup(world, tmp_path / "out", 1)), "was trained in stage 1"),
        (lambda: captions(given, "what is {}"), "'what is {}' has no question for its {}"),
        (lambda: evaluate_answers(given, "what"), "no 'answer' or 'answers'"),
        (
            lambda: evaluate_answers(setup(world, tmp_path / "o", 2, questions(world)), "what"),
            "--prompt 'what' needs {} for the question",
        ),
        (
            lambda: captions(setup(world, tmp_path / "out", 2, device="cuda:9")),
            "device 'cuda:9': there are",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
