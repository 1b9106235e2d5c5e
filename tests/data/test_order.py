"""The order of samples: a bijection, without an array of all, and the same for every process."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import word_tokenizer

from blip2fast.data import order
from blip2fast.data.batches import Batch, BatchPlan
from blip2fast.data.order import Mixture, feistel, shuffled
from blip2fast.data.records import CaptionRecord, QuestionRecord
from blip2fast.data.texts import AnswerTexts, drawn_captions
from blip2fast.stage2.text import Stage2Text


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_sample_comes_once(count: int, seed: int, epoch: int) -> None:
    found = feistel(seed, epoch, count, np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))
    some = np.arange(0, count, 7)
    assert np.array_equal(feistel(seed, epoch, count, some), found[some])


def test_large_orders_are_spread_evenly() -> None:
    """Samples of any part of 10^8 records, and neighbours, come at places like random ones."""
    count, places = 10**8, np.arange(200_000)
    found = feistel(1, 0, count, places)
    assert len(np.unique(found)) == len(found)
    cells = np.bincount(found * 100 // count, minlength=100)
    statistic = ((cells - 2000) ** 2 / 2000).sum()
    assert 50 < statistic < 170  # chi-squared with 99 degrees of freedom: mean 99, sd 14
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    odd = (found & 1).mean()
    assert abs(odd - 0.5) < 0.006
    for other in (feistel(2, 0, count, places), feistel(1, 1, count, places)):
        assert (other == found).sum() < 3
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.01


def test_small_runs_keep_their_order() -> None:
    """NumPy's permutation, as in the runs before: checkpoints of them go on as they were."""
    expected = np.random.default_rng([3, 2]).permutation(1000)
    assert np.array_equal(shuffled(3, 2, 1000, np.arange(1000)), expected)
    assert np.array_equal(BatchPlan(1000, 10, 3).batch(205).indices, expected[50:60])


def test_small_runs_keep_their_captions() -> None:
    records = [CaptionRecord(str(i), tuple("abcd")) for i in range(50)]
    draws = np.random.default_rng([5, 3, 1]).random(50)
    expected = ["abcd"[int(draw * 4)] for draw in draws]
    assert drawn_captions(records, Batch(3, np.arange(50)), seed=5) == expected


def test_large_plans_are_pure_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MOST_SHUFFLED", 10)
    order.permutation.cache_clear()
    taken: Counter[int] = Counter()
    for step in range(10):
        alone = BatchPlan(41, 4, 3).batch(step).indices
        both = [BatchPlan(41, 2, 3, rank, 2).batch(step).indices for rank in range(2)]
        assert np.array_equal(np.concatenate(both), alone)
        taken.update(alone.tolist())
    assert len(taken) == 40
    assert order.permutation.cache_info().currsize == 0


def test_sources_are_mixed_by_weight() -> None:
    mixture = Mixture((10, 90, 50), (1.0, 1.0, 2.0))
    assert mixture.slots == (38, 37, 75)
    plan = BatchPlan(150, 15, 0, mixture=mixture)
    used: Counter[int] = Counter()
    for epoch in range(4):
        batches = [plan.batch(step) for step in range(epoch * 10, epoch * 10 + 10)]
        samples = np.concatenate([batch.samples for batch in batches])
        assert np.array_equal(np.sort(samples), np.arange(150))
        indices = np.concatenate([batch.indices for batch in batches])
        sources = np.digitize(indices, (10, 100))
        assert np.bincount(sources).tolist() == [38, 37, 75]
        used.update(indices.tolist())
    # all records of a source equally often: 4 x 38 / 10, 4 x 37 / 90, 4 x 75 / 50
    for rows, often in ((range(10), {15, 16}), (range(10, 100), {1, 2}), (range(100, 150), {6})):
        assert {used[row] for row in rows} == often


def test_a_mixed_step_is_the_same_on_any_number_of_processes() -> None:
    mixture = Mixture((10, 30), (1.0, 1.0))
    for step in range(20):
        alone = BatchPlan(40, 8, 3, mixture=mixture).batch(step).indices
        parts = [
            BatchPlan(40, 4, 3, rank, 2, mixture=mixture).batch(step).indices for rank in range(2)
        ]
        assert np.array_equal(np.concatenate(parts), alone)


def test_a_record_that_comes_twice_in_an_epoch_draws_its_caption_anew() -> None:
    records = [CaptionRecord("a", tuple(map(str, range(100))))] * 2
    batch = Batch(0, np.zeros(8, np.int64), np.arange(8))
    assert len(set(drawn_captions(records, batch, 0))) > 5


def test_answers_are_drawn_by_how_many_gave_them() -> None:
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>"}
    text = Stage2Text(word_tokenizer(special, "</s> $A"), False, prompt="what is {}")
    records = [QuestionRecord("a", "it", "red", "", ("red",) * 7 + ("blue",) * 3)] * 200
    batch = AnswerTexts(text, 0)(records, Batch(0, np.arange(200)))
    said = [text.decode(row[row != -100][None])[0] for row in batch["labels"]]
    assert 120 <= Counter(said)["red"] <= 160
    assert set(said) == {"red", "blue"}
