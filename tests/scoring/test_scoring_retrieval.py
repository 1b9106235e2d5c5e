"""Retrieval on a benchmark against the functions it is made of, and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_models import qformer_words
from scoring_cases import (
    BAD,
    CAPTIONS,
    COUNT,
    NAMES,
    questions,
    setup,
    write_retrieval_model,
    write_stage1_run,
)
from transformers import Blip2ForImageTextRetrieval, BlipImageProcessorPil

from blip2fast.checkpoints.trained import load_trained
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import read_picture
from blip2fast.data.source_config import RecordSource
from blip2fast.data.texts import tokenize_captions
from blip2fast.evaluation.retrieval import (
    TokenizedTexts,
    encode_all,
    rerank,
    retrieval_ranks,
    retrieval_recall,
)
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.scoring.models import ModelSource
from blip2fast.scoring.retrieving import evaluate_retrieval
from blip2fast.scoring.setup import Setup
from blip2fast.stage1.losses import max_query_similarity
from blip2fast.stage1.model import Blip2Stage1

OWNER = [n for n, texts in enumerate(CAPTIONS) for _ in texts]
ALL = [text for texts in CAPTIONS for text in texts]


def evaluated(given: Setup, *more: Any) -> dict[str, Any]:
    result = evaluate_retrieval(given, *more)
    assert result is not None
    return result


def expected_scores(world: Path, wanted: list[int], k: int) -> dict[str, Any]:
    """ITC and re-ranked scores of some images, by the functions that training uses."""
    model = load_trained(world / "stage1" / "run")
    assert isinstance(model, Blip2Stage1)
    path = str(world / "stage1" / "vision")
    encoder = load_image_encoder(path, layer=1)
    transform = transform_for(path, encoder.image_size)
    pictures = [transform(read_picture(world / "pictures", NAMES[n])) for n in wanted]
    tokens = encoder(torch.stack(pictures))
    captions = [text for n in wanted for text in CAPTIONS[n]]
    owner = torch.tensor([i for i, n in enumerate(wanted) for _ in CAPTIONS[n]])
    texts = TokenizedTexts(**tokenize_captions(qformer_words(), captions, 12), image=owner)
    features = encode_all(model, tokens.__getitem__, len(wanted), texts)
    itc = max_query_similarity(*features)
    return {
        "owner": owner,
        "itc": (itc, itc),
        "itm": rerank(model, tokens.__getitem__, texts, itc, k),
    }


def compare(metrics: dict[str, float], scores: dict[str, Any]) -> None:
    for name in ("itc", "itm"):
        recall = retrieval_recall(*scores[name], scores["owner"])
        for key, value in recall.items():
            assert metrics[f"{name}_{key}"] == value
        assert metrics[f"{name}_mean_recall"] == pytest.approx(sum(recall.values()) / 6)


@pytest.mark.parametrize("k", [2, 128])
def test_recall_by_itc_and_re_ranked(world: Path, tmp_path: Path, k: int) -> None:
    result = evaluated(setup(world, tmp_path, 1), k)
    scores = expected_scores(world, list(range(COUNT)), k)
    compare(result["metrics"], scores)
    assert 0 < result["metrics"]["itc_t2i_r1"] + result["metrics"]["itm_t2i_r5"] < 2
    assert (result["images"], result["texts"], result["samples"]) == (COUNT, len(ALL), COUNT)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    of_images, of_texts = rows[:COUNT], rows[COUNT:]
    for name in ("itc", "itm"):
        ranks = retrieval_ranks(*scores[name], scores["owner"])
        assert [row[f"{name}_rank"] for row in of_images] == ranks[0].tolist()
        assert [row[f"{name}_rank"] for row in of_texts] == ranks[1].tolist()
        for row in of_images:
            best = row[f"{name}_texts"]
            own = [OWNER[text] == int(row["id"]) for text in best]
            assert (own[0] is True) == (row[f"{name}_rank"] == 0)
    assert [row["caption"] for row in of_texts] == ALL
    assert of_texts[0]["itm_images"][0] in NAMES


def test_itc_alone_and_fewer_captions(world: Path, tmp_path: Path) -> None:
    result = evaluated(setup(world, tmp_path, 1), 0, 1)
    assert result["texts"] == COUNT
    assert not [name for name in result["metrics"] if name.startswith("itm")]


def test_a_bad_picture_leaves_with_its_texts(world: Path, tmp_path: Path) -> None:
    result = evaluated(setup(world, tmp_path, 1, images=world / "pictures" / "damaged"), 3)
    assert [row["image"] for row in result["failed"]] == [NAMES[BAD]]
    assert (result["images"], result["texts"]) == (COUNT - 1, len(ALL) - len(CAPTIONS[BAD]))
    good = [n for n in range(COUNT) if n != BAD]
    compare(result["metrics"], expected_scores(world, good, 3))


def test_matching_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip2fast.scoring import retrieving

    monkeypatch.setattr(retrieving, "_IMAGES_AT_ONCE", 2)
    whole = evaluated(setup(world, tmp_path / "whole", 1), 3)
    own, calls = Blip2Stage1.project_images, []

    def counted(self: Blip2Stage1, tokens: torch.Tensor, *more: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(tokens))
        return own(self, tokens, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Blip2Stage1, "project_images", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluated(setup(world, tmp_path / "cut", 1), 3)
        done = (tmp_path / "cut" / "batches" / "00000.jsonl").read_text().split()
        assert done, "nothing was finished before the stop"
        calls[:] = [0] * 3  # goes on without a stop
        result = evaluated(setup(world, tmp_path / "cut", 1), 3)
    # an image is projected once for all its candidates, and only those that were left
    assert 0 < sum(calls[3:]) < COUNT
    assert result["metrics"] == whole["metrics"]
    assert (tmp_path / "cut" / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()


def test_a_folder_of_transformers(world: Path, tmp_path: Path) -> None:
    folder = write_retrieval_model(tmp_path / "model")
    given = Setup(
        model=ModelSource(str(folder)),
        data=RecordSource(source=str(world / "flickr.json"), split="test"),
        out=tmp_path / "out",
        images=world / "pictures",
    )
    result = evaluated(given, 128)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    processor = BlipImageProcessorPil.from_pretrained(folder)
    pictures = [read_picture(world / "pictures", name) for name in NAMES]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    texts = tokenize_captions(qformer_words(), ALL, 12)
    with torch.no_grad():
        itc = theirs(pixels, **texts, use_image_text_matching_head=False).logits_per_image
        match = torch.stack(
            [
                theirs(
                    picture.expand(len(ALL), -1, -1, -1), **texts, use_image_text_matching_head=True
                ).logits_per_image[:, 1]
                for picture in pixels
            ]
        )
    both = itc + match
    for name, scores in (("itc", itc), ("itm", both)):
        recall = retrieval_recall(scores, scores, torch.tensor(OWNER))
        assert {key: result["metrics"][f"{name}_{key}"] for key in recall} == recall


def test_a_run_that_trained_its_encoder(world: Path, tmp_path: Path) -> None:
    write_stage1_run(tmp_path / "stage1", trains_encoder=True)
    data = {"source": str(world / "flickr.json"), "split": "test"}
    more = {"images": world / "pictures"}
    evaluated(setup(tmp_path, tmp_path / "own", 1, data, **more))
    evaluated(setup(world, tmp_path / "base", 1))
    own, base = (
        (tmp_path / name / "batches" / "00000.jsonl").read_text() for name in ("own", "base")
    )
    assert own != base, "the trained weights were not used"
    cache = FeatureCache.create(tmp_path / "cache", NAMES, 5, 24, encoder_id="e")
    with cache as writer:
        writer.write(0, torch.zeros(COUNT, 5, 24))
    more = {"images": None, "features": tmp_path / "cache"}
    with pytest.raises(ValueError, match="has trained its image encoder, which a cache was not"):
        evaluate_retrieval(setup(tmp_path, tmp_path / "out", 1, data, **more))


def test_models_that_cannot_compare(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was trained in stage 2; retrieval compares images"):
        evaluate_retrieval(setup(world, tmp_path, 2))
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    data = RecordSource(source=str(world / "flickr.json"), split="test")
    for path, message in (
        (tmp_path, "a run that has not ended; give a checkpoint of it, .*step-00000004"),
        (tmp_path / "none", "none': not found: give a folder, a run of blip2fast or a"),
        (world / "stage1" / "vision", "is a ViTModel; retrieval needs a run"),
    ):
        given = Setup(
            model=ModelSource(str(path)), data=data, out=tmp_path / "o", images=world / "pictures"
        )
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(given)
    with pytest.raises(ValueError, match=r"rerank_k=-1.*expected at least 0, 1 and 2"):
        evaluate_retrieval(setup(world, tmp_path, 1), -1)
    with pytest.raises(ValueError, match="no 'captions' or 'caption'"):
        evaluate_retrieval(setup(world, tmp_path, 1, questions(world)))
