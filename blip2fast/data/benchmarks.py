"""The samples of a benchmark: images with true captions, or questions with true answers.

The files are those that the benchmarks publish, in the layouts of `blip2fast.data.layouts`: COCO
and Flickr30K in Karpathy's splits (arXiv 1412.2306) or as LAVIS has them, COCO's own captions,
NoCaps, VQAv2, OK-VQA and GQA; or records of any other layout, or a table of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blip2fast.data.layouts import Row, read_rows
from blip2fast.data.records import AnyRecord, CaptionRecord, QuestionRecord
from blip2fast.data.rows import RecordMaker
from blip2fast.data.source_config import RecordSource
from blip2fast.data.table import RecordTable, is_table

Subject = Literal["caption", "vqa"]


@dataclass(frozen=True)
class Sample:
    """What a model is asked about, and what people said.

    Attributes:
        id: unique, by which predictions are known: the benchmark's own where it has one.
        image: key of the image.
        references: true captions, or the answers of several people; one answer where the
            benchmark has a single one.
        question: empty for captions.
        raw_references: of OK-VQA, the answers before stemming.
        kinds: what the sample is counted under, by grouping, such as `answer_type`.
    """

    id: str
    image: str
    references: tuple[str, ...]
    question: str = ""
    raw_references: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)


def read_samples(
    source: RecordSource,
    subject: Subject,
    images: Path | None = None,
    limit: int | None = None,
    captions_per_image: int | None = None,
) -> list[Sample]:
    """The samples of a benchmark, in the order of its file.

    Rows about one image are one sample of the subject "caption".

    Args:
        source: the file, and what it does not say about itself.
        subject: captions of images, or questions.
        images: the folder from which images are named.
        limit: at most so many samples, the first; None: all.
        captions_per_image: at most so many, the first of each image; None: all.

    Raises:
        ValueError: a fault of a row, with file and line; none; or two samples of one id.
    """
    found: dict[str, Sample] = {}
    captions: dict[str, list[str]] = {}
    for record, row in _records(source, subject, images):
        if isinstance(record, CaptionRecord):
            known = captions.setdefault(record.image, [])
            if not known:
                sample_id = str(row.about.get("id", record.image))
                sample = Sample(sample_id, record.image, (), kinds=_kinds(row))
                _add(found, sample, row, source)
            known += record.captions
        elif isinstance(record, QuestionRecord):
            sample_id = str(row.about.get("id", len(found)))
            _add(found, _question(sample_id, record, row), row, source)
    samples = list(found.values())[:limit]
    if not samples:
        raise ValueError(f"{source.source} holds no samples to evaluate")
    if subject == "caption":
        samples = [
            dataclasses.replace(
                sample, references=tuple(captions[sample.image][:captions_per_image])
            )
            for sample in samples
        ]
    return samples


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all samples: whether two evaluations were about the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(dataclasses.asdict(sample), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _records(
    source: RecordSource, subject: Subject, images: Path | None
) -> Iterator[tuple[AnyRecord, Row]]:
    if is_table(source.source):
        table = RecordTable([Path(source.source)], subject)
        for number in range(len(table)):
            yield table[number], Row(f"{source.source}, record {number + 1}")
        return
    make = RecordMaker(subject, source, images)
    for row in read_rows(source.source, source):
        yield make(row), row


def _add(found: dict[str, Sample], sample: Sample, row: Row, source: RecordSource) -> None:
    if sample.id in found:
        where = row.where or source.source
        raise ValueError(f"{where}: a second sample with the id {sample.id}; drop one")
    found[sample.id] = sample


def _question(sample_id: str, record: QuestionRecord, row: Row) -> Sample:
    kinds = _kinds(row) or ({"type": record.type} if record.type else {})
    return Sample(
        sample_id,
        record.image,
        record.answers or (record.answer,),
        record.question,
        tuple(row.about.get("raw_answers", ())),
        kinds,
    )


def _kinds(row: Row) -> dict[str, str]:
    return {name: str(kind) for name, kind in row.about.get("kinds", {}).items()}
