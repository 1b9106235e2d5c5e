"""VQA accuracy against the published script's recorded values, and by hand.

tools/record_metric_cases.py wrote tests/reference/vqa_accuracy.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip2fast.evaluation.answer_accuracy import exact_answer, mean_by, normalise, vqa_accuracy

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "reference" / "vqa_accuracy.json").read_text()
)


@pytest.mark.parametrize(("answer", "expected"), RECORDED["normalised"])
def test_normalised_as_by_the_published_script(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def test_accuracies_are_those_of_the_published_script() -> None:
    cases = RECORDED["cases"]
    found = [vqa_accuracy(case["prediction"], case["answers"]) for case in cases]
    assert found == pytest.approx(RECORDED["each"], abs=1e-10)
    assert sum(found) / len(found) == pytest.approx(RECORDED["accuracy"], abs=1e-10)
    kinds = [{name: case[name] for name in ("question_type", "answer_type")} for case in cases]
    for grouping, means in mean_by(found, kinds).items():
        assert {kind: 100 * mean for kind, mean in means.items()} == pytest.approx(
            RECORDED[grouping], abs=1e-8
        )
    assert {0.0, 0.3, 0.9, 1.0} <= {round(each, 3) for each in found}, "the cases must differ"


@pytest.mark.parametrize(
    ("same", "expected"),
    # n of ten gave the answer: leaving one of them out leaves n - 1, leaving another out leaves n
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_leave_one_out(same: int, expected: float) -> None:
    answers = ["red"] * same + [f"blue{n}" for n in range(10 - same)]
    assert vqa_accuracy("Red" if same < 10 else "red", answers) == pytest.approx(expected)


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert vqa_accuracy("A dog.", ["dog"] * 10) == 0
    assert vqa_accuracy("A dog.", ["dog"] * 10, normalise_unanimous=True) == 1


def test_a_single_answer_has_no_others() -> None:
    with pytest.raises(ValueError, match=r"1 answer\(s\) to a question: the rule leaves one out"):
        vqa_accuracy("red", ["red"])


def test_exact_answer_normalises_both() -> None:
    assert exact_answer("The T-shirt.", "t-shirt")
    assert not exact_answer("left", "right")


def test_mean_by_leaves_out_what_a_sample_lacks() -> None:
    means = mean_by([1.0, 0.0, 0.5], [{"domain": "near"}, {"domain": "near"}, {}])
    assert means == {"domain": {"near": 0.5}}
    with pytest.raises(ValueError, match="1 values of 2 samples"):
        mean_by([1.0], [{}, {}])
