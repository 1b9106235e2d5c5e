"""The texts of a batch: samples one caption per image and tokenizes it for the model.

Legend: B samples per process and step, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blip2fast.data.batches import Batch
from blip2fast.data.records import (
    CaptionRecord,
    QuestionRecord,
    SequenceRecord,
    plain_text,
    text_hash,
)
from blip2fast.stage2.text import Stage2Text


@lru_cache(maxsize=2)
def _stream(seed: int, epoch: int) -> Any:
    # The third number separates this random stream from that of the permutation.
    return np.random.PCG64([seed, epoch, 1]).state


def _draws(seed: int, batch: Batch) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) of the samples: those at their places in the epoch's stream.

    They are those of `default_rng([seed, epoch, 1]).random(n)[batch.samples]`, without its array.
    """
    bits = np.random.PCG64()
    generator = np.random.Generator(bits)
    found = np.empty(len(batch.samples))
    for number, sample in enumerate(batch.samples.tolist()):
        bits.state = _stream(seed, batch.epoch)
        bits.advance(sample)
        found[number] = generator.random()
    return found


def drawn_texts(texts: Sequence[Sequence[str]], batch: Batch, seed: int) -> list[str]:
    """One of each sample's texts, a function of (seed, epoch, sample) alone."""
    draws = _draws(seed, batch)
    return [several[int(draw * len(several))] for several, draw in zip(texts, draws, strict=True)]


def drawn_captions(
    records: Sequence[CaptionRecord | SequenceRecord], batch: Batch, seed: int
) -> list[str]:
    """One random caption per sample of `batch`, a function of (seed, epoch, sample) alone."""
    return drawn_texts([records[i].captions for i in batch.indices], batch, seed)


@dataclass
class Stage1Texts:
    """Stage-1 texts: token ids `[CLS] w1 .. wn [SEP]` of one sampled caption, and image ids.

    Records of the same image share an `image_ids` value, so ITC treats their captions as positives
    of each other and ITM never samples them as negatives. The values are hashes of 63 bits: two of
    a batch of 8192 different images are equal with a probability of 4e-12.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        max_txt_len: texts are truncated to this many tokens.
        seed: seed of the caption sampling.
        positives: `text`: samples share a value if their captions are equal up to case and white
            space, instead of their images. Each image should then have one record.
    """

    tokenizer: Any
    max_txt_len: int
    seed: int
    positives: Literal["image", "text"] = "image"

    def __call__(self, records: Sequence[CaptionRecord], batch: Batch) -> dict[str, Tensor]:
        captions = drawn_captions(records, batch, self.seed)
        if self.positives == "text":
            shared = [plain_text(caption).lower() for caption in captions]
        else:
            shared = [records[i].image for i in batch.indices]
        tokens = tokenize_captions(self.tokenizer, captions, self.max_txt_len)
        return {**tokens, "image_ids": torch.tensor([text_hash(each) for each in shared])}


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
        return self.text.train_batch(captions, indices=batch.samples.tolist(), epoch=batch.epoch)


@dataclass
class AnswerTexts:
    """Stage-2 VQA: the question in the prompt, the answer, or one of `answers`, as the target."""

    text: Stage2Text
    seed: int = 0

    def __call__(self, records: Sequence[QuestionRecord], batch: Batch) -> dict[str, Tensor]:
        chosen = [records[i] for i in batch.indices]
        answers = drawn_texts([r.answers or (r.answer,) for r in chosen], batch, self.seed)
        return self.text.train_batch(answers, [r.question for r in chosen])


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
            indices=batch.samples.tolist(),
            epoch=batch.epoch,
            image_counts=[len(r.images) for r in chosen],
        )
