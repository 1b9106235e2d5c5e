"""Image-text retrieval on a benchmark: ITC alone, and re-ranked by ITM (paper, section 4.4).

Shapes: I images, J texts, Q queries, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2fast._choices import RECALL_KS
from blip2fast.data.benchmarks import Sample
from blip2fast.data.texts import tokenize_captions
from blip2fast.evaluation.retrieval import (
    RERANK_K,
    ImageReader,
    TokenizedTexts,
    evaluating,
    find_candidates,
    match_logits,
    reranked_scores,
    retrieval_ranks,
    retrieval_recall,
)
from blip2fast.scoring.models import Matching, load_matching
from blip2fast.scoring.pictures import ReadBatch, read_ahead
from blip2fast.scoring.predictions import Rows
from blip2fast.scoring.processes import started_processes
from blip2fast.scoring.setup import Evaluation, Setup, opened
from blip2fast.stage1.losses import max_query_similarity

# as LAVIS tokenizes captions for retrieval
MAX_TEXT_LENGTH = 35
_TOP = max(RECALL_KS)
# images whose candidates are matched before they are written
_IMAGES_AT_ONCE = 8


def evaluate_retrieval(
    setup: Setup,
    rerank_k: int = RERANK_K,
    captions_per_image: int | None = None,
    max_txt_len: int = MAX_TEXT_LENGTH,
) -> dict[str, Any] | None:
    """Recall at 1, 5 and 10 in both directions, by ITC alone and re-ranked by ITM.

    Called by every process that torchrun starts, or by one alone.

    Args:
        setup: model, data, folder.
        rerank_k: candidates of each image and of each text that ITM re-ranks; 0: ITC alone.
        captions_per_image: at most so many, the first; None: all that there are.
        max_txt_len: longer texts are truncated, in tokens.

    Returns:
        The result, as in `result.json`; None in processes other than the first.

    Raises:
        ValueError: bad input, in one line.
    """
    if rerank_k < 0 or max_txt_len < 2 or (captions_per_image or 1) < 1:
        raise ValueError(
            f"rerank_k={rerank_k}, captions_per_image={captions_per_image}, max_txt_len="
            f"{max_txt_len}: expected at least 0, 1 and 2"
        )
    processes = started_processes()
    with opened(setup, processes, "caption", captions_per_image) as evaluation:
        loaded = evaluation.load(load_matching)
        longest = min(max_txt_len, loaded.model.config.max_position_embeddings)
        evaluation.begin(
            "retrieval",
            loaded.sha256,
            {"rerank_k": rerank_k, "max_txt_len": longest},
        )
        contest = _contest(evaluation, loaded, longest)
        match = None
        if rerank_k:
            match = _matched(evaluation, loaded, contest, rerank_k)
        return _result(evaluation, contest, rerank_k, match) if processes.rank == 0 else None


@dataclass(frozen=True)
class _Contest:
    """The images that could be read, with all texts about them.

    Attributes:
        samples: [I]
        faults: why images could not be read, by key.
        captions: [J]
        texts: the captions' tokens, and the image number of each.
        similarity: [I, J] of ITC, on the CPU.
    """

    samples: list[Sample]
    faults: dict[str, str]
    captions: list[str]
    texts: TokenizedTexts
    similarity: Tensor


def _contest(evaluation: Evaluation, loaded: Matching, longest: int) -> _Contest:
    samples, size = evaluation.samples, evaluation.setup.batch_size
    features, faults = _image_features(evaluation, loaded)
    readable = [sample for sample in samples if sample.image not in faults]
    if not readable:
        first = faults[samples[0].image]
        raise ValueError(f"none of {len(samples)} images could be read; the first: {first}")
    captions = [caption for sample in readable for caption in sample.references]
    owner = [number for number, sample in enumerate(readable) for _ in sample.references]
    tokens = tokenize_captions(loaded.tokenizer, captions, longest)
    texts = TokenizedTexts(**tokens, image=torch.tensor(owner))

    def encode(rows: Sequence[int]) -> Tensor:
        device = evaluation.device
        ids, mask = texts.input_ids[rows].to(device), texts.attention_mask[rows].to(device)
        return loaded.model.encode_text(ids, mask).float().cpu()

    with evaluating(loaded.model):
        parts = _shared(evaluation, _chunks(len(captions), size), lambda mine: map(encode, mine))
    text_features = torch.cat(parts).to(evaluation.device)
    similarity = torch.cat(
        [
            max_query_similarity(part.to(evaluation.device), text_features).cpu()
            for part in features.split(size)
        ]
    )
    return _Contest(readable, faults, captions, texts, similarity)


def _image_features(evaluation: Evaluation, loaded: Matching) -> tuple[Tensor, dict[str, str]]:
    """ITC features [I, Q, D] of the images that can be read, and faults of the others by key."""
    samples = evaluation.samples
    batches = _chunks(len(samples), evaluation.setup.batch_size)

    def encode(mine: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor | None, dict[str, str]]]:
        keys = [[samples[number].image for number in batch] for batch in mine]
        reading = read_ahead(evaluation.images, keys, evaluation.setup.workers)
        for batch, read in zip(keys, reading, strict=True):
            good = [key for key in batch if key not in read.faults]
            if not good:
                yield None, read.faults
                continue
            found = loaded.model.encode_image(loaded.tokens(read, good))[0]
            yield found.float().cpu(), read.faults

    with evaluating(loaded.model):
        found = _shared(evaluation, batches, encode)
    parts = [features for features, _ in found if features is not None]
    faults = {key: fault for _, some in found for key, fault in some.items()}
    return torch.cat(parts) if parts else torch.empty(0), faults


def _shared(
    evaluation: Evaluation,
    batches: Sequence[Any],
    compute: Callable[[Sequence[Any]], Iterator[Any]],
) -> list[Any]:
    """Compute batches in all processes, each its share; returns all, in order, to each."""
    processes = evaluation.processes
    mine = list(compute(batches[processes.rank :: processes.count]))
    gathered = processes.gather(mine)
    return [gathered[number % processes.count][number // processes.count]
            for number in range(len(batches))]  # fmt: skip


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _matched(evaluation: Evaluation, loaded: Matching, contest: _Contest, rerank_k: int) -> Tensor:
    """The "match" logits [P] of all candidates' pairs, in the first process."""
    images, texts = find_candidates(contest.similarity, rerank_k).pairs()
    numbers = torch.arange(len(images))
    ends = torch.searchsorted(images, torch.arange(len(contest.samples) + 1))
    units = [
        numbers[ends[batch[0]] : ends[batch[-1] + 1]]
        for batch in _chunks(len(contest.samples), _IMAGES_AT_ONCE)
    ]

    def compute(some: Sequence[Tensor]) -> Iterator[Rows]:
        keys = [
            [contest.samples[number].image for number in images[pairs].unique().tolist()]
            for pairs in some
        ]
        reading = read_ahead(evaluation.images, keys, evaluation.setup.workers)
        for pairs, read in zip(some, reading, strict=True):
            for fault in read.faults.values():
                raise ValueError(f"an image was read before, and is not now: {fault}")
            logits = match_logits(
                loaded.model,
                _reader(loaded, contest, read),
                contest.texts,
                (images[pairs], texts[pairs]),
                evaluation.setup.batch_size,
            )[:, 1]
            yield [{"texts": texts[pairs].tolist(), "match": logits.tolist()}]

    found = evaluation.predict(units, compute, f"x {_IMAGES_AT_ONCE} images")
    for pairs, rows in zip(units, found, strict=False):
        if rows[0]["texts"] != texts[pairs].tolist():
            raise ValueError(
                f"--out {evaluation.setup.out}: the candidates of an earlier start were others "
                "(another machine or library?); give --overwrite"
            )
    return torch.tensor([logit for rows in found for logit in rows[0]["match"]])


def _reader(loaded: Matching, contest: _Contest, read: ReadBatch) -> ImageReader:
    """The tokens of images by their numbers."""

    def tokens(numbers: Tensor) -> Tensor:
        keys = [contest.samples[number].image for number in numbers.tolist()]
        return loaded.tokens(read, keys)

    return tokens


def _result(
    evaluation: Evaluation, contest: _Contest, rerank_k: int, match: Tensor | None
) -> dict[str, Any]:
    similarity, owner = contest.similarity, contest.texts.image
    scores = {"itc": (similarity, similarity)}
    if match is not None:
        candidates = find_candidates(similarity, rerank_k)
        scores["itm"] = reranked_scores(similarity, candidates, match)
    metrics: dict[str, float] = {}
    of_images: list[dict[str, Any]] = [
        {"id": sample.id, "image": sample.image} for sample in contest.samples
    ]
    of_texts: list[dict[str, Any]] = [
        {"text": number, "caption": caption, "image": contest.samples[image].image}
        for number, (caption, image) in enumerate(
            zip(contest.captions, owner.tolist(), strict=True)
        )
    ]
    for name, (score_i2t, score_t2i) in scores.items():
        recall = retrieval_recall(score_i2t, score_t2i, owner)
        metrics |= {f"{name}_{key}": value for key, value in recall.items()}
        metrics[f"{name}_mean_recall"] = sum(recall.values()) / len(recall)
        ranks = retrieval_ranks(score_i2t, score_t2i, owner)
        best_texts = score_i2t.topk(min(_TOP, len(of_texts)), dim=1).indices.tolist()
        best_images = score_t2i.topk(min(_TOP, len(of_images)), dim=0).indices.T.tolist()
        for row, rank, best in zip(of_images, ranks[0].tolist(), best_texts, strict=True):
            row |= {f"{name}_rank": rank, f"{name}_texts": best}
        for row, rank, best in zip(of_texts, ranks[1].tolist(), best_images, strict=True):
            keys = [contest.samples[image].image for image in best]
            row |= {f"{name}_rank": rank, f"{name}_images": keys}
    failed = [
        {"id": sample.id, "image": sample.image, "error": contest.faults[sample.image]}
        for sample in evaluation.samples
        if sample.image in contest.faults
    ]
    found = {"metrics": metrics, "images": len(of_images), "texts": len(of_texts)}
    return evaluation.finish([*of_images, *of_texts, *failed], found)
