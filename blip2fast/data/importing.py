"""Writes the records of any layout into a table (`blip2fast data import`)."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blip2fast.data.layouts import read_rows
from blip2fast.data.progress import RowBar
from blip2fast.data.records import (
    AnyRecord,
    QuestionRecord,
    images_of,
    plain_text,
    text_hash,
)
from blip2fast.data.rows import Task, task_of
from blip2fast.data.shards import ShardKey
from blip2fast.data.skipping import LeftOut, OnError, check_skipped
from blip2fast.data.source_config import Given, RecordSource, as_sources
from blip2fast.data.sources import ignored_names, read_records
from blip2fast.data.table import RecordTable, TableWriter, describe_table, is_table

_SHARD_BYTES = 2**30
SKIPPED = "skipped.jsonl"
_MOST_TOLD = 10


@dataclass
class TextCounts:
    """What there is in records, and which texts come again.

    Attributes:
        rows: records.
        images: distinct images.
        texts: captions, or answers of questions.
        repeated: texts that come again for the same image.
        shared: distinct texts that belong to several images.
    """

    rows: int = 0
    images: int = 0
    texts: int = 0
    repeated: int = 0
    shared: int = 0
    # an image and a text of it, as hashes
    _pairs: tuple[array[int], array[int]] = field(
        default_factory=lambda: (array("q"), array("q")), repr=False
    )

    def add(self, record: AnyRecord) -> None:
        """Count a record."""
        self.rows += 1
        keys = images_of(record)
        image = text_hash("\0".join(keys))
        for text in texts_of(record):
            self._pairs[0].append(image)
            self._pairs[1].append(text_hash(plain_text(text).lower()))

    def finish(self) -> TextCounts:
        """Compute all counts from what was added."""
        images, texts = (np.frombuffer(part, np.int64) for part in self._pairs)
        self.texts, self.images = len(texts), len(np.unique(images))
        order = np.lexsort((images, texts))
        images, texts = images[order], texts[order]
        first = np.ones(len(texts), bool)
        first[1:] = (images[1:] != images[:-1]) | (texts[1:] != texts[:-1])
        self.repeated = int(len(texts) - first.sum())
        counts: npt.NDArray[np.int64] = np.unique(texts[first], return_counts=True)[1]
        self.shared = int((counts > 1).sum())
        return self


def texts_of(record: AnyRecord) -> tuple[str, ...]:
    """The captions of a record, or its question with its answer."""
    if isinstance(record, QuestionRecord):
        return (f"{record.question}\0{record.answer}",)
    return record.captions


@dataclass
class Imported:
    """What an import wrote.

    Attributes:
        path: folder of the table.
        counts: of its records.
        ignored: how often each name was passed over.
        packed: images that rows had in themselves, now in shards beside the table.
        left_out: rows that make no record, which `on_error="skip"` leaves out.
    """

    path: Path
    task: Task
    counts: TextCounts
    ignored: Counter[str]
    packed: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{self.path}: {counts.rows} records ({self.task}) of {counts.images} images, "
            f"{counts.texts} texts",
            f"{counts.repeated} texts repeated for one image, {counts.shared} shared by several",
        ]
        if self.packed:
            lines.append(f"{self.packed} images packed: set data.images to {self.path}")
        if self.ignored:
            lines.append(ignored_names(self.ignored))
        if self.left_out:
            lines += [f"left out: {each}" for each in self.left_out[:_MOST_TOLD]]
            lines.append(f"{len(self.left_out)} rows left out: {self.path / SKIPPED}")
        return "\n".join(lines)


def import_records(
    given: Given | Sequence[Given],
    out: str | Path,
    task: Task | None = None,
    images: Path | None = None,
    *,
    on_error: OnError = "raise",
    max_skipped: float | None = None,
) -> Imported:
    """Write the records of sources into a table; nothing is there unless all of it is.

    Args:
        given: one or several sources.
        out: folder of the table.
        task: kind of the records; None: found from the first row.
        images: the folder from which images are named.
        on_error: `skip`: leave out rows that make no record, and list them in `skipped.jsonl`
            beside the table.
        max_skipped: how many may be left out: a count, or below 1 a share; None: 0.01.

    Raises:
        ValueError: a fault of a source, with file, line and remedy; or something at `out`; or more
            rows to leave out than allowed.
    """
    sources = as_sources(given)
    task = task or _task_of(sources[0])
    left_out: list[LeftOut] = []
    ignored, counts = Counter[str](), TextCounts()
    with TableWriter(out, task) as writer:
        packer = _Packer(writer.partial)
        with RowBar(len(sources)) as bar, contextlib.closing(packer):
            for number, source in enumerate(sources):
                tell = partial(bar.add, number)
                records: Iterable[AnyRecord]
                if is_table(source.source):
                    records = _told(RecordTable([Path(source.source)], task), tell)
                else:
                    told = left_out if on_error == "skip" else None
                    records = read_records(source, task, images, packer.add, ignored, tell, told)
                for record in records:
                    writer.add(record)
                    counts.add(record)
        check_skipped(left_out, max_skipped, counts.rows + len(left_out), "rows")
        if left_out:
            lines = [json.dumps(vars(each), ensure_ascii=False) + "\n" for each in left_out]
            (writer.partial / SKIPPED).write_text("".join(lines), encoding="utf-8")
        counts.finish()
        named = {name: value for name, value in vars(counts).items() if name[0] != "_"}
        writer.finish({"sources": [source.source for source in sources], **named})
    return Imported(Path(out), task, counts, ignored, packer.images, left_out)


def _told(table: RecordTable, tell: Callable[[float], None]) -> Iterator[AnyRecord]:
    for number, record in enumerate(table, 1):
        tell(number / len(table))
        yield record


def _task_of(source: RecordSource) -> Task:
    if is_table(source.source):
        found: Task = describe_table(Path(source.source))["task"]
        return found
    row = None
    for row in read_rows(source.source, source):
        if row.fault is None:
            break
    if row is None:
        raise ValueError(f"{source.source} holds no records")
    return task_of(row)


class _Packer:
    """Stores images that rows have in themselves, in tar shards beside the table."""

    def __init__(self, folder: Path) -> None:
        self.images = 0
        self._folder, self._shards = folder, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, content: bytes, where: str) -> str:
        """Store an image; returns its key."""
        if not content:
            raise ValueError(f"{where}: the image in the row is empty; drop the row")
        if self._tar is None or self._tar.offset > _SHARD_BYTES:
            self.close()
            path = self._folder / f"images-{self._shards:05d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._shards += 1
        info = tarfile.TarInfo(f"{self.images:09d}")
        info.size = len(content)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(content))
        self.images += 1
        shard = f"images-{self._shards - 1:05d}.tar"
        return str(ShardKey(shard, info.name, offset, info.size))

    def close(self) -> None:
        """Finish the shard that is open."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
