"""Records, the plan of batches, and what a batch holds."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import word_tokenizer, write_world
from torch.utils.data import DataLoader

from blip2fast.data.batches import Batch, BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages
from blip2fast.data.records import (
    CaptionRecord,
    QuestionRecord,
    read_captions,
    read_questions,
    write_records,
)
from blip2fast.data.sources import source_keys
from blip2fast.data.texts import AnswerTexts, CaptionTexts, Stage1Texts, drawn_captions
from blip2fast.stage2.text import Stage2Text

CAPTIONS = [
    CaptionRecord("a.png", ("a red ring", "it is red")),
    CaptionRecord("b.png", ("a disc",)),
]
QUESTIONS = [QuestionRecord("a.png", "what is it", "a ring", "kind")]


def test_records_are_read_as_written(tmp_path: Path) -> None:
    write_records(tmp_path / "c.jsonl", CAPTIONS)
    write_records(tmp_path / "q.jsonl", QUESTIONS)
    assert read_captions(tmp_path / "c.jsonl") == CAPTIONS
    assert read_questions(tmp_path / "q.jsonl") == QUESTIONS
    assert source_keys(tmp_path / "c.jsonl") == ["a.png", "b.png"]
    assert source_keys(tmp_path / "q.jsonl") == ["a.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        ('{"image": "a", "captions": ["x"]}\n{"image": "b"}\n', "line 2: captions: .*required"),
        ('{"image": "a", "captions": "x"}\n', "line 1: captions: "),
        ('{"image": 3, "captions": ["x"]}\n', "line 1: image: .*string"),
        ('{"image": "a", "captions": ["x"], "caption": 1}\n', "line 1: caption: "),
        ('{"image": "a", "captions": ["x"', "line 1: the line: "),
        ('{"image": "a", "captions": []}\n', "record 1: image 'a' has an empty caption"),
        ('{"image": "a", "captions": ["x", " "]}\n', "record 1: image 'a' has an empty caption"),
    ],
)
def test_bad_captions_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "c.jsonl")


def test_bad_questions_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"image": "a", "question": "what", "answer": " "}\n')
    with pytest.raises(ValueError, match="record 1: an empty question or answer"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match=r"no records at .*nowhere"):
        read_captions(tmp_path / "nowhere")


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    extra=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_an_epoch_takes_each_record_at_most_once(
    batch: int, world: int, accumulation: int, extra: int, seed: int
) -> None:
    records = batch * world * accumulation + extra
    plans = [BatchPlan(records, batch, seed, rank, world, accumulation) for rank in range(world)]
    steps = plans[0].steps_per_epoch * accumulation
    for epoch in range(2):
        taken: Counter[int] = Counter()
        for micro_step in range(epoch * steps, (epoch + 1) * steps):
            for plan in plans:
                part = plan.batch(micro_step)
                assert part.epoch == epoch
                assert len(part.indices) == batch
                taken.update(part.indices.tolist())
        assert set(taken.values()) == {1}
        assert len(taken) == records // plans[0].samples_per_step * plans[0].samples_per_step


def test_a_step_is_the_same_on_any_number_of_processes() -> None:
    def step(number: int, batch: int, world: int, accumulation: int) -> list[int]:
        plans = [BatchPlan(30, batch, 3, rank, world, accumulation) for rank in range(world)]
        parts = [
            plan.batch(number * accumulation + k).indices
            for k in range(accumulation)
            for plan in plans
        ]
        return np.concatenate(parts).tolist()

    for number in range(9):
        alone = step(number, 8, 1, 1)
        assert step(number, 4, 2, 1) == step(number, 2, 2, 2) == step(number, 4, 1, 2) == alone
    assert step(0, 8, 1, 1) != step(3, 8, 1, 1)  # the next epoch is shuffled anew


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 x 2 processes x accumulation 3 = 24 samples.*only 20"):
        BatchPlan(20, 4, 0, 0, 2, 3)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        BatchPlan(20, 4, 0, 2, 2)


def test_captions_are_drawn_anew_each_epoch_and_the_same_each_time() -> None:
    records = [CaptionRecord(str(i), tuple(f"{i}-{c}" for c in range(4))) for i in range(200)]
    everything = np.arange(200)
    first = drawn_captions(records, Batch(0, everything), seed=1)
    assert drawn_captions(records, Batch(0, everything[50:60]), seed=1) == first[50:60]
    assert drawn_captions(records, Batch(1, everything), seed=1) != first
    assert drawn_captions(records, Batch(0, everything), seed=2) != first
    counts = Counter(caption[-1] for caption in first)
    assert set(counts) == set("0123")
    assert min(counts.values()) > 25


def _language_tokenizer() -> object:
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>"}
    return word_tokenizer(special, "</s> $A")


def test_stage1_batches_mark_captions_of_one_image() -> None:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_tokenizer(special, "[CLS] $A [SEP]")
    records = [
        CaptionRecord("a", ("a red ring",)),
        CaptionRecord("b", ("a disc",)),
        CaptionRecord("a", ("it is a big red blue green ring",)),
    ]
    make = Stage1Texts(tokenizer, 6, seed=0)
    batch = make(records, Batch(0, np.array([2, 1, 0])))
    ids = batch["image_ids"].tolist()
    assert ids[0] == ids[2] != ids[1]
    of_text = Stage1Texts(tokenizer, 6, 0, "text")
    same = [*records, CaptionRecord("c", ("A  disc",))]
    ids = of_text(same, Batch(0, np.arange(4)))["image_ids"].tolist()
    assert ids[1] == ids[3]
    assert len(set(ids)) == 3
    assert batch["input_ids"].shape == (3, 6)  # cut
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [6, 4, 5]
    ends = batch["input_ids"][torch.arange(3), lengths - 1]
    assert (ends == tokenizer.sep_token_id).all()


def test_stage2_targets_take_caption_or_answer() -> None:
    text = Stage2Text(_language_tokenizer(), False, prompt="what is {}")
    plain = Stage2Text(_language_tokenizer(), False)
    batch = Batch(0, np.array([1]))
    captions = CaptionTexts(plain, seed=0)(CAPTIONS, batch)
    assert plain.decode(captions["labels"][:, 1:]) == ["a disc"]
    answers = AnswerTexts(text)(QUESTIONS, Batch(0, np.array([0])))
    kept = answers["labels"][answers["labels"] != -100]
    assert text.decode(kept[None]) == ["a ring"]


def test_workers_read_what_the_main_process_reads(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    cache = FeatureCache(world / "train_features")
    records = read_captions(world / "train.jsonl")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    make = Stage1Texts(word_tokenizer(special, "[CLS] $A [SEP]"), 12, 0)
    batches = PlannedBatches(records, BatchPlan(len(records), 4, 0), CachedImages(cache), make)
    loader = DataLoader(batches, batch_size=None, sampler=range(3, 7), num_workers=1)
    for micro_step, read in zip(range(3, 7), loader, strict=True):
        expected = batches[micro_step]
        rows = batches.plan.batch(micro_step).indices.tolist()
        assert torch.equal(expected["image_embeds"], cache.read(rows))
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], value) for name, value in expected.items())


def test_a_pickled_cache_opens_its_files_again(tmp_path: Path) -> None:
    """It once held the arrays themselves, so every worker would have got a copy of the cache."""
    world = write_world(tmp_path)
    cache = FeatureCache(world / "train_features")
    packed = pickle.dumps(cache)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed).read([3]), cache.read([3]))
