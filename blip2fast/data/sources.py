"""Opens the records of a run: tables, or sources of any layout, alone or mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from blip2fast._imports import needs
from blip2fast.data.layouts import read_rows
from blip2fast.data.order import Mixture
from blip2fast.data.records import AnyRecord, images_of
from blip2fast.data.rows import RecordMaker, Task, task_of
from blip2fast.data.skipping import LeftOut
from blip2fast.data.source_config import Given, RecordSource, as_sources
from blip2fast.data.table import MemoryTable, RecordTable, describe_table, is_table

with needs("keep records in a table", "pyarrow"):
    import pyarrow as pa


def read_records(
    source: RecordSource,
    task: Task | None = None,
    images: Path | None = None,
    keep_image: Callable[[bytes, str], str] | None = None,
    ignored: Counter[str] | None = None,
    tell: Callable[[float], None] | None = None,
    left_out: list[LeftOut] | None = None,
) -> Iterator[AnyRecord]:
    """The records of a source that is not a table.

    Args:
        source: where they are.
        task: their kind; None: found from the first row.
        images, keep_image: as in `RecordMaker`.
        ignored: receives the names that were passed over.
        tell: receives the share of the source that has been read, for every row.
        left_out: receives the rows that make no record; None: they are refused.

    Raises:
        ValueError: a fault of the source or of a row, or no records at all.
    """
    made = _made_records(source, task, images, keep_image, ignored, tell, left_out)
    return (record for _, record in made)


def _made_records(
    source: RecordSource,
    task: Task | None,
    images: Path | None,
    keep_image: Callable[[bytes, str], str] | None = None,
    ignored: Counter[str] | None = None,
    tell: Callable[[float], None] | None = None,
    left_out: list[LeftOut] | None = None,
) -> Iterator[tuple[str, AnyRecord]]:
    """As `read_records`, each with its file and line."""
    make, first_fault, usable = None, "", False
    kept = Counter[str]() if ignored is None else ignored
    for row in read_rows(source.source, source):
        if tell is not None:
            tell(row.share)
        if make is None and row.fault is None:
            make = RecordMaker(task or task_of(row), source, images, keep_image, kept)
        try:
            record = (make or RecordMaker(task or "caption", source))(row)
        except ValueError as error:
            # a fault without a place is of a whole file
            if left_out is None or not row.where:
                raise
            first_fault = first_fault or str(error)
            left_out.append(LeftOut(row.where, str(error).removeprefix(f"{row.where}: ")))
            continue
        usable = True
        yield row.where, record
    if not usable:
        why = f" that can be used; the first: {first_fault}" if first_fault else ""
        raise ValueError(f"{source.source} holds no records{why}")


def open_records(
    given: Given | Sequence[Given],
    task: Task,
    images: Path | None = None,
    note: Callable[[str], None] | None = None,
    left_out: list[LeftOut] | None = None,
) -> RecordTable:
    """The records of a run, in the order of the sources.

    Tables are mapped. Other sources are read into a table in memory, by every process: import
    those of millions of rows once, with `blip2fast data import`.

    Args:
        given: one or several sources.
        task: kind of the records.
        images: the folder from which images are named.
        note: receives a line about names that were passed over.
        left_out: receives the rows that make no record; None: they are refused.

    Raises:
        ValueError: a fault of a source, with file, line and remedy.
    """
    parts: list[Path | pa.Buffer] = []
    for source in as_sources(given):
        if is_table(source.source):
            parts.append(Path(source.source))
            continue
        table, ignored = MemoryTable(task), Counter[str]()
        for record in read_records(source, task, images, ignored=ignored, left_out=left_out):
            table.add(record)
        if ignored and note is not None:
            note(f"{source.source}: {ignored_names(ignored)}")
        parts.append(table.finish())
    return RecordTable(parts, task)


def whereabouts(
    given: Given | Sequence[Given], table: RecordTable, images: Path | None, rows: Iterable[int]
) -> dict[int, str]:
    """The file and line of records of `open_records`; a source that is no table is read again.

    Args:
        given, images: as they were given to `open_records`.
        table: what it returned.
        rows: numbers of records.
    """
    found: dict[int, str] = {}
    start, wanted = 0, sorted(set(rows))
    for source, size in zip(as_sources(given), table.sizes, strict=True):
        here = [row - start for row in wanted if start <= row < start + size]
        if here and is_table(source.source):
            found |= {start + row: f"{source.source}, record {row + 1}" for row in here}
        elif here:
            task: Any = table.task
            made = _made_records(source, task, images, left_out=[])
            places = [where for where, _ in islice(made, here[-1] + 1)]
            found |= {start + row: places[row] for row in here}
        start += size
    return found


def mixture(given: Given | Sequence[Given], table: RecordTable) -> Mixture | None:
    """The shares of the sources of `open_records(given)`; None where they have no weights."""
    weights = [source.weight for source in as_sources(given)]
    known = tuple(weight for weight in weights if weight is not None)
    return Mixture(tuple(table.sizes), known) if known else None


# A record that is read from a disk takes about 0.3 ms, and so does looking for its image.
MOST_CHECKED, SAMPLED = 100_000, 10_000


def checked_records(records: Sequence[AnyRecord]) -> Iterator[AnyRecord]:
    """The records that a run looks at as it starts.

    All, or of more than `MOST_CHECKED` those of `SAMPLED` at equal distances (`blip2fast data
    check` looks at all).
    """
    step = 1 if len(records) <= MOST_CHECKED else len(records) // SAMPLED
    return (records[i] for i in range(0, len(records), step))


def checked_keys(records: Sequence[AnyRecord]) -> list[str]:
    """The image keys of `checked_records`, each once, in their order."""
    return list(dict.fromkeys(k for r in checked_records(records) for k in images_of(r)))


def ignored_names(ignored: Counter[str]) -> str:
    """A line about names that were passed over."""
    names = ", ".join(f"{name!r}" for name in sorted(ignored))
    return f"ignored {names} ({max(ignored.values())} rows)"


def source_keys(given: Given | Sequence[Given], left_out: list[LeftOut] | None = None) -> list[str]:
    """The distinct image keys of sources of any task, sorted.

    Args:
        given: one or several sources.
        left_out: receives the rows that make no record; None: they are refused.

    Raises:
        ValueError: a fault of a source, with file, line and remedy.
    """
    keys: set[str] = set()
    for source in as_sources(given):
        records: Iterator[AnyRecord]
        if is_table(source.source):
            path = Path(source.source)
            records = iter(RecordTable([path], describe_table(path)["task"]))
        else:
            records = read_records(source, left_out=left_out)
        keys.update(key for record in records for key in images_of(record))
    return sorted(keys)
