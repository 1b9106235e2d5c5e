"""Evaluation of stage 2 on held-out data: captions and visual question answering.

Nothing here depends on a particular dataset: the caller supplies the criterion for a correct
caption and the wording of the prompts. For losses see `blip2fast.evaluation.held_out_losses`.
Shapes as in `blip2fast.evaluation.retrieval`. Paper (arXiv 2301.12597): section 4.1 (zero-shot
VQA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blip2fast.evaluation.retrieval import (
    ImageReader,
    chunks,
    evaluating,
)
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text


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
    """Generate captions or answers greedily from soft visual prompts.

    Args:
        text: the language model's text preparation; its prompt is the question template.
        images: reader of the frozen encoder's tokens.
        image_rows: [P] the image number of each output text.
        questions: [P] questions for VQA, placed after the soft visual prompts; None to caption.

    Returns:
        P strings, without prompts and special tokens.

    Raises:
        ValueError: the number of questions differs from that of `image_rows`.
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
    """Continue prompts greedily with the language model alone, without images.

    With captions in the prompts this is caption-then-read VQA; without them it is the blind
    control. Duplicate prompts are generated once, and prompts of similar length are batched.

    Args:
        language_model: a transformers causal or sequence-to-sequence model.
        text: its text preparation; only the tokenizer and the end token are used.
        prompts: token ids, used unchanged; the caller adds any special tokens.

    Returns:
        One string per prompt, without the prompt and special tokens.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens; begin it with a special token at least")
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
    """Settings of `generate` for greedy decoding that stops at the end token of `text`."""
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
    """Fraction of generated texts that the caller's `match(text, reference)` accepts.

    Raises:
        ValueError: the lists differ in length, or are empty.
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

    Answers are compared after stripping whitespace, ignoring case.

    Raises:
        ValueError: the lists differ in length, or are empty.
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
