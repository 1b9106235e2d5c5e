"""Training samples: records on disk, which of them each step takes, and their batches.

What a step takes is a pure function of (seed, step, rank, world size), so that a resumed run needs
to know its step and nothing else, and that two processes of batch b see the samples that one
process of batch 2b sees.

Legend: B samples per process and step, S image tokens, E image token width, T text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset

from blip2fast.stage2.text import Stage2Text


@dataclass(frozen=True)
class CaptionRecord:
    """An image and its captions; CapFilt keeps several for one image (paper, section 3.4)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    image: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class QuestionRecord:
    """A question about an image; `type` groups the answers in evaluation."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    image: str
    question: str
    answer: str
    type: str = ""


@dataclass(frozen=True)
class SequenceRecord:
    """Any number of images in one sequence; `<image>` in the texts says where each one stands.

    Attributes:
        images: keys, in the order of the markers.
        captions: texts to write, of which a step takes one; markers may stand among their words.
        prompt: read before the text and not counted in the loss: an instruction, or examples
            ("<image> a cat. <image> a dog. <image>").
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    images: tuple[str, ...]
    captions: tuple[str, ...]
    prompt: str = ""


IMAGE_MARKER = "<image>"  # in the texts of a SequenceRecord
AnyRecord = CaptionRecord | QuestionRecord | SequenceRecord
Record = TypeVar("Record", CaptionRecord, QuestionRecord, SequenceRecord)


def images_of(record: AnyRecord) -> tuple[str, ...]:
    """The keys of a record's images, in the order in which they are read."""
    return record.images if isinstance(record, SequenceRecord) else (record.image,)


def read_captions(path: str | Path) -> list[CaptionRecord]:
    """Read caption records, one JSON object a line: `{"image": key, "captions": [text, ...]}`.

    Raises:
        ValueError: not there, empty, or a line that is not such an object; its number is named.
    """
    records = _read_lines(path, CaptionRecord)
    for number, record in enumerate(records, 1):
        if not record.captions or not all(caption.strip() for caption in record.captions):
            raise ValueError(
                f"{path}, record {number}: image {record.image!r} has an empty caption"
            )
    return records


def read_questions(path: str | Path) -> list[QuestionRecord]:
    """Read question records: `{"image": key, "question": ..., "answer": ..., "type": ...}`.

    Raises:
        ValueError: as `read_captions`.
    """
    records = _read_lines(path, QuestionRecord)
    for number, record in enumerate(records, 1):
        if not record.question.strip() or not record.answer.strip():
            raise ValueError(f"{path}, record {number}: an empty question or answer")
    return records


def read_sequences(path: str | Path) -> list[SequenceRecord]:
    """Read records of several images: `{"images": [key, ...], "prompt": ..., "captions": [...]}`.

    Raises:
        ValueError: as `read_captions`; or markers that are not as many as the images.
    """
    records = _read_lines(path, SequenceRecord)
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        if not record.captions:
            raise ValueError(f"{where}: no captions, so nothing to write")
        for caption in record.captions:
            if not caption.replace(IMAGE_MARKER, "").strip():
                raise ValueError(f"{where}: an empty caption {caption!r}")
            markers = (record.prompt + caption).count(IMAGE_MARKER)
            if markers != len(record.images):
                raise ValueError(
                    f"{where}: {markers} markers {IMAGE_MARKER} in the prompt and the caption "
                    f"{caption!r}, but {len(record.images)} images; one marker an image"
                )
    return records


def _read_lines(path: str | Path, kind: type[Record]) -> list[Record]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no records at {path}: not a file")
    adapter = TypeAdapter(kind)
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                records.append(adapter.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ValueError(
                    f"{path}, line {number}: {where or 'the line'}: {first['msg']}"
                ) from None
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def image_keys(path: str | Path) -> list[str]:
    """The images that records of any kind name, sorted, each once.

    Raises:
        ValueError: as `read_captions`.
    """
    path = Path(path)
    read_any: tuple[Callable[[Path], Sequence[AnyRecord]], ...]
    read_any = (read_captions, read_questions, read_sequences)
    errors = []
    for reader in read_any:
        try:
            records = reader(path)
        except ValueError as error:
            errors.append(error)
        else:
            return sorted({key for record in records for key in images_of(record)})
    raise errors[0]


def write_records(path: str | Path, records: Sequence[AnyRecord]) -> None:
    """Write records as JSON lines, the form that `read_captions` reads."""
    lines = (json.dumps(vars(record), ensure_ascii=False) for record in records)
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Batch:
    """Which samples a step takes: the pass over the data, and sample numbers [B] within it."""

    epoch: int
    indices: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Deterministic shuffled batches; every record at most once per epoch.

    An epoch is one permutation, drawn from (seed, epoch), cut into optimizer steps of
    `batch_size * world_size * accumulation` records each, and those into slices: micro-steps of
    all processes. Which records a step takes depends on that product alone. The records that do not
    fill the last step wait for the next epoch, so no step holds a record twice.

    Args:
        num_records: records to draw from.
        batch_size: B, samples per process and micro-step.
        seed: of the permutations.
        rank, world_size: which slice of each micro-step is this process's.
        accumulation: micro-steps per optimizer step.

    Raises:
        ValueError: bad sizes, or a step larger than the data.
    """

    num_records: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulation) < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size}, accumulation={self.accumulation}, rank="
                f"{self.rank}, world_size={self.world_size}: sizes must be positive and the rank "
                "below the world size"
            )
        if self.samples_per_step > self.num_records:
            raise ValueError(
                f"batch_size {self.batch_size} x {self.world_size} processes x accumulation "
                f"{self.accumulation} = {self.samples_per_step} samples a step, but only "
                f"{self.num_records} records: lower optim.batch_size"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples of all processes in one optimizer step."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return self.num_records // self.samples_per_step

    def batch(self, micro_step: int) -> Batch:
        """The samples of a micro-step (counted from 0, over all epochs) on this rank."""
        step, slice_number = divmod(micro_step, self.accumulation)
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.samples_per_step
        start += (slice_number * self.world_size + self.rank) * self.batch_size
        order = _permutation(self.seed, epoch, self.num_records)
        return Batch(epoch, order[start : start + self.batch_size])


# Two epochs: workers that read ahead cross the border before the main process does.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@lru_cache(maxsize=2)
def _caption_draws(seed: int, epoch: int, count: int) -> npt.NDArray[np.float64]:
    # A third number keeps these draws apart from the permutation's.
    return np.random.default_rng([seed, epoch, 1]).random(count)


def drawn_captions(
    records: Sequence[CaptionRecord | SequenceRecord], batch: Batch, seed: int
) -> list[str]:
    """One caption per sample of `batch`, drawn from (seed, epoch, sample number) alone."""
    draws = _caption_draws(seed, batch.epoch, len(records))[batch.indices]
    chosen = [records[i].captions for i in batch.indices]
    return [c[int(draw * len(c))] for c, draw in zip(chosen, draws, strict=True)]


# (image keys, batch) -> the image part of a batch: {"image_embeds": [B, S, E]} or {"images": ...};
# where records have several images the sample numbers repeat, one for each key
ImageReader = Callable[[Sequence[str], Batch], dict[str, Tensor]]


class PlannedBatches(Dataset[dict[str, Tensor]], Generic[Record]):
    """Item i is the whole batch of micro-step i; for a DataLoader with `batch_size=None`.

    Args:
        records: caption, question or sequence records.
        plan: which records a step takes.
        read_images: gives the image part of a batch.
        make_text: `(records, batch) -> tensors`, the text part of a batch.
    """

    def __init__(
        self,
        records: Sequence[Record],
        plan: BatchPlan,
        read_images: ImageReader,
        make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]],
    ) -> None:
        self.records: Sequence[Record] = records
        self.plan = plan
        self.read_images = read_images
        self.make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]] = make_text

    def __getitem__(self, micro_step: int) -> dict[str, Tensor]:
        batch = self.plan.batch(micro_step)
        owned = [images_of(self.records[i]) for i in batch.indices]
        keys = [key for row in owned for key in row]
        owners = Batch(batch.epoch, np.repeat(batch.indices, [len(row) for row in owned]))
        return {**self.read_images(keys, owners), **self.make_text(self.records, batch)}


@dataclass
class Stage1TextMaker:
    """Stage 1: token ids `[CLS] w1 .. wn [SEP]` of one drawn caption, and the image's number.

    Records of the same image carry the same `image_ids` entry, so that ITC counts their captions
    as positives of each other and ITM draws none of them as a negative.

    Args:
        tokenizer: a transformers tokenizer, with a padding token.
        max_txt_len: texts are cut to this many tokens.
        image_number: number of each image key.
        seed: of the caption choice.
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
    """`input_ids` and `attention_mask` [B, T], padded to the longest and cut to max_txt_len."""
    tokens = tokenizer(
        list(captions),
        padding="longest",
        truncation=True,
        max_length=max_txt_len,
        return_tensors="pt",
    )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@dataclass
class CaptionTargets:
    """Stage 2 on captions: one drawn caption per sample, as the language model's targets."""

    text: Stage2Text
    seed: int

    def __call__(self, records: Sequence[CaptionRecord], batch: Batch) -> dict[str, Tensor]:
        captions = drawn_captions(records, batch, self.seed)
        return self.text.train_batch(captions, indices=batch.indices.tolist(), epoch=batch.epoch)


@dataclass
class AnswerTargets:
    """Stage 2 on questions: the answer as target, the question in the prompt."""

    text: Stage2Text

    def __call__(self, records: Sequence[QuestionRecord], batch: Batch) -> dict[str, Tensor]:
        chosen = [records[i] for i in batch.indices]
        return self.text.train_batch([r.answer for r in chosen], [r.question for r in chosen])


@dataclass
class SequenceTargets:
    """Stage 2 on several images a sample: one drawn caption each, after the record's prompt."""

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
