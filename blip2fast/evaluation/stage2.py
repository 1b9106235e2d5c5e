"""Evaluation of both stages on held-out data, for any source of images.

    evaluate_stage1(model, lambda rows: cache.read(rows), num_images, texts)
    evaluate_stage2(model, batches)

Losses, retrieval and matching for stage 1; losses, captions and visual question answering for
stage 2. Nothing here knows about a data set: what counts as the same caption, and the wording of
a prompt, are the caller's. Shapes as in `blip2fast.evaluation.retrieval`.
Paper (arXiv 2301.12597): sections 3.1, 3.2, 4.1 (zero-shot VQA), 4.4 (retrieval).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blip2fast.evaluation.retrieval import (
    ImageReader,
    Texts,
    chunks,
    encode_all,
    evaluating,
    query_similarity,
    rerank,
    retrieval_recall,
    swapped_match_accuracy,
)
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random state from `seed` inside; the state outside is as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def held_out_losses(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int = 0
) -> dict[str, float]:
    """Mean of every scalar `loss*` and `accuracy*` that the model returns, weighted by rows.

    Stage 1 samples its negatives; they are drawn from `seed` here, and the caller's random state
    is left as it was, so evaluation neither varies nor disturbs training.

    Args:
        batches: keyword arguments of the model's forward.

    Raises:
        ValueError: when there is no batch.
    """
    totals: dict[str, float] = {}
    count = 0
    with evaluating(model) as device, seeded(seed, device):
        for batch in batches:
            output = model(**{name: value.to(device) for name, value in batch.items()})
            rows = len(next(iter(batch.values())))
            count += rows
            for name, value in vars(output).items():
                if name.startswith(("loss", "accuracy")) and isinstance(value, Tensor):
                    totals[name] = totals.get(name, 0.0) + rows * value.item()
    if count == 0:
        raise ValueError("held-out losses need at least one batch, got none")
    return {name: total / count for name, total in totals.items()}


def caption_batch(images: ImageReader, texts: Texts, numbers: Tensor) -> dict[str, Tensor]:
    """The arguments of a stage-1 forward pass for the texts of these numbers and their images."""
    return {
        "image_embeds": images(texts.image[numbers]),
        "input_ids": texts.input_ids[numbers],
        "attention_mask": texts.attention_mask[numbers],
    }


def caption_batches(
    images: ImageReader, texts: Texts, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of one text per image, for `held_out_losses` of stage 1.

    Only the first text of each image is taken, so that no image stands twice in a batch as its
    own false negative; a last batch of one, which has no negatives, is left out.
    """
    first = {i: j for j, i in reversed(list(enumerate(texts.image.tolist())))}
    for numbers in torch.tensor(sorted(first.values())).split(batch_size):
        if len(numbers) > 1:
            yield caption_batch(images, texts, numbers)


def evaluate_stage1(
    model: Blip2Stage1,
    images: ImageReader,
    num_images: int,
    texts: Texts,
    *,
    swapped: Texts | None = None,
    rerank_k: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Losses, retrieval both ways and, where asked, re-ranked retrieval and ITM accuracy.

    Args:
        model: a `Blip2Stage1`.
        images: reader of the frozen encoder's tokens.
        num_images: I; images are numbered 0..I-1.
        texts: the captions, several per image allowed.
        swapped: wrong counterparts of `texts`, one each; None leaves ITM accuracy out.
        rerank_k: candidates that ITM re-ranks (128 in the paper); 0 leaves re-ranking out.
        batch_size: images, texts or pairs at a time.

    Returns:
        `loss, loss_itc, loss_itm, loss_itg, accuracy_*`, `{i2t,t2i}_r{1,5,10}`,
        `rerank_{i2t,t2i}_r{1,5,10}`, `itm_accuracy` and its parts.
    """
    results = held_out_losses(model, caption_batches(images, texts, batch_size))
    similarity = query_similarity(*encode_all(model, images, num_images, texts, batch_size))
    results |= retrieval_recall(similarity, similarity, texts.image)
    if rerank_k:
        scores = rerank(model, images, texts, similarity, rerank_k, batch_size)
        reranked = retrieval_recall(*scores, texts.image)
        results |= {f"rerank_{name}": value for name, value in reranked.items()}
    if swapped is not None:
        results |= swapped_match_accuracy(model, images, texts, swapped, batch_size)
    return results


def evaluate_stage2(
    model: Blip2Stage2, batches: Iterable[Mapping[str, Tensor]], seed: int = 0
) -> dict[str, float]:
    """Language-modelling loss on held-out text; captions and answers are scored separately.

    Args:
        model: a `Blip2Stage2`.
        batches: keyword arguments of its forward, as training makes them.

    Returns:
        `loss`, the mean over batches weighted by rows.
    """
    return held_out_losses(model, batches, seed)


def generate_texts(
    model: Blip2Stage2,
    text: Stage2Text,
    images: ImageReader,
    image_rows: Tensor,
    questions: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 30,
    batch_size: int = 128,
) -> list[str]:
    """Greedy continuations of soft visual prompts: captions, or answers to questions.

    Args:
        text: the language model's text preparation; its prompt frames the questions.
        images: reader of the frozen encoder's tokens.
        image_rows: [P] the image number of each continuation.
        questions: [P] what follows the soft visual prompts, for VQA; None to caption.

    Returns:
        P strings, without prompts and special tokens.

    Raises:
        ValueError: when there is not one question for each image.
    """
    if questions is not None and len(questions) != len(image_rows):
        raise ValueError(f"{len(questions)} questions for {len(image_rows)} images; give one each")
    texts: list[str] = []
    with evaluating(model) as device:
        for rows in chunks(len(image_rows), batch_size):
            asked = None if questions is None else [questions[p] for p in rows.tolist()]
            prompt = text.prompt_batch(asked, batch_size=len(rows))
            tokens = model.generate(
                image_embeds=images(image_rows[rows]).to(device),
                **{name: value.to(device) for name, value in prompt.items()},
                **_greedily(text, max_new_tokens),
            )
            texts += text.decode(tokens)
    return texts


def continue_texts(
    language_model: PreTrainedModel,
    text: Stage2Text,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 10,
    batch_size: int = 128,
) -> list[str]:
    """Greedy continuations by the language model alone: it reads, it sees nothing.

    With captions in the prompts this is caption-then-read VQA; without, the blind control. Equal
    prompts are continued once, and prompts of like length together.

    Args:
        language_model: a transformers causal or sequence-to-sequence model.
        text: its text preparation; only the tokenizer and the end token are used.
        prompts: token ids, as they are: special tokens are the caller's.

    Returns:
        One string per prompt, without the prompt and special tokens.

    Raises:
        ValueError: when a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens; begin it with a special token at least")
    unique = sorted({tuple(prompt) for prompt in prompts}, key=lambda prompt: (len(prompt), prompt))
    texts: list[str] = []
    with evaluating(language_model) as device:
        for rows in chunks(len(unique), batch_size):
            ids = [torch.tensor(unique[p]) for p in rows.tolist()]
            side = "right" if text.is_encoder_decoder else "left"
            inputs = {
                "input_ids": pad_sequence(ids, True, text.pad_token_id, side),
                "attention_mask": pad_sequence([torch.ones_like(p) for p in ids], True, 0, side),
            }
            tokens = language_model.generate(
                **{name: value.to(device) for name, value in inputs.items()},
                **_greedily(text, max_new_tokens),
            )
            start = 1 if text.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts += text.decode(tokens[:, start:])
    continuation = dict(zip(unique, texts, strict=True))
    return [continuation[tuple(prompt)] for prompt in prompts]


def _greedily(text: Stage2Text, max_new_tokens: int) -> dict[str, Any]:
    """Settings of `generate`: the likeliest token each time, up to the text's own end."""
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": text.end_token_id,
        "pad_token_id": text.pad_token_id,
        "do_sample": False,
        "num_beams": 1,
    }


def exact_match(
    generated: Sequence[str],
    references: Sequence[Any],
    match: Callable[[str, Any], bool],
) -> float:
    """Share of generated texts that the caller's `match(text, reference)` accepts.

    Raises:
        ValueError: when the lists differ in length, or are empty.
    """
    if len(generated) != len(references) or not generated:
        raise ValueError(
            f"exact match needs one reference per text: {len(generated)} texts, "
            f"{len(references)} references"
        )
    hits = sum(
        match(text, reference) for text, reference in zip(generated, references, strict=True)
    )
    return hits / len(generated)


def accuracy_by_type(
    predictions: Sequence[str], answers: Sequence[str], types: Sequence[str]
) -> dict[str, float]:
    """VQA accuracy over all questions (`all`) and for each question type.

    Answers are compared without regard to case and surrounding space.

    Raises:
        ValueError: when the lists differ in length, or are empty.
    """
    if not len(predictions) == len(answers) == len(types) or not predictions:
        raise ValueError(
            f"need one answer and one type per prediction: {len(predictions)} predictions, "
            f"{len(answers)} answers, {len(types)} types"
        )
    right: dict[str, list[bool]] = {"all": []}
    for prediction, answer, kind in zip(predictions, answers, types, strict=True):
        hit = prediction.strip().lower() == answer.strip().lower()
        right["all"].append(hit)
        right.setdefault(kind, []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}
