"""Caption metrics: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L, in Python.

    scores = score_captions(["a man rides a horse"], [["a man on a horse", "someone rides"]])

The values are those of pycocoevalcap's scorers on the same tokens, whose constants and conventions
are kept: they are what papers report. Scores are fractions as there (CIDEr-D up to 10). Sources:
BLEU (Papineni et al., ACL 2002), ROUGE-L (Lin, 2004), CIDEr-D (arXiv 1411.5726, section 6).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blip2fast.evaluation.caption_words import caption_tokens

Tokens = Sequence[str]
NGram = tuple[str, ...]

MAX_N = 4
METRICS = ("CIDEr-D", "ROUGE-L", *(f"BLEU-{n}" for n in range(1, MAX_N + 1)))
# of the cosine between a caption and a reference, in words of difference in length
_CIDER_SIGMA = 6.0
_CIDER_SCALE = 10.0
_ROUGE_BETA = 1.2
# keep a precision of 0 / 0 at about 0
_BLEU_OVER, _BLEU_UNDER = 1e-15, 1e-9
# part of COCO's evaluation, but Java programs
NOT_COMPUTED = {"METEOR": "a Java program", "SPICE": "a Java program"}


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions.

    Attributes:
        corpus: by metric, the score of all captions. For CIDEr-D and ROUGE-L it is the mean of
            `each`; for BLEU it is computed of the summed counts.
        each: by metric, the score of each caption.
    """

    corpus: dict[str, float]
    each: dict[str, list[float]]


def score_name(metric: str) -> str:
    """A metric's name in a run's log: `cider_d`, `bleu_4`."""
    return metric.lower().replace("-", "_")


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Tokenize captions and references, then `score_tokens`.

    Args:
        captions: one for each image.
        references: the true captions of each image.

    Raises:
        ValueError: as `score_tokens`.
    """
    return score_tokens(
        [caption_tokens(caption) for caption in captions],
        [[caption_tokens(text) for text in texts] for texts in references],
    )


def score_tokens(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> CaptionScores:
    """Score tokenized captions.

    Args:
        candidates: the caption of each image.
        references: the true captions of each image. CIDEr-D weights an n-gram by the number of
            these images whose references have it, so its value depends on the set of images, and
            is 0 for one image.

    Raises:
        ValueError: no captions, another number of references, or an image without references.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions and references of {len(references)} images: give one "
            "caption an image, and at least one image"
        )
    lacking = [number for number, texts in enumerate(references) if not texts]
    if lacking:
        raise ValueError(f"image {lacking[0]} has no reference captions; leave it out")
    bleu, each_bleu = _bleu(candidates, references)
    cider, rouge = _cider_d(candidates, references), _rouge_l_of_all(candidates, references)
    names = METRICS[2:]
    means = {"CIDEr-D": math.fsum(cider) / len(cider), "ROUGE-L": math.fsum(rouge) / len(rouge)}
    return CaptionScores(
        means | dict(zip(names, bleu, strict=True)),
        {"CIDEr-D": cider, "ROUGE-L": rouge} | dict(zip(names, each_bleu, strict=True)),
    )


def _ngrams(tokens: Tokens, n: int) -> Counter[NGram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


@dataclass
class _Matches:
    """What BLEU sums over captions.

    Attributes:
        right, total: for each n, the n-grams that a reference has too, and all n-grams.
        length, reference: in words, of the caption and of the reference of the nearest length.
    """

    right: list[int]
    total: list[int]
    length: int
    reference: int

    def bleu(self) -> list[float]:
        """BLEU-1 to BLEU-4: geometric mean of the precisions, times the brevity penalty."""
        ratio = (self.length + _BLEU_OVER) / (self.reference + _BLEU_UNDER)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, scores = 1.0, []
        for n, (right, total) in enumerate(zip(self.right, self.total, strict=True), 1):
            product *= (right + _BLEU_OVER) / (total + _BLEU_UNDER)
            scores.append(product ** (1 / n) * penalty)
        return scores


def _matches(candidate: Tokens, references: Sequence[Tokens]) -> _Matches:
    right, total = [], []
    for n in range(1, MAX_N + 1):
        most: Counter[NGram] = Counter()
        for reference in references:
            most |= _ngrams(reference, n)
        found = _ngrams(candidate, n)
        right.append((found & most).total())
        total.append(found.total())
    length = len(candidate)
    nearest = min((abs(len(text) - length), len(text)) for text in references)[1]
    return _Matches(right, total, length, nearest)


def _bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-4 of all captions, and for each n those of each caption."""
    found = [_matches(*pair) for pair in zip(candidates, references, strict=True)]
    whole = _Matches(
        [sum(one.right[n] for one in found) for n in range(MAX_N)],
        [sum(one.total[n] for one in found) for n in range(MAX_N)],
        sum(one.length for one in found),
        sum(one.reference for one in found),
    )
    each = [one.bleu() for one in found]
    return whole.bleu(), [[scores[n] for scores in each] for n in range(MAX_N)]


def _rouge_l_of_all(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> list[float]:
    return [_rouge_l(*pair) for pair in zip(candidates, references, strict=True)]


def _rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F-score of the longest common subsequence: best precision and best recall of any reference.

    A text without words counts as one empty word, as in pycocoevalcap.
    """
    caption = list(candidate) or [""]
    precision = recall = 0.0
    for reference in references:
        words = list(reference) or [""]
        common = _common_subsequence(caption, words)
        precision = max(precision, common / len(caption))
        recall = max(recall, common / len(words))
    if not precision:
        return 0.0
    weight = _ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


@dataclass(frozen=True)
class _Weighted:
    """TF-IDF weights of a text's n-grams for each n, their norms, and the text's length."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    length: int


def _cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    counted = [[_all_ngrams(text) for text in texts] for texts in references]
    images_with = Counter(
        ngram
        for texts in counted
        for ngram in {ngram for text in texts for grams in text for ngram in grams}
    )
    log_images = math.log(len(candidates))

    def weighted(counts: list[Counter[NGram]]) -> _Weighted:
        weights = [
            {
                ngram: count * (log_images - math.log(images_with[ngram] or 1))
                for ngram, count in grams.items()
            }
            for grams in counts
        ]
        norms = [math.sqrt(sum(w * w for w in each.values())) for each in weights]
        # pycocoevalcap takes the number of word pairs for the length
        return _Weighted(weights, norms, counts[1].total())

    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        caption = weighted(_all_ngrams(candidate))
        alike = [_similarity(caption, weighted(text)) for text in texts]
        scores.append(_CIDER_SCALE * sum(alike) / len(alike))
    return scores


def _all_ngrams(tokens: Tokens) -> list[Counter[NGram]]:
    return [_ngrams(tokens, n) for n in range(1, MAX_N + 1)]


def _similarity(caption: _Weighted, reference: _Weighted) -> float:
    """Mean over n of the clipped cosine, times a Gaussian of the difference in length."""
    total = 0.0
    for n in range(MAX_N):
        theirs = reference.weights[n]
        dot = sum(
            min(weight, theirs[ngram]) * theirs[ngram]
            for ngram, weight in caption.weights[n].items()
            if ngram in theirs
        )
        norms = caption.norms[n] * reference.norms[n]
        total += dot / norms if norms else dot
    apart = caption.length - reference.length
    return total / MAX_N * math.exp(-(apart**2) / (2 * _CIDER_SIGMA**2))
