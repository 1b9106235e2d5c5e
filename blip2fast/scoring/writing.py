"""Captions and answers of a benchmark, and their scores (paper, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blip2fast.data.benchmarks import Sample
from blip2fast.evaluation.answer_accuracy import (
    answer_accuracy,
    have_several,
    mean_by,
    vqa_accuracy,
)
from blip2fast.evaluation.caption_metrics import NOT_COMPUTED, CaptionScores, score_captions
from blip2fast.inference.inputs import GenerationOptions, generate_settings
from blip2fast.inference.model import ANSWER, CAPTION
from blip2fast.scoring.models import DTYPES, Writing, load_writing
from blip2fast.scoring.pictures import CachedTokens, ReadBatch, read_ahead
from blip2fast.scoring.predictions import Rows
from blip2fast.scoring.processes import started_processes
from blip2fast.scoring.setup import Evaluation, Setup, opened

# texts about samples whose images are all there
Write = Callable[[Sequence[Sample], ReadBatch], list[str]]


def evaluate_captions(
    setup: Setup, prompt: str | None = None, options: GenerationOptions | None = None
) -> dict[str, Any] | None:
    """Caption the images of a benchmark: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L.

    Called by every process that torchrun starts, or by one alone.

    Args:
        setup: model, data, folder.
        prompt: prefix of the captions; None: the model's own.
        options: of the generation; by default those of `Blip2.caption`.

    Returns:
        The result, as in `result.json`; None in processes other than the first.

    Raises:
        ValueError: bad input, in one line.
    """
    processes = started_processes()
    with opened(setup, processes, "caption") as evaluation:
        loaded = evaluation.load(load_writing)
        used: GenerationOptions = {**CAPTION, **(options or {})}
        prefix = loaded.model.prompts.caption if prompt is None else prompt
        processes.agree(lambda: _check(used, prefix, with_question=False))
        evaluation.begin("caption", loaded.sha256, {"prompt": prefix, **used})

        def write(samples: Sequence[Sample], read: ReadBatch) -> list[str]:
            keys = [sample.image for sample in samples]
            images = _images(evaluation, read, keys)
            return _flat(loaded.model.caption(**images, prompt=prefix, **_at_once(used, samples)))

        rows = _written(evaluation, write, "caption")
        return _caption_result(evaluation, rows) if processes.rank == 0 else None


def evaluate_answers(
    setup: Setup, prompt: str | None = None, options: GenerationOptions | None = None
) -> dict[str, Any] | None:
    """Answer the questions of a benchmark: VQA accuracy, or exact match.

    The leave-one-out rule over several answers is taken where every question has several; else an
    answer is right if it is any of the true ones.

    Args:
        setup: as in `evaluate_captions`.
        prompt: template with `{}` for the question; None: the model's own.
        options: of the generation; by default those of `Blip2.answer`.

    Returns:
        As `evaluate_captions`.

    Raises:
        ValueError: as `evaluate_captions`.
    """
    processes = started_processes()
    with opened(setup, processes, "vqa") as evaluation:
        loaded = evaluation.load(load_writing)
        used: GenerationOptions = {**ANSWER, **(options or {})}
        template = loaded.model.prompts.question if prompt is None else prompt
        processes.agree(lambda: _check(used, template, with_question=True))
        evaluation.begin("vqa", loaded.sha256, {"prompt": template, **used})

        def write(samples: Sequence[Sample], read: ReadBatch) -> list[str]:
            return _answers(evaluation, loaded, template, used, samples, read)

        rows = _written(evaluation, write, "answer")
        return _answer_result(evaluation, rows) if processes.rank == 0 else None


def _answers(
    evaluation: Evaluation,
    loaded: Writing,
    template: str,
    used: GenerationOptions,
    samples: Sequence[Sample],
    read: ReadBatch,
) -> list[str]:
    """Answers in the order of the samples; an image is encoded once for all its questions."""
    numbers: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        numbers.setdefault(sample.image, []).append(number)
    questions = [[samples[number].question for number in each] for each in numbers.values()]
    images = _images(evaluation, read, list(numbers))
    found = loaded.model.answer(
        questions=questions, **images, prompt=template, **_at_once(used, samples)
    )
    order = [number for each in numbers.values() for number in each]
    answers = dict(zip(order, _flat(found), strict=True))
    return [answers[number] for number in range(len(samples))]


def _check(used: GenerationOptions, prompt: str, with_question: bool) -> None:
    """Refuse what would fail for every sample."""
    generate_settings(used, used)
    if ("{}" in prompt) != with_question:
        expected = "needs {} for the question" if with_question else "has no question for its {}"
        raise ValueError(f"--prompt {prompt!r} {expected}")


def _images(evaluation: Evaluation, read: ReadBatch, keys: Sequence[str]) -> dict[str, Any]:
    """The images as `Blip2` takes them."""
    if isinstance(evaluation.images, CachedTokens):
        return {"image_embeds": read.tokens(keys).to(DTYPES[evaluation.setup.model.dtype])}
    return {"images": read.pictures(keys)}


def _at_once(used: GenerationOptions, samples: Sequence[Sample]) -> GenerationOptions:
    """The options with a batch size that keeps a batch together."""
    return {**used, "batch_size": len(samples)}


def _flat(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else [text for each in texts for text in _flat(each)]


def _written(evaluation: Evaluation, write: Write, name: str) -> Rows:
    """The rows of all samples with what was written under `name`, or an "error"."""
    size = evaluation.setup.batch_size
    samples = evaluation.samples
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]

    def compute(some: Sequence[Sequence[Sample]]) -> Iterator[Rows]:
        keys = [[sample.image for sample in batch] for batch in some]
        reading = read_ahead(evaluation.images, keys, evaluation.setup.workers)
        for batch, read in zip(some, reading, strict=True):
            texts = _texts(write, [each for each in batch if each.image not in read.faults], read)
            yield [_row(sample, name, texts.get(sample.id), read) for sample in batch]

    return [row for rows in evaluation.predict(batches, compute, "batches") for row in rows]


def _texts(write: Write, samples: Sequence[Sample], read: ReadBatch) -> dict[str, str | ValueError]:
    """The text of each sample by its id, or why there is none."""
    if not samples:
        return {}
    try:
        return dict(zip((sample.id for sample in samples), write(samples, read), strict=True))
    except ValueError as error:
        if len(samples) == 1:
            return {samples[0].id: error}
    # one of them is at fault, such as a question that does not fit into the model
    found: dict[str, str | ValueError] = {}
    for sample in samples:
        found |= _texts(write, [sample], read)
    return found


def _row(
    sample: Sample, name: str, text: str | ValueError | None, read: ReadBatch
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id, "image": sample.image}
    if sample.question:
        row["question"] = sample.question
    if isinstance(text, str):
        return {**row, name: text}
    return {**row, "error": str(text or read.faults.get(sample.image, "not written"))}


def _good(evaluation: Evaluation, rows: Rows) -> list[tuple[Sample, dict[str, Any]]]:
    """The samples that could be evaluated, with their rows.

    Raises:
        ValueError: there is none.
    """
    known = {sample.id: sample for sample in evaluation.samples}
    good = [(known[row["id"]], row) for row in rows if "error" not in row]
    if not good:
        raise ValueError(
            f"none of {len(rows)} samples could be evaluated; the first: {rows[0]['error']}"
        )
    return good


def _caption_result(evaluation: Evaluation, rows: Rows) -> dict[str, Any]:
    good = _good(evaluation, rows)
    scores = _scored(good)
    for number, (sample, row) in enumerate(good):
        row["references"] = list(sample.references)
        row |= {name: each[number] for name, each in scores.each.items()}
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for grouping, kind in sorted({pair for sample, _ in good for pair in sample.kinds.items()}):
        some = [pair for pair in good if pair[0].kinds.get(grouping) == kind]
        kinds.setdefault(grouping, {})[kind] = _scored(some).corpus
    found = {"metrics": scores.corpus, "by": kinds, "not_computed": NOT_COMPUTED}
    return evaluation.finish(rows, found)


def _scored(good: Sequence[tuple[Sample, dict[str, Any]]]) -> CaptionScores:
    return score_captions(
        [row["caption"] for _, row in good], [sample.references for sample, _ in good]
    )


def _answer_result(evaluation: Evaluation, rows: Rows) -> dict[str, Any]:
    good = _good(evaluation, rows)
    several = have_several([sample.references for sample in evaluation.samples])
    metrics: dict[str, float] = {}
    for sample, row in good:
        row["answers"] = list(sample.references)
        row["accuracy"] = answer_accuracy(row["answer"], sample.references, several)
    metrics["accuracy"] = sum(row["accuracy"] for _, row in good) / len(good)
    if several:
        normalised = [vqa_accuracy(row["answer"], s.references, True) for s, row in good]
        metrics["accuracy_always_normalised"] = sum(normalised) / len(good)
    with_raw = [(sample, row) for sample, row in good if sample.raw_references]
    if several and with_raw:
        raw = [vqa_accuracy(row["answer"], sample.raw_references) for sample, row in with_raw]
        metrics["accuracy_of_raw_answers"] = sum(raw) / len(raw)
    found = {
        "metrics": metrics,
        "rule": "leave one out of several answers" if several else "exact match of any answer",
        "by": mean_by([row["accuracy"] for _, row in good], [sample.kinds for sample, _ in good]),
    }
    return evaluation.finish(rows, found)
