"""Caption metrics against pycocoevalcap's recorded values, and by hand.

tools/record_metric_cases.py wrote tests/reference/caption_metrics.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from blip2fast.evaluation.caption_metrics import score_captions, score_tokens
from blip2fast.evaluation.caption_words import caption_tokens

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "reference" / "caption_metrics.json").read_text()
)


@pytest.mark.parametrize(("caption", "expected"), RECORDED["tokens"])
def test_tokens_are_those_of_the_ptb_tokenizer(caption: str, expected: list[str]) -> None:
    assert caption_tokens(caption) == expected


def test_scores_are_those_of_pycocoevalcap() -> None:
    scores = score_captions(RECORDED["candidates"], RECORDED["references"])
    assert scores.corpus.keys() == RECORDED["corpus"].keys()
    for name, expected in RECORDED["corpus"].items():
        assert scores.corpus[name] == pytest.approx(expected, abs=1e-12), name
        assert scores.each[name] == pytest.approx(RECORDED["each"][name], abs=1e-12), name
    assert 0.1 < RECORDED["corpus"]["BLEU-4"] < 0.9, "the case must be able to tell good from bad"
    assert RECORDED["corpus"]["CIDEr-D"] > 0.1


def test_bleu_by_hand() -> None:
    # 4 of 5 words, 2 of 4 pairs, 0 of 3 triples; the nearer reference has 6 words
    candidate, references = ["a", "b", "c", "x", "d"], [["a", "b", "y", "c", "d", "z"], ["a"]]
    found = score_tokens([candidate], [references]).corpus
    penalty = math.exp(1 - 6 / 5)
    assert found["BLEU-1"] == pytest.approx(penalty * 4 / 5)
    assert found["BLEU-2"] == pytest.approx(penalty * math.sqrt(4 / 5 * 1 / 4), rel=1e-6)
    assert found["BLEU-3"] < 1e-4


def test_a_word_counts_no_oftener_than_a_reference_has_it() -> None:
    found = score_tokens([["the"] * 4], [[["the", "cat", "the"]]])
    assert found.corpus["BLEU-1"] == pytest.approx(2 / 4)


def test_rouge_by_hand() -> None:
    # the common subsequence "a b d" has 3 of 4 words of the caption, and 3 of 5 of the reference
    found = score_tokens([["a", "b", "c", "d"]], [[["a", "x", "b", "y", "d"]]]).corpus["ROUGE-L"]
    precision, recall, weight = 3 / 4, 3 / 5, 1.2**2
    assert found == pytest.approx((1 + weight) * precision * recall / (recall + weight * precision))


def test_cider_by_hand() -> None:
    """Two images that share no word: every n-gram has the weight log 2."""
    candidates = [["a", "b"], ["x", "y", "z"]]
    references = [[["a", "b"], ["a", "c"]], [["x", "y", "z"]]]
    # "a b" with "a b": 1-grams and 2-grams agree, there are no others. With "a c": one word of two
    first = 10 * ((1 + 1) / 4 + (1 / 2) / 4) / 2
    second = 10 * (1 + 1 + 1) / 4
    scores = score_tokens(candidates, references)
    assert scores.each["CIDEr-D"] == pytest.approx([first, second])
    assert scores.corpus["CIDEr-D"] == pytest.approx((first + second) / 2)


def test_cider_penalises_length_and_repetition() -> None:
    def cider(text: str) -> float:
        references = [[["a", "red", "dog"]], [["the", "blue", "cat"]]]
        return score_tokens([text.split(), ["x"]], references).each["CIDEr-D"][0]

    assert cider("a red dog") == pytest.approx(10 * 3 / 4)
    assert cider("a red dog dog dog dog") < cider("a red dog") * math.exp(-9 / 72)


def test_one_image_has_a_cider_of_zero() -> None:
    assert score_captions(["a dog"], [["a dog"]]).corpus["CIDEr-D"] == 0


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([], [], "0 captions and references of 0 images: give one caption an image, and at least"),
        (["a"], [["a"], ["b"]], "1 captions and references of 2 images"),
        (["a", "b"], [["a"], []], "image 1 has no reference captions; leave it out"),
    ],
)
def test_bad_input_is_named(captions: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_captions(captions, references)
