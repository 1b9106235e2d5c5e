"""Atomic writes of files and folders, and a manifest that detects corruption.

`manifest.json` states the size and SHA-256 of every file in its folder. There are two kinds of
folders:

* Written once (a checkpoint): filled as `<name>.partial`, sealed, then renamed.
* Updated in place (a run's output): a new set of files replaces the old one. Each new file is
  written as `<file>.partial`, then the manifest is replaced, then the files are renamed. Replacing
  the manifest commits the update: wherever the writer is killed, a reader finds the complete old
  set before that point and the complete new set after it.

Every file is fsynced before its rename, and the folder after it. The hashes detect truncated,
corrupted or swapped files. They are not signatures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FORMAT = 2

Write = Callable[[Path], Any]


class DamagedError(ValueError):
    """A file does not match its folder's manifest."""


@dataclass(frozen=True)
class Entry:
    """Size and hash of a file, as the manifest states them."""

    bytes: int
    sha256: str


def flush(path: Path) -> None:
    """fsync a file, or a folder's directory entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors of writing to it; the system's do not once a file is open."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_through(path: Path, write: Write) -> None:
    """Write the file `path` with `write`, with the permissions of the umask, then fsync it.

    Raises:
        OSError: it cannot be written, whatever the writer raises for that.
    """
    try:
        with naming(path):
            write(path)
    except (SafetensorError, RuntimeError) as error:  # of save_file and torch.save
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise OSError(f"{path} cannot be written ({reason})") from error
    # safetensors writes through a temporary file that only its owner may read
    path.chmod(0o666 & ~_umask())
    flush(path)


def _umask() -> int:
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    return mask


def replace_file(path: Path, write: Write) -> None:
    """Replace a file atomically: after a crash it is the old or the new one."""
    write_through(aside(path), write)
    aside(path).replace(path)
    flush(path.parent)


def write_json(value: Any) -> Write:
    """Returns a function that writes `value` as JSON, for `write_through` and `replace_file`."""
    text = json.dumps(value, indent=1) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def aside(path: Path) -> Path:
    """The temporary path of a file or folder while it is being written."""
    return path.with_name(path.name + ".partial")


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of the files `names` in `folder`; they must already be flushed."""
    entries = {name: _measure(folder / name) for name in sorted(names)}
    _write_manifest(folder, entries)


def rename_folder(folder: Path, name: Path) -> None:
    """Rename a sealed folder to its final name, durably."""
    folder.rename(name)
    flush(name.parent)


def replace_files(folder: Path, writes: Mapping[str, Write]) -> None:
    """Replace all files of a folder's manifest atomically.

    Args:
        folder: created if it does not exist; other files in it are left alone.
        writes: file name -> function that writes the file at a given path. Files are renamed in
            this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ValueError):  # no manifest, or an unreadable one
        # after a killed update, files of the committed manifest may still have temporary names
        _rename_all(folder, read_manifest(folder))
    entries = {}
    for name, write in writes.items():
        write_through(aside(folder / name), write)
        entries[name] = _measure(aside(folder / name))
    flush(folder)
    _write_manifest(folder, entries)
    _rename_all(folder, entries)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The file entries of a folder's manifest.

    Raises:
        ValueError: no manifest, or not one of this format.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] == FORMAT:
            outside = [name for name in values["files"] if Path(name).name != name]
            if outside:
                raise DamagedError(f"{path} names {outside[0]!r}, which is outside its folder")
            return {name: Entry(**entry) for name, entry in values["files"].items()}
        fault = f"is of format {values['format']!r}, but this version reads format {FORMAT}"
    except FileNotFoundError:
        raise ValueError(f"no trained model at {folder}: {MANIFEST} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{path} is cut short or damaged ({error})") from error
    except (KeyError, TypeError, AttributeError):
        fault = "is not the manifest of a trained model or checkpoint"
    raise ValueError(f"{path} {fault}")


def find(folder: Path, name: str) -> Path:
    """The path of file `name` in a folder, verified against the manifest.

    Raises:
        ValueError: no manifest.
        DamagedError: the file is missing, or its size or hash differs; both values are named.
    """
    entry = read_manifest(folder).get(name)
    if entry is None:
        raise DamagedError(f"{folder / name} is not among the files of {folder / MANIFEST}")
    faults = []
    for path in (folder / name, aside(folder / name)):
        fault = _fault(path, entry)
        if fault is None:
            return path
        faults.append(fault)
    raise DamagedError(f"{folder / name} {faults[0]}")


def check(folder: Path) -> None:
    """Verify every file of a folder against the manifest.

    Raises:
        ValueError, DamagedError: as in `find`.
    """
    for name in read_manifest(folder):
        find(folder, name)


def _rename_all(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Rename files from their temporary paths, in the order of `entries`."""
    for name, entry in entries.items():
        path = folder / name
        if _fault(aside(path), entry) is None:
            aside(path).replace(path)
    flush(folder)


def _write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    files = {name: asdict(entry) for name, entry in entries.items()}
    replace_file(folder / MANIFEST, write_json({"format": FORMAT, "files": files}))


def _measure(path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Entry(path.stat().st_size, digest.hexdigest())


def _fault(path: Path, entry: Entry) -> str | None:
    if not path.is_file():
        return f"is missing; the manifest states {entry.bytes} bytes"
    size = path.stat().st_size
    if size != entry.bytes:
        return (
            f"has {size} bytes, but the manifest states {entry.bytes}: it is cut short or mixed up"
        )
    found = _measure(path)
    if found != entry:
        return (
            f"has the SHA-256 {found.sha256[:16]}..., but the manifest states "
            f"{entry.sha256[:16]}...: it was damaged or changed"
        )
    return None
