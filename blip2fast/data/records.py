"""Records of a run as JSON lines: images with captions, questions, or sequences of images."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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
    """A question about an image.

    Attributes:
        answer: the right one; with several `answers` the commonest.
        type: groups the answers in evaluation.
        answers: those of several people (VQAv2 has ten), of which training samples one an epoch;
            empty: `answer` alone.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    image: str
    question: str
    answer: str
    type: str = ""
    answers: tuple[str, ...] = ()


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
    return _read_lines(path, CaptionRecord)


def read_questions(path: str | Path) -> list[QuestionRecord]:
    """Read question records: `{"image": key, "question": ..., "answer": ..., "type": ...}`.

    Raises:
        ValueError: as `read_captions`.
    """
    return _read_lines(path, QuestionRecord)


def read_sequences(path: str | Path) -> list[SequenceRecord]:
    """Read sequence records: `{"images": [key, ...], "prompt": ..., "captions": [...]}`.

    Raises:
        ValueError: as `read_captions`; or the number of markers differs from that of the images.
    """
    return _read_lines(path, SequenceRecord)


def plain_text(text: str) -> str:
    """A text without invisible characters, its white space as single spaces."""
    if not text.isprintable():
        text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in _INVISIBLE)
    return " ".join(text.split())


_INVISIBLE = ("Cf", "Cc")


def text_hash(text: str) -> int:
    """A number of 63 bits that stands for a text or a key, the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def record_fault(record: AnyRecord) -> str | None:
    """What makes a record unusable: a text without a character, or markers without images."""
    if isinstance(record, QuestionRecord):
        texts = (record.question, record.answer, *record.answers)
        return None if all(map(plain_text, texts)) else "an empty question or answer"
    if isinstance(record, CaptionRecord):
        if record.captions and all(map(plain_text, record.captions)):
            return None
        return f"image {record.image!r} has an empty caption"
    if not record.captions:
        return "no captions, so nothing to write"
    for caption in record.captions:
        if not plain_text(caption.replace(IMAGE_MARKER, "")):
            return f"an empty caption {caption!r}"
        markers = (record.prompt + caption).count(IMAGE_MARKER)
        if markers != len(record.images):
            return (
                f"{markers} markers {IMAGE_MARKER} in the prompt and the caption "
                f"{caption!r}, but {len(record.images)} images; one marker an image"
            )
    return None


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
    for number, record in enumerate(records, 1):
        fault = record_fault(record)
        if fault is not None:
            raise ValueError(f"{path}, record {number}: {fault}")
    return records


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
