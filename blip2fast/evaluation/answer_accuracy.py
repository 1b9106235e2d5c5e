"""Accuracy of answers: VQAv2's leave-one-out rule with its normalisation, and exact match.

Ten people answered each question of VQAv2. An answer is right to min(1, n / 3) where n of nine
people gave it, averaged over which of the ten is left out (arXiv 1505.00468, section 4, and the
published evaluation script, version of 2021). `normalise` is that script's normalisation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The script puts the apostrophes back into these words, where one or all are missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one(word: str) -> list[str]:
    """The word without one of its apostrophes, each in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for word in _CONTRACTIONS.split():
        spelt = _without_one(word)
        # of two apostrophes one is missing; "hadntve", without both, is not in the script's list
        table |= dict.fromkeys(spelt, word)
    return table | {"somebody'd": "somebodyd"}  # as the script has it


_SPELT = _table()


def normalise(answer: str) -> str:
    """An answer without articles and punctuation, in lower case, with digits for number words.

    >>> normalise("The two dogs, arent they?")
    "2 dogs aren't they"
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split())
    return " ".join(_SPELT.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(answer: str) -> str:
    """A mark beside a space, or in a text with a number such as 1,000, vanishes; others part words.

    Periods vanish, except before a digit.
    """
    in_number = _COMMA_IN_NUMBER.search(answer) is not None
    found = answer
    for mark in _PUNCTUATION:
        alone = f"{mark} " in answer or f" {mark}" in answer
        found = found.replace(mark, "" if alone or in_number else " ")
    return _PERIOD.sub("", found)


def vqa_accuracy(
    prediction: str, answers: Sequence[str], normalise_unanimous: bool = False
) -> float:
    """Accuracy of one answer by the leave-one-out rule, from 0 to 1.

    Args:
        prediction: what the model wrote.
        answers: those of several people; VQAv2 has ten.
        normalise_unanimous: normalise also where all people gave the same answer. The published
            script compares texts as they are then.

    Raises:
        ValueError: fewer than two answers, which leave nothing to compare with.
    """
    if len(answers) < 2:
        raise ValueError(
            f"{len(answers)} answer(s) to a question: the rule leaves one out, so give two or more "
            "(VQAv2 has ten), or use exact_answer"
        )
    plain = [_one_line(answer) for answer in answers]
    if normalise_unanimous or len(set(plain)) > 1:
        plain, found = [normalise(answer) for answer in plain], normalise(prediction)
    else:
        found = _one_line(prediction)
    same = plain.count(found)
    # of the people, `same` gave this answer: for these one fewer is left
    with_it, without = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return (same * with_it + (len(plain) - same) * without) / len(plain)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def exact_answer(prediction: str, answer: str) -> bool:
    """Whether an answer is the true one after normalisation of both, as for GQA."""
    return normalise(prediction) == normalise(answer)


def have_several(answers: Sequence[Sequence[str]]) -> bool:
    """Whether every question has the answers of several people, so that one can be left out."""
    return all(len(each) > 1 for each in answers)


def answer_accuracy(prediction: str, answers: Sequence[str], several: bool) -> float:
    """Accuracy of one answer: `vqa_accuracy`, or whether it is exactly any of the true answers.

    Args:
        several: the former; decided once for a benchmark, by `have_several`.
    """
    if several:
        return vqa_accuracy(prediction, answers)
    return float(any(exact_answer(prediction, answer) for answer in answers))


def mean_by(
    values: Sequence[float], kinds: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """Means of values for each kind of sample, such as VQAv2's question and answer types.

    Args:
        values: one for each sample.
        kinds: of each sample, by the name of the grouping; a sample may lack one.

    Returns:
        By grouping and kind, sorted by name: `{"answer_type": {"number": 0.4, ...}, ...}`.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(values) != len(kinds):
        raise ValueError(f"{len(values)} values of {len(kinds)} samples: give one each")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for value, of_sample in zip(values, kinds, strict=True):
        for grouping, kind in of_sample.items():
            found[grouping][kind].append(value)
    return {
        grouping: {kind: sum(each) / len(each) for kind, each in sorted(by_kind.items())}
        for grouping, by_kind in sorted(found.items())
    }
