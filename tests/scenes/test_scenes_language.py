"""The language tower: its training rows, a tiny training, and the shipped one's reading."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from blip2fast.scenes import SceneSpec, language_tokenizer, make_split
from blip2fast.scenes.build_towers import FOLDER
from blip2fast.scenes.language_tower import (
    IGNORED,
    _batches,
    _ids,
    _loss,
    _model,
    _row,
    reading_accuracy,
    train_language_tower,
)

TOKENIZER = language_tokenizer()


def scenes(source: str, split: str, count: int):
    return make_split(SceneSpec(source=source), split, count, seed=0).scenes


def test_continuations_that_share_a_description_lose_what_they_lose_alone() -> None:
    torch.manual_seed(0)
    model = _model(TOKENIZER, width=32, layers=2).double().eval()
    batch = next(_batches(TOKENIZER, scenes("shapes", "train", 20), batch_size=4, seed=0))
    with torch.no_grad():
        together = _loss(model, batch)
        alone = []
        for ids, labels, _, segments in zip(*batch, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                kept = (segments == 0) | (segments == segment)
                logits = model(input_ids=ids[None, kept]).logits[0, :-1]
                target = labels[kept].where(segments[kept] == segment, IGNORED)[1:]
                alone.append(F.cross_entropy(logits, target, reduction="none")[target != IGNORED])
    torch.testing.assert_close(together, torch.cat(alone).mean(), rtol=1e-6, atol=1e-6)


def test_rows_learn_what_follows_the_description_and_nothing_else() -> None:
    (scene,) = scenes("shapes", "train", 1)
    row = _row(scene, random.Random(0), lambda text: _ids(TOKENIZER, text), TOKENIZER.eos_token_id)
    assert bool((row.labels[row.segments == 0] == IGNORED).all())
    for segment in range(1, int(row.segments.max()) + 1):
        own = row.segments == segment
        text = TOKENIZER.decode(row.ids[own])
        learned = TOKENIZER.decode(row.labels[own & (row.labels != IGNORED)])
        assert text.endswith(learned)
        assert learned.endswith("</s>")
        assert ("answer" in text) == ("answer" not in learned and "question" in text)
        start = int((row.segments == 0).sum())
        assert row.positions[own].tolist() == list(range(start, start + int(own.sum())))


def test_a_tiny_tower_trains_repeatably_and_loads(tmp_path: Path) -> None:
    some = scenes("digits", "train", 30)
    state = torch.get_rng_state()
    for name in ("one", "two"):
        report = train_language_tower(
            some, tmp_path / name, width=16, layers=1, steps=3, batch_size=2
        )
        assert report.steps == 3
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32)
        for n in ("one", "two")
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert reading_accuracy(one, tokenizer, some)["all"] < 0.5


def test_bad_arguments_name_the_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes is empty"):
        train_language_tower([], tmp_path)
    with pytest.raises(ValueError, match="width is 24; use a multiple of 16"):
        train_language_tower(scenes("shapes", "train", 1), tmp_path, width=24)


@pytest.mark.parametrize("source", ["shapes", "digits"])
@pytest.mark.parametrize("split", ["held_out", "unseen_pairs"])
def test_the_shipped_tower_reads(source: str, split: str) -> None:
    """The ceiling of everything that is read from generated captions."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "language", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "language")
    right = reading_accuracy(model, tokenizer, scenes(source, split, 100))
    assert min(right.values()) >= 0.95, right


def test_the_shipped_towers_are_small() -> None:
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size < 2_500_000
