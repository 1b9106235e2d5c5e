"""The table of a run's records: Arrow columns that every process maps.

A table on disk is a folder with `records.arrow` and `records.json`, written by `TableWriter`. No
process holds its rows: they are read from the file where it is mapped, and the pages that they lie
on are shared by all processes of a machine. A table of a small source may be in memory instead.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from blip2fast._imports import needs
from blip2fast.data.manifest import flush, replace_file, write_json
from blip2fast.data.records import AnyRecord, CaptionRecord, QuestionRecord, SequenceRecord

with needs("keep records in a table", "pyarrow"):
    import pyarrow as pa

FORMAT = 1
ROWS, DESCRIPTION = "records.arrow", "records.json"
KINDS: dict[str, type[AnyRecord]] = {
    "caption": CaptionRecord,
    "vqa": QuestionRecord,
    "sequence": SequenceRecord,
}
# Offsets within a batch are 32-bit, so its texts must stay below 2 GiB.
_BATCH_ROWS, _BATCH_BYTES = 65_536, 2**28
# Linux maps up to 64 KiB around each page that is read, five of which make a caption record.
_READS_HELD = 128


def is_table(path: str | Path) -> bool:
    """Whether a path is the folder of a table."""
    return Path(path, DESCRIPTION).is_file()


def _schema(task: str) -> pa.Schema:
    text, texts = pa.string(), pa.list_(pa.string())
    return pa.schema(
        [(f.name, texts if "tuple" in str(f.type) else text) for f in fields(KINDS[task])]
    )


class RecordTable(Sequence[Any]):
    """Records in one or several Arrow tables, in order.

    Args:
        parts: folders of tables, or tables in memory (`MemoryTable.finish`).
        task: kind of the records.

    Attributes:
        sizes: rows of each part.
        digests: SHA-256 of each part that is a folder, as its import stated.

    Raises:
        ValueError: a folder that is no table, of another task, or damaged.
    """

    def __init__(self, parts: Sequence[Path | pa.Buffer], task: str) -> None:
        self.parts, self.task = list(parts), task
        self._kind: Any = KINDS[task]
        self._names = [f.name for f in fields(self._kind)]
        self.digests: list[str] = []
        self._maps: list[mmap.mmap] = []
        self._reads = 0
        tables = [self._open(part) for part in self.parts]
        self.sizes = [sum(batch.num_rows for batch in table) for table in tables]
        self._batches = [batch for table in tables for batch in table if batch.num_rows]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes map the files again.
        return type(self), (self.parts, self.task)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> AnyRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnyRecord]: ...
    def __getitem__(self, index: int | slice) -> AnyRecord | list[AnyRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, row)
        batch = self._batches[number]
        row -= self._ends[number] - batch.num_rows
        values = {name: batch.column(name)[row].as_py() for name in self._names}
        self._reads += 1
        if self._reads % _READS_HELD == 0:
            self._let_go()
        return self._record(values)

    def __iter__(self) -> Iterator[AnyRecord]:
        for batch in self._batches:
            for start in range(0, batch.num_rows, 1024):
                yield from map(self._record, batch.slice(start, 1024).to_pylist())
            self._let_go()

    def validate(self) -> None:
        """Read all rows and make sure that none of them is damaged.

        Raises:
            ValueError: offsets outside of the texts, or texts that are not UTF-8; or, of a folder,
                other bytes than its import wrote.
        """
        for number, batch in enumerate(self._batches):
            try:
                batch.validate(full=True)
            except pa.ArrowInvalid as error:
                first = self._ends[number] - batch.num_rows + 1
                raise ValueError(
                    f"records {first} to {self._ends[number]} are damaged "
                    f"({str(error).splitlines()[0]}); import them again"
                ) from None
            self._let_go()
        folders = [part for part in self.parts if isinstance(part, Path)]
        for folder, stated in zip(folders, self.digests, strict=True):
            with (folder / ROWS).open("rb") as rows:
                if hashlib.file_digest(rows, "sha256").hexdigest() != stated:
                    raise ValueError(
                        f"{ROWS} has changed since its import ({DESCRIPTION} states its SHA-256); "
                        "import the records again"
                    )

    def _let_go(self) -> None:
        """Give up the pages that were read; they stay in the machine's page cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def _open(self, part: Path | pa.Buffer) -> list[pa.RecordBatch]:
        if isinstance(part, pa.Buffer):
            return _batches(part)
        values = describe_table(part)
        if values["task"] != self.task:
            raise ValueError(
                f"{part}: records of the task {values['task']}, not {self.task} (data.task)"
            )
        self.digests.append(values["sha256"])
        path = part / ROWS
        size = path.stat().st_size if path.is_file() else 0
        if size != values["bytes"]:
            raise ValueError(
                f"{path}: {size} bytes, but {DESCRIPTION} states {values['bytes']}; import it again"
            )
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        self._maps.append(mapped)
        try:
            return _batches(pa.py_buffer(mapped))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged ({error}); import it again") from None

    def _record(self, values: Mapping[str, Any]) -> AnyRecord:
        plain = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        record: AnyRecord = self._kind(**plain)
        return record


def _batches(source: Any) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(source)
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def describe_table(path: Path) -> dict[str, Any]:
    """What `records.json` says of a table.

    Raises:
        ValueError: no table there, or of another format.
    """
    try:
        values = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        found = values["format"]
    except FileNotFoundError:
        raise ValueError(f"no table of records at {path}: {DESCRIPTION} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path / DESCRIPTION}: damaged; import the records again") from None
    if found != FORMAT:
        raise ValueError(
            f"{path}: format {found!r}, but this version reads {FORMAT}; import the records again"
        )
    missing = [name for name in ("task", "rows", "bytes", "sha256") if name not in values]
    if missing or values["task"] not in KINDS:
        raise ValueError(f"{path / DESCRIPTION}: damaged; import the records again")
    return dict(values)


class _BatchWriter:
    """Collects records into Arrow batches; writes them to `sink`."""

    def __init__(self, sink: Any, task: str) -> None:
        self.rows = 0
        self._schema = _schema(task)
        self._writer = pa.ipc.new_file(sink, self._schema)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._held = self._bytes = 0

    def add(self, record: AnyRecord) -> None:
        for name, column in self._columns.items():
            value = getattr(record, name)
            column.append(value)
            self._bytes += len(value) if isinstance(value, str) else sum(map(len, value))
        self.rows += 1
        self._held += 1
        if self._held == _BATCH_ROWS or self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            batch = pa.RecordBatch.from_pydict(self._columns, self._schema)
            self._writer.write_batch(batch)
        for column in self._columns.values():
            column.clear()
        self._held = self._bytes = 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class MemoryTable:
    """Collects records into a table in memory, some tens of bytes a record beside its texts."""

    def __init__(self, task: str) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer = _BatchWriter(self._sink, task)

    def add(self, record: AnyRecord) -> None:
        """Append a record."""
        self._writer.add(record)

    def finish(self) -> pa.Buffer:
        """The table, for `RecordTable`."""
        self._writer.close()
        return self._sink.getvalue()


class TableWriter:
    """Writes a table to `<path>.partial`, which gets its name in `finish`.

    Use it as a context manager: if the block raises, the partial folder is removed.

    Args:
        path: folder of the finished table.
        task: kind of the records.

    Raises:
        ValueError: something is at `path`.
    """

    def __init__(self, path: str | Path, task: str) -> None:
        self.path, self.task = Path(path), task
        if self.path.exists():
            raise ValueError(f"{self.path} exists; delete it or give another folder (--out)")
        self.partial = self.path.with_name(self.path.name + ".partial")
        remove_folder(self.partial)
        self.partial.mkdir(parents=True)
        self._sink = pa.OSFile(str(self.partial / ROWS), "wb")
        self._writer = _BatchWriter(self._sink, task)

    @property
    def rows(self) -> int:
        """Records so far."""
        return self._writer.rows

    def add(self, record: AnyRecord) -> None:
        """Append a record."""
        self._writer.add(record)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Write the last rows and the description, flush all and give the folder its name."""
        self._writer.close()
        self._sink.close()
        for file in self.partial.iterdir():
            flush(file)
        with (self.partial / ROWS).open("rb") as rows:
            digest = hashlib.file_digest(rows, "sha256").hexdigest()
        values = {
            "format": FORMAT,
            "task": self.task,
            "rows": self.rows,
            "bytes": (self.partial / ROWS).stat().st_size,
            "sha256": digest,
            **description,
        }
        replace_file(self.partial / DESCRIPTION, write_json(values))
        flush(self.partial)
        self.partial.rename(self.path)
        flush(self.path.parent)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sink.close()
        remove_folder(self.partial)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
