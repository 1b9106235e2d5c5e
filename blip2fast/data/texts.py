"""The texts of a batch: samples one caption per image and tokenizes it for the model.

Legend: B samples per process and step, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blip2fast.data.batches import Batch
from blip2fast.data.records import CaptionRecord, QuestionRecord, SequenceRecord
from blip2fast.stage2.text import Stage2Text


@lru_cache(maxsize=2)
def _caption_draws(seed: int, epoch: int, count: int) -> npt.NDArray[np.float64]:
    # The third number separates this random stream from that of the permutation.
    return np.random.default_rng([seed, epoch, 1]).random(count)


def drawn_captions(
    records: Sequence[CaptionRecord | SequenceRecord], batch: Batch, seed: int
) -> list[str]:
    """One random caption per sample of `batch`, a function of (seed, epoch, sample index) alone."""
    draws = _caption_draws(seed, batch.epoch, len(records))[batch.indices]
    chosen = [records[i].captions for i in batch.indices]
    return [c[int(draw * len(c))] for c, draw in zip(chosen, draws, strict=True)]


@dataclass
class Stage1Texts:
    """Stage-1 texts: token ids `[CLS] w1 .. wn [SEP]` of one sampled caption, and image ids.

    Records of the same image share an `image_ids` value, so ITC treats their captions as positives
    of each other and ITM never samples them as negatives.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        max_txt_len: texts are truncated to this many tokens.
        image_number: image key -> image id.
        seed: seed of the caption sampling.
    """

    tokenizer: Any
    max_txt_len: int
    image_number: dict[str, int]
    seed: int

    def __call__(self, records: Sequence[CaptionRecord], batch: Batch) -> dict[str, Tensor]:
        tokens = tokenize_captions(
            self.tokenizer, drawn_captions(records, batch, self.seed), self.max_txt_len
        )
        numbers = [self.image_number[records[i].image] for i in batch.indices]
        return {**tokens, "image_ids": torch.tensor(numbers)}


def tokenize_captions(
    tokenizer: Any, captions: Sequence[str], max_txt_len: int
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], truncated to `max_txt_len` and padded."""
    tokens = tokenizer(
        list(captions),
        padding="longest",
        truncation=True,
        max_length=max_txt_len,
        return_tensors="pt",
    )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@dataclass
class CaptionTexts:
    """Stage-2 captioning: one sampled caption per sample, as the language model's target."""

    text: Stage2Text
    seed: int

    def __call__(self, records: Sequence[CaptionRecord], batch: Batch) -> dict[str, Tensor]:
        captions = drawn_captions(records, batch, self.seed)
        return self.text.train_batch(captions, indices=batch.indices.tolist(), epoch=batch.epoch)


@dataclass
class AnswerTexts:
    """Stage-2 VQA: the question in the prompt, the answer as the target."""

    text: Stage2Text

    def __call__(self, records: Sequence[QuestionRecord], batch: Batch) -> dict[str, Tensor]:
        chosen = [records[i] for i in batch.indices]
        return self.text.train_batch([r.answer for r in chosen], [r.question for r in chosen])


@dataclass
class SequenceTexts:
    """Stage-2 sequences: one sampled caption per record as the target, after its prompt."""

    text: Stage2Text
    seed: int

    def __call__(self, records: Sequence[SequenceRecord], batch: Batch) -> dict[str, Tensor]:
        chosen = [records[i] for i in batch.indices]
        return self.text.train_batch(
            drawn_captions(records, batch, self.seed),
            [r.prompt for r in chosen],
            indices=batch.indices.tolist(),
            epoch=batch.epoch,
            image_counts=[len(r.images) for r in chosen],
        )
