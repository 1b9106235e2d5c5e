"""Reads text files line by line, compressed by gzip (.gz) or not.

What cannot be decoded is refused with its line and the remedy.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

DEFAULT_ENCODING = "utf-8"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, encoding: str = DEFAULT_ENCODING) -> str:
    """A whole file, without its byte order mark and with `\\n` at the end of lines.

    Raises:
        ValueError: not of this encoding; names the file, the line and the remedy.
    """
    return "".join(text_lines(path, encoding)).replace("\r\n", "\n")


def text_lines(path: Path, encoding: str = DEFAULT_ENCODING) -> Iterator[str]:
    """The lines of a file with their ends as they are, without a byte order mark.

    Lines end with `\\n` or `\\r\\n`. They are what `csv.reader` takes.

    Raises:
        ValueError: an unknown encoding, or a file of another one; names the file, the line and
            the remedy.
    """
    codec = _codec(encoding)
    try:
        yield from _lines(path, encoding, codec)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: not a whole gzip file ({error}); fetch or compress it again"
        ) from None


def text_size(path: Path) -> int:
    """Bytes of a text file; of a compressed one those of the text, up to multiples of 4 GiB."""
    size = path.stat().st_size
    if not _is_gzip(path) or size < 4:
        return size
    with path.open("rb") as file:
        file.seek(-4, 2)
        return max(size, int.from_bytes(file.read(4), "little"))


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if _is_gzip(path) else path.open("rb"))


def _lines(path: Path, encoding: str, codec: str) -> Iterator[str]:
    with _open(path) as file:
        start = file.read(2)
    if codec in ("utf-8", "utf-8-sig") and start in _UTF16:
        raise ValueError(f"{path}, line 1: starts with the mark of UTF-16: state encoding utf-16")
    if codec.startswith(("utf-16", "utf-32")):
        yield from _wide_lines(path, encoding)
        return
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode(codec)
            except UnicodeDecodeError as error:
                remedy = "save the file as UTF-8, or state its encoding (such as latin-1)"
                raise ValueError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} at column "
                    f"{error.start + 1} is not {encoding}; {remedy}"
                ) from None


def _codec(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ValueError(
            f"encoding {encoding!r}: not one that Python knows; give utf-8, utf-16, latin-1, cp1252"
        ) from None


def _wide_lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines of an encoding whose characters take two or four bytes."""
    number = 0
    try:
        with io.TextIOWrapper(_open(path), encoding, newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise ValueError(
            f"{path}, after line {number}: not {encoding} ({error}); state the file's encoding"
        ) from None
