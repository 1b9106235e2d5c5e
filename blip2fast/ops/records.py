"""Records of kernel checks, and the JSON files that hold them: one per user, and one that ships.

A record is for an op, a backend and a kind of call, on one card, with one set of versions and one
hash of the kernel's code. If any of these differs, the record is not valid.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from blip2fast import __version__
from blip2fast._extension import compiled_code

# incremented when the rules of a check change: this invalidates older records
RULES = 1
FILE_NAME = "kernel_records.json"
SHIPPED = Path(__file__).with_name("proven_kernels.json")
KERNELS = Path(__file__).parents[1] / "kernels"
# limit on the number of records in the user's file; the oldest are dropped first
MOST_RECORDS = 1000


@dataclass(frozen=True)
class Key:
    """The key of a record. All fields are strings; `""` means none.

    Attributes:
        op, backend, kind: Which kernels, and for which kind of call.
        code: Hash of the kernel's code.
        card, capability, driver: The GPU's name, its compute capability, the driver's version.
        torch, cuda, triton, package: Versions; `cuda` is what PyTorch was built with.
        rules: `RULES`.
    """

    op: str
    backend: str
    kind: str
    code: str
    card: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    package: str
    rules: int = RULES

    def relaxed(self) -> Key:
        """The reduced key that shipped records are matched by.

        The kernel's code, the card and Triton's version (the compiler, without the patch number)
        determine what runs; the driver only loads it. PyTorch is the rival: its kernels change in
        minor releases, not in patch releases. The code hash stands for the package's version.
        """
        return Key(
            op=self.op,
            backend=self.backend,
            kind=self.kind,
            code=self.code,
            card=self.card,
            capability=self.capability,
            driver="",
            torch=_minor(self.torch),
            cuda="",
            triton=_minor(self.triton),
            package="",
            rules=self.rules,
        )


@dataclass(frozen=True)
class Record:
    """The result of one check.

    Attributes:
        key: What was checked, and where.
        fault: Why the kernels are skipped; empty: they are correct and faster.
        settled: Whether the result is about the kernels. Others (the check ran out of memory, for
            example) are never written to disk.
        rival: The backend that `auto` would choose instead.
        ours_us, rival_us: Median time of forward plus backward, microseconds; 0: not timed.
        seconds: Duration of the check, including compilation.
    """

    key: Key
    fault: str = ""
    settled: bool = True
    rival: str = ""
    ours_us: float = 0.0
    rival_us: float = 0.0
    seconds: float = 0.0

    @property
    def reason(self) -> str:
        """Why `auto` skips the kernels; empty if it uses them."""
        if not self.fault:
            return ""
        verdict = "its kernels were checked" if self.settled else "its kernels could not be checked"
        return f"{verdict} on {self.key.card}: {self.fault}"

    def __str__(self) -> str:
        head = f"{self.key.op} by {self.key.backend} ({self.key.kind})"
        times = ""
        if self.ours_us:
            times = f", {self.ours_us:.0f} us against {self.rival_us:.0f} of {self.rival}"
        if self.fault:
            return f"{head}: {self.reason}"
        return f"{head}: right on {self.key.card}{times}"


def as_json(record: Record) -> dict[str, Any]:
    """A record as one flat JSON object."""
    values = asdict(record)
    return {**values.pop("key"), **values}


def from_json(values: Mapping[str, Any]) -> Record:
    """The record that `as_json` wrote.

    Raises:
        TypeError: a field is missing or unknown.
    """
    names = {field.name for field in fields(Key)}
    key = Key(**{name: value for name, value in values.items() if name in names})
    return Record(key, **{name: value for name, value in values.items() if name not in names})


def cache_folder() -> Path:
    """The folder of this user's records: `blip2fast` in the platform's cache folder."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "blip2fast"


@dataclass(frozen=True)
class Machine:
    """Card and versions, as in `Key`."""

    card: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    package: str


@cache
def machine(device: str) -> Machine:
    """Card and versions of a device, `cuda:0` and so on; `cpu` is for Triton's interpreter."""
    card, capability, driver = "the CPU", "", ""
    place = torch.device(device)
    if place.type == "cuda":
        card, driver = torch.cuda.get_device_name(place), _driver()
        capability = ".".join(map(str, torch.cuda.get_device_capability(place)))
    versions = (torch.__version__, torch.version.cuda or torch.version.hip or "", _triton_version())
    return Machine(card, capability, driver, *versions, __version__)


# ops that share a folder, and what the names of their classes in its tuned.json begin with
_TUNED_OF = {"qformer_attention": "self_", "qformer_cross_attention": "cross_"}


@cache
def code_hash(op: str, folder: str, backend: str) -> str:
    """Hash of a backend's code: `kernels/<folder>`, and what was compiled for `cuda`.

    What is tuned for the op is included, because it chooses what runs. For `cuda`, the Triton
    kernels are included because they may be its rival.
    """
    digest = hashlib.sha256()
    for file in (*sorted(KERNELS.glob("*.py")), *sorted((KERNELS / folder).glob("*.py"))):
        digest.update(f"{file.parent.name}/{file.name}\n".encode())
        digest.update(file.read_bytes())
    for file in (KERNELS / folder).glob("tuned.json"):
        start = _TUNED_OF.get(op, "")
        tuned = {
            capability: {name: entry for name, entry in classes.items() if name.startswith(start)}
            for capability, classes in json.loads(file.read_text(encoding="utf-8")).items()
        }
        digest.update(json.dumps(tuned, sort_keys=True).encode())
    if backend == "cuda":
        digest.update(compiled_code().encode())
    return digest.hexdigest()[:16]


class RecordFile:
    """The records of one user, in one folder. If they cannot be written, they stay in memory.

    Args:
        folder: Folder of `kernel_records.json`; created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._warned = False

    def read(self) -> dict[Key, Record]:
        """All records; none if there is no file, or, with a warning, if it is not ours."""
        return {record.key: record for record in read_records(self.path, self._warn)}

    def add(self, records: Iterable[Record]) -> None:
        """Add records to the file; call this within `locked`."""
        kept = [record for record in records if record.settled]
        if not kept:
            return
        everything = self.read() | {record.key: record for record in kept}
        try:
            write_records(self.path, list(everything.values())[-MOST_RECORDS:])
        except OSError as error:
            self._warn(f"{self.path}: cannot be written ({error}); {_IN_MEMORY}")

    @contextmanager
    def locked(self, wait_s: float) -> Iterator[bool]:
        """Hold an exclusive lock on the file, across processes, for the `with` block.

        Yields:
            True if the lock is held or cannot be taken (a read-only folder): the caller proceeds.
            False if another process held it for `wait_s`.
        """
        import filelock

        lock = filelock.FileLock(self.path.with_suffix(".lock"), timeout=wait_s)
        held = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            held = False
        except (OSError, NotImplementedError) as error:
            self._warn(f"{self.path.parent}: cannot be locked ({error}); {_IN_MEMORY}")
        try:
            yield held
        finally:
            lock.release()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, RuntimeWarning, stacklevel=2)


_IN_MEMORY = (
    "what checks of kernels find is kept for this process only: set XDG_CACHE_HOME to a folder "
    "that can be written"
)


def read_records(path: Path, complain: Any = warnings.warn) -> list[Record]:
    """The records of a file, oldest first; none if it is missing or unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        complain(f"{path}: cannot be read ({error}); {_IN_MEMORY}")
        return []
    try:
        return [from_json(values) for values in json.loads(text)["records"]]
    except (ValueError, KeyError, TypeError) as error:
        complain(f"{path}: not a file of kernel records ({error!r}); it counts as empty")
        return []


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a file atomically: a reader sees either the old records or the new ones."""
    lines = ",\n".join(json.dumps(as_json(record)) for record in records)
    # of this process alone, and with the permissions of its umask
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(f'{{"records": [\n{lines}\n]}}\n', encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def shipped_records(path: Path = SHIPPED) -> dict[Key, Record]:
    """Records of real cards that come with the package, by `Key.relaxed`."""
    return {record.key.relaxed(): record for record in read_records(path)}


def _triton_version() -> str:
    """Triton's version from package metadata: importing it takes a second."""
    for package in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def _minor(text: str) -> str:
    return ".".join(text.split("+")[0].split(".")[:2])


def _driver() -> str:
    """The NVIDIA driver's version, or else the CUDA version that it supports."""
    try:
        found = re.search(
            r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text()
        )
    except OSError:
        found = None
    offers = getattr(torch._C, "_cuda_getDriverVersion", None)
    return found[1] if found else "" if offers is None else f"CUDA {offers()}"
