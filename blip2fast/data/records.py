"""Records of a run as JSON lines: images with captions, questions, or sequences of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blip2fast._imports import needs

with needs("read records", "pydantic"):
    from pydantic import ConfigDict, TypeAdapter, ValidationError


@dataclass(frozen=True)
class CaptionRecord:
    """An image and its captions; CapFilt keeps several per image (paper, section 3.4)."""

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
    """A sample with any number of images; `<image>` markers in the texts give their positions.

    Attributes:
        images: keys, in the order of the markers.
        captions: target texts, of which a step samples one; they may contain markers.
        prompt: precedes the target and is excluded from the loss: an instruction, or few-shot
            examples ("<image> a cat. <image> a dog. <image>").
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    images: tuple[str, ...]
    captions: tuple[str, ...]
    prompt: str = ""


IMAGE_MARKER = "<image>"  # the image marker in the texts of a SequenceRecord
AnyRecord = CaptionRecord | QuestionRecord | SequenceRecord

Record = TypeVar("Record", CaptionRecord, QuestionRecord, SequenceRecord)


def images_of(record: AnyRecord) -> tuple[str, ...]:
    """The keys of a record's images, in reading order."""
    return record.images if isinstance(record, SequenceRecord) else (record.image,)


def read_captions(path: str | Path) -> list[CaptionRecord]:
    """Read caption records from JSON lines: `{"image": key, "captions": [text, ...]}`.

    Raises:
        ValueError: a missing or empty file, or an invalid line, named by its number.
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
    """Read sequence records: `{"images": [key, ...], "prompt": ..., "captions": [...]}`.

    Raises:
        ValueError: as `read_captions`; or the number of markers differs from that of the images.
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
    """The distinct image keys of records of any kind, sorted.

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


def write_records(path: str | Path, records: Sequence[AnyRecord | Mapping[str, object]]) -> None:
    """Write records as JSON lines, in the format of the readers above.

    Args:
        path: output file; its folder is created if it does not exist.
        records: record objects or plain dictionaries.
    """
    plain = (record if isinstance(record, Mapping) else vars(record) for record in records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in plain)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# by `data.task`
READERS: dict[str, Callable[..., Sequence[Any]]] = {
    "caption": read_captions,
    "vqa": read_questions,
    "sequence": read_sequences,
}
