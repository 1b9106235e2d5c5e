"""Files of results that grow one by one, and from which an interrupted command goes on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from blip2fast.data.manifest import aside, naming

Result = Mapping[str, Any]


class ResultFile:
    """Results in JSON lines, or a CSV, each written through as it comes.

    A line that a killed command left half-written is removed when it goes on.

    Args:
        path: `.jsonl` or `.csv`.
        columns: of a CSV.
        resume: go on with a file that is there, otherwise it is refused.

    Attributes:
        done: results that were there, in order; those of a CSV are texts.

    Raises:
        ValueError: another suffix, a file that is there, or one that is not such a file.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], resume: bool = False) -> None:
        self.path, self._columns = Path(path), list(columns)
        self._csv = self.path.suffix.lower() == ".csv"
        check_result_path(self.path, resume)
        self.done: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.done = self._recover()
        self._file = self.path.open("a", encoding="utf-8", newline="")
        if self._csv and not self._file.tell():
            self._put(_csv_lines([self._columns]))

    def add(self, *results: Result) -> None:
        """Append results, in one write."""
        if self._csv:
            rows = [[result.get(name, "") for name in self._columns] for result in results]
            self._put(_csv_lines(rows))
        else:
            lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            self._put("".join(lines))

    def _put(self, lines: str) -> None:
        with naming(self.path):
            self._file.write(lines)
            self._file.flush()

    def _recover(self) -> list[dict[str, Any]]:
        """Read what is there, up to the last whole line; the rest is cut off."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            text = whole.decode("utf-8")
            if self._csv:
                rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
                found: list[dict[str, Any]] = list(rows)
                if whole and list(rows.fieldnames or ()) != self._columns:
                    raise ValueError(f"its columns are {rows.fieldnames}, not {self._columns}")
            else:
                found = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(each, dict) for each in found):
                raise ValueError("a line is not an object")
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{self.path} was not written by this command ({error}); give another file"
            ) from None
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return found

    def close(self) -> None:
        """Flush to the disk."""
        if not self._file.closed:
            with naming(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


def check_result_path(path: Path, resume: bool) -> None:
    """Refuse an output file before anything heavy is loaded.

    Raises:
        ValueError: neither `.jsonl` nor `.csv`, there already without `resume`, or a folder that
            cannot be written to.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: results are written to a .jsonl or a .csv; give such a name")
    if path.exists() and not resume:
        raise ValueError(f"{path} exists; go on with it by --resume, or give another file")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ValueError: a folder, a folder above that is a file, or no permission.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    above = path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a folder")
    target = path if path.exists() else above
    if not os.access(target, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission for {target}")


def write_text(path: Path, text: str) -> None:
    """Write a small text file; it is there as a whole or not at all."""
    with naming(path):
        aside(path).write_text(text, encoding="utf-8")
        aside(path).replace(path)
