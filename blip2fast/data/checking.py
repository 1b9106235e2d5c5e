"""Looks through records and their images before a run (`blip2fast data check`).

Nothing stops at the first fault: all are counted, and the first of each kind are told.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from tqdm import tqdm

from blip2fast._imports import needs
from blip2fast.data.importing import TextCounts
from blip2fast.data.layouts import read_rows
from blip2fast.data.progress import RowBar
from blip2fast.data.records import AnyRecord, QuestionRecord, images_of
from blip2fast.data.rows import RecordMaker, Task, task_of
from blip2fast.data.shards import NamedBytes, ShardKey, read_member
from blip2fast.data.source_config import Given, RecordSource, as_sources
from blip2fast.data.table import RecordTable, describe_table, is_table
from blip2fast.frozen.pictures import load_image

with needs("read images", "PIL"):
    from PIL import Image

# Sides below this many pixels say little to an encoder of 224.
TINY_SIDE = 32
_MOST_TOLD = 10
_AHEAD = 256


@dataclass
class TokenCounts:
    """Lengths of texts in tokens, special ones included.

    Attributes:
        texts: how many were counted.
        mean, median, longest: of their lengths.
        cut: share that is longer than `max_txt_len`.
        unknown: share of the tokens that the tokenizer does not know.
    """

    texts: int
    mean: float
    median: float
    longest: int
    cut: float
    unknown: float


@dataclass
class ImageCounts:
    """What the images are.

    Attributes:
        readable: images that could be read to the end.
        missing, unreadable: images that cannot be used.
        duplicates: images whose bytes are those of an earlier one.
        tiny: images with a side below `TINY_SIDE` pixels.
        modes: how many are of each mode of PIL, such as RGB.
        width, height: smallest, median and largest, in pixels.
    """

    readable: int = 0
    missing: int = 0
    unreadable: int = 0
    duplicates: int = 0
    tiny: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    width: tuple[int, int, int] | None = None
    height: tuple[int, int, int] | None = None


@dataclass
class Checked:
    """What a check found.

    Attributes:
        texts: counts of the usable records.
        bad_rows: rows that make no record, and files of a source that cannot be read.
        bad_sources: sources that cannot be read to the end.
        images: None where no folder of images was given.
        tokens: None where no tokenizer was given.
        ignored: how often each name was passed over.
        faults: what makes something unusable, with file and line; the first of each kind.
        remarks: what is usable but odd, the first of each kind.
    """

    texts: TextCounts
    bad_rows: int = 0
    bad_sources: int = 0
    images: ImageCounts | None = None
    tokens: TokenCounts | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether a run can use all of it."""
        bad = 0 if self.images is None else self.images.missing + self.images.unreadable
        return self.texts.rows > 0 and self.bad_rows + self.bad_sources + bad == 0

    def values(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        texts = {name: value for name, value in vars(self.texts).items() if name[0] != "_"}
        return {
            "usable": self.usable,
            **texts,
            "bad_rows": self.bad_rows,
            "bad_sources": self.bad_sources,
            "images_checked": None if self.images is None else dataclasses.asdict(self.images),
            "tokens": None if self.tokens is None else dataclasses.asdict(self.tokens),
            "ignored": dict(self.ignored),
            "faults": self.faults,
            "remarks": self.remarks,
        }

    def __str__(self) -> str:
        texts = self.texts
        lines = [
            f"{texts.rows} records of {texts.images} images, {texts.texts} texts; "
            f"{self.bad_rows} rows unusable",
            f"texts: {texts.repeated} repeated for one image, {texts.shared} shared by several",
        ]
        if self.tokens is not None:
            t = self.tokens
            lines.append(
                f"tokens: {t.mean:.1f} a text (median {t.median:g}, longest {t.longest}), "
                f"{t.cut:.2%} of the texts cut, {t.unknown:.2%} of the tokens unknown"
            )
        if self.images is None:
            lines.append("images: not looked at (--images DIR)")
        else:
            i = self.images
            lines.append(
                f"images: {i.readable} readable, {i.missing} missing, {i.unreadable} unreadable, "
                f"{i.duplicates} duplicates, {i.tiny} tiny (a side below {TINY_SIDE})"
            )
            if i.width is not None and i.height is not None:
                modes = ", ".join(f"{n} {mode}" for mode, n in sorted(i.modes.items()))
                sizes = (f"{low}/{mid}/{high}" for low, mid, high in (i.width, i.height))
                lines.append(f"least/median/largest: {' x '.join(sizes)} pixels; {modes}")
        if self.ignored:
            lines.append(f"ignored names: {', '.join(sorted(self.ignored))}")
        return "\n".join([*lines, *self.told()])

    def told(self) -> list[str]:
        """What is odd or wrong, a line each, and whether all of it is usable."""
        lines = [f"note: {remark}" for remark in self.remarks]
        lines += [f"fault: {fault}" for fault in self.faults]
        return [*lines, "usable" if self.usable else "not usable as it is"]

    def table(self) -> list[list[str]]:
        """What was counted, a row each, beneath a header."""
        texts, tokens, images = self.texts, self.tokens, self.images
        table = [
            ["", "count"],
            ["records", f"{texts.rows:,}"],
            ["rows that make no record", f"{self.bad_rows:,}"],
            ["images that they name", f"{texts.images:,}"],
            ["texts", f"{texts.texts:,}"],
            ["repeated for one image", f"{texts.repeated:,}"],
            ["shared by several images", f"{texts.shared:,}"],
        ]
        if tokens is not None:
            table += [
                ["tokens a text, mean", f"{tokens.mean:.1f}"],
                ["median, longest", f"{tokens.median:g}, {tokens.longest:,}"],
                ["texts that are cut", f"{tokens.cut:.2%}"],
                ["unknown tokens", f"{tokens.unknown:.2%}"],
            ]
        if images is None:
            return [*table, ["images looked at (--images DIR)", "none"]]
        table += [
            ["images readable", f"{images.readable:,}"],
            ["missing", f"{images.missing:,}"],
            ["unreadable", f"{images.unreadable:,}"],
            ["duplicates", f"{images.duplicates:,}"],
            [f"tiny (a side below {TINY_SIDE} pixels)", f"{images.tiny:,}"],
        ]
        for side, found in (("width", images.width), ("height", images.height)):
            if found is not None:
                table.append([f"{side}: least, median, largest", ", ".join(map(str, found))])
        return table + [[f"mode {mode}", f"{n:,}"] for mode, n in sorted(images.modes.items())]


def check_records(
    given: Given | Sequence[Given],
    task: Task | None = None,
    images: Path | None = None,
    tokenizer: Any = None,
    max_txt_len: int = 32,
    workers: int = 4,
) -> Checked:
    """Look through all records of sources, and their images.

    Args:
        given: one or several sources, tables included.
        task: kind of the records; None: found from the first row of each source.
        images: folder of the images; None: images are not looked at.
        tokenizer: a transformers tokenizer, to count tokens.
        max_txt_len: tokens that a run keeps of a text.
        workers: threads that read images.

    Raises:
        ValueError: no sources.
    """
    found = Checked(TextCounts())
    faults, remarks = _Told(found.faults), _Told(found.remarks)
    first_seen: dict[str, str] = {}
    inside: dict[str, _Picture] = {}

    def keep_image(content: bytes, where: str) -> str:
        inside[where] = _inspect(where, NamedBytes(content, "in the row"))
        return where

    lengths = _Lengths(tokenizer, max_txt_len)

    sources = as_sources(given)

    def rows() -> Iterator[tuple[str, AnyRecord | str]]:
        with RowBar(len(sources)) as bar:
            for number, source in enumerate(sources):
                tell = partial(bar.add, number)
                try:
                    yield from _records(source, task, images, keep_image, found.ignored, tell)
                except (ValueError, OSError) as error:
                    found.bad_sources += 1
                    faults.add("source", str(error))

    for where, record in rows():
        if isinstance(record, str):
            found.bad_rows += 1
            faults.add("row", record)
            continue
        found.texts.add(record)
        lengths.add(record)
        for key in images_of(record):
            if images is not None or key in inside:
                first_seen.setdefault(key, where)
    found.texts.finish()
    if not found.texts.rows + found.bad_rows + found.bad_sources:
        faults.add("row", "no records at all")
    found.tokens = lengths.finish()
    if images is not None or inside:
        with ThreadPoolExecutor(workers) as pool:
            others = [] if images is None else [key for key in first_seen if key not in inside]
            pictures = chain(inside.values(), _ahead(pool, images or Path(), others))
            found.images = _count_images(pictures, first_seen, faults, remarks)
    faults.finish()
    remarks.finish()
    return found


class _Told:
    """Keeps the first messages of each kind, and counts the others."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.counts = lines, Counter[str]()

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= _MOST_TOLD:
            self.lines.append(message)

    def finish(self) -> None:
        for kind, count in self.counts.items():
            if count > _MOST_TOLD:
                self.lines.append(f"{count - _MOST_TOLD} more of the kind: {kind}")


def _records(
    source: RecordSource,
    task: Task | None,
    images: Path | None,
    keep_image: Callable[[bytes, str], str],
    ignored: Counter[str],
    tell: Callable[[float], None],
) -> Iterator[tuple[str, AnyRecord | str]]:
    """Where each row is, and its record or its fault."""
    if is_table(source.source):
        path = Path(source.source)
        table = RecordTable([path], describe_table(path)["task"])
        try:
            table.validate()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for number, record in enumerate(table, 1):
            tell(number / len(table))
            yield f"{path}, record {number}", record
        return
    make = None
    for row in read_rows(source.source, source):
        if make is None and row.fault is None:
            make = RecordMaker(task or task_of(row), source, images, keep_image, ignored)
        tell(row.share)
        try:
            yield row.where, (make or RecordMaker("caption"))(row)
        except ValueError as error:
            yield row.where, str(error)


class _Lengths:
    """Token counts of the texts of records, tokenized by the thousand."""

    def __init__(self, tokenizer: Any, max_txt_len: int) -> None:
        self._tokenizer, self._most = tokenizer, max_txt_len
        self._waiting: list[str] = []
        self._lengths: list[np.ndarray[Any, Any]] = []
        self._unknown = 0

    def add(self, record: AnyRecord) -> None:
        if self._tokenizer is None:
            return
        texts = (record.answer,) if isinstance(record, QuestionRecord) else record.captions
        self._waiting += texts
        if len(self._waiting) >= 1000:
            self._count()

    def _count(self) -> None:
        if not self._waiting:
            return
        ids = self._tokenizer(self._waiting, verbose=False)["input_ids"]
        self._lengths.append(np.array([len(row) for row in ids], np.int32))
        unknown = self._tokenizer.unk_token_id
        if unknown is not None:
            self._unknown += sum(row.count(unknown) for row in ids)
        self._waiting.clear()

    def finish(self) -> TokenCounts | None:
        if self._tokenizer is None:
            return None
        self._count()
        lengths = np.concatenate([*self._lengths, np.zeros(0, np.int32)])
        if not len(lengths):
            return TokenCounts(0, 0.0, 0.0, 0, 0.0, 0.0)
        return TokenCounts(
            len(lengths),
            float(lengths.mean()),
            float(np.median(lengths)),
            int(lengths.max()),
            float((lengths > self._most).mean()),
            self._unknown / int(lengths.sum()),
        )


@dataclass
class _Picture:
    """An image as it was found: its mode, size and hash, or why it cannot be used."""

    key: str
    fault: str | None = None
    missing: bool = False
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""


def _count_images(
    pictures: Iterable[_Picture], first_seen: dict[str, str], faults: _Told, remarks: _Told
) -> ImageCounts:
    counts, modes = ImageCounts(), Counter[str]()
    sizes: list[tuple[int, int]] = []
    first_of: dict[bytes, str] = {}
    with tqdm(total=len(first_seen), unit="image", disable=None) as bar:
        for picture in pictures:
            bar.update()
            where = first_seen[picture.key]
            if picture.fault is not None:
                kind = "missing image" if picture.missing else "unreadable image"
                counts.missing += picture.missing
                counts.unreadable += not picture.missing
                faults.add(kind, f"{where}: {picture.fault}")
                continue
            counts.readable += 1
            modes[picture.mode] += 1
            sizes.append(picture.size)
            if min(picture.size) < TINY_SIDE:
                counts.tiny += 1
                width, height = picture.size
                remarks.add("tiny", f"{where}: image {picture.key!r} is {width} x {height} pixels")
            earlier = first_of.setdefault(picture.digest, picture.key)
            if earlier != picture.key:
                counts.duplicates += 1
                remarks.add("duplicate", f"{where}: image {picture.key!r} is {earlier!r} again")
    counts.modes = dict(modes)
    if sizes:
        low, mid, high = (f(sizes, axis=0) for f in (np.min, np.median, np.max))
        counts.width = (int(low[0]), int(mid[0]), int(high[0]))
        counts.height = (int(low[1]), int(mid[1]), int(high[1]))
    return counts


def _ahead(pool: ThreadPoolExecutor, folder: Path, keys: Iterable[str]) -> Iterator[_Picture]:
    """Pictures in the order of the keys; few are read ahead, so few are in memory."""
    rest = iter(keys)
    while some := list(islice(rest, _AHEAD)):
        yield from pool.map(lambda key: _picture(folder, key), some)


def _picture(folder: Path, key: str) -> _Picture:
    inside, name = ShardKey.parse(key), PurePath(key)
    try:
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"image {key!r} lies outside {folder}")
        if inside is not None:
            file = read_member(folder, inside)
        else:
            file = NamedBytes((folder / key).read_bytes(), str(folder / key))
    except FileNotFoundError:
        return _Picture(key, f"image {folder / key}: no such file", missing=True)
    except OSError as error:
        return _Picture(key, f"image {folder / key}: {error.strerror or error}")
    except ValueError as error:
        return _Picture(key, str(error), missing="no such shard" in str(error))
    return _inspect(key, file)


def _inspect(key: str, file: NamedBytes) -> _Picture:
    try:
        load_image(file)
    except ValueError as error:
        return _Picture(key, str(error))
    file.seek(0)
    with Image.open(file) as image:
        mode, size = image.mode, image.size
    digest = hashlib.blake2b(file.getbuffer(), digest_size=16).digest()
    return _Picture(key, mode=mode, size=size, digest=digest)
