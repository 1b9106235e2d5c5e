"""Decides whether kernels are correct and faster on a device, from records or by a check.

Records come from this process, from the package, and from the user's file (`records.py`). Without
a record, the kernels are checked in a worker process (`_check_worker.py`), once per machine: other
processes wait for the lock on the file, then read the result.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from blip2fast.ops.records import (
    RULES,
    Key,
    Record,
    RecordFile,
    cache_folder,
    code_hash,
    machine,
    shipped_records,
)

PACKAGE = Path(__file__).parents[2]
# a check compiles up to a dozen kernels, about a second each, and the machine may be busy
LIMIT_S = 180.0
# to import PyTorch and initialise a device
START_S = 120.0
# another process may be checking all kinds
WAIT_S = 1800.0
_TAIL_CHARACTERS = 300
SLOWER = "slower"
NOT_NOW = (
    "its kernels are not checked yet, and nothing is checked while {busy}: call "
    "blip2fast.ops.check_kernels() before"
)
TRACED = "a program is traced"
WORKER = "blip2fast.ops._check_worker"
# signs in an exception that the kernels are not to blame
_OF_THE_MOMENT = (
    "OutOfMemory",
    "out of memory",
    "MemoryError",
    "ALLOC_FAILED",
    "busy or unavailable",
    "NotCheckable",
    "ImportError",
    "ModuleNotFoundError",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The check that is requested.

    Attributes:
        op, backend: Which kernels.
        kind: Kind of call (`kernel_kinds`).
        device: `cuda:0` and so on, or `cpu` for Triton's interpreter.
        folder: The folder in `kernels/` whose code is hashed.
        source: `module:function` that builds the test problem for a kind and a device.
        rival: The backend that `auto` would choose instead; empty: no race.
    """

    op: str
    backend: str
    kind: str
    device: str
    folder: str
    source: str
    rival: str = ""

    @property
    def key(self) -> Key:
        """The key of its record."""
        return Key(
            op=self.op,
            backend=self.backend,
            kind=self.kind,
            code=code_hash(self.op, self.folder, self.backend),
            **asdict(machine(self.device)),
        )


class Checks:
    """The records available to this process.

    Args:
        folder: Folder of the user's records; by default in the platform's cache folder.
        shipped: Records by `Key.relaxed`; by default those that ship with the package.
        limit_s: Time limit of one check, in seconds.
        wait_s: Most seconds to wait for a check in another process.
        environment: Extra environment variables of the worker process.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        shipped: Mapping[Key, Record] | None = None,
        limit_s: float = LIMIT_S,
        wait_s: float = WAIT_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.file = RecordFile(cache_folder() if folder is None else folder)
        self.known: dict[Key, Record] = {}
        self.limit_s, self.wait_s = limit_s, wait_s
        self.environment = dict(environment or {})
        self._shipped = shipped
        self._read = False
        self._said: set[Key] = set()
        self._lock = threading.RLock()

    def find(self, requests: Sequence[Request]) -> list[Record | None]:
        """The existing record of each request, or None; runs no check."""
        with self._lock:
            if not self._read:
                self._read = True
                self.known = self.file.read() | self.known
                if self._shipped is None:
                    self._shipped = shipped_records()
            return [self._find(request.key) for request in requests]

    def of_machine(self, device: str, codes: Collection[str]) -> list[Record]:
        """The records that are valid on a device, for code with these hashes."""
        with self._lock:
            self.find([])
            here = machine(device)
            found = [
                record
                for record in self.known.values()
                if record.key.code in codes
                and replace(record.key, **asdict(here), rules=RULES) == record.key
            ]
            there = {record.key.relaxed() for record in found}
            shipped = self._shipped or {}
            return found + [
                record
                for key, record in shipped.items()
                if key.code in codes
                and key not in there
                and replace(key, **asdict(here)).relaxed() == key
            ]

    def _find(self, key: Key) -> Record | None:
        found = self.known.get(key)
        return (self._shipped or {}).get(key.relaxed()) if found is None else found

    def settle(
        self,
        requests: Sequence[Request],
        again: bool = False,
        jobs: int = 1,
        tell: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        """The records of all requests; those without one are checked first.

        Args:
            requests: On devices of this process.
            again: Check all requests, even those that have a record.
            jobs: Parallel compile processes; the checks themselves run one at a time afterwards.
            tell: Called with each new record as soon as it is made.
        """
        with self._lock:
            found = self.find(requests)
            missing = [r for r, f in zip(requests, found, strict=True) if again or f is None]
            if missing:
                for record in self._check_alone(list(dict.fromkeys(missing)), again, jobs):
                    if tell is not None:
                        tell(record)
            records = [self._find(request.key) for request in requests]
            settled = [record for record in records if record is not None]
            for request, record in zip(requests, settled, strict=True):
                self.say(request, record)
            return settled

    def _check_alone(self, requests: Sequence[Request], again: bool, jobs: int) -> Iterator[Record]:
        with self.file.locked(self.wait_s) as held:
            if not held:
                fault = f"another process has held {self.file.path.name} for {self.wait_s:.0f} s"
                for request in requests:
                    self.known[request.key] = Record(request.key, fault, settled=False)
                return
            # another process may have added records in the meantime
            self.known |= self.file.read()
            left = [r for r in requests if again or self._find(r.key) is None]
            _log.info("checking %d kinds of kernels", len(left))
            # CUDA kernels were compiled at install time
            compiled_here = [request for request in left if request.backend != "cuda"]
            if jobs > 1 and len(compiled_here) > 1:
                self._compile(compiled_here, jobs)
            for record in self._run(left):
                self.known[record.key] = record
                # write each record immediately: it survives if this process is killed
                self.file.add([record])
                yield record

    def _compile(self, requests: Sequence[Request], jobs: int) -> None:
        """Run the kernels in parallel processes, to fill the compiler's cache.

        Failures are ignored here; the checks report them.
        """

        def compile_some(some: Sequence[Request]) -> None:
            with _Worker(some, self.limit_s, self.environment, compile_only=True) as worker:
                while worker.line(START_S + self.limit_s).keys() & {"began", "number"}:
                    pass

        threads = [
            threading.Thread(target=compile_some, args=(requests[job::jobs],))
            for job in range(min(jobs, len(requests)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, requests: Sequence[Request]) -> Iterator[Record]:
        """Check the requests in order; if one ends the worker, a new one runs the rest."""
        for device in {torch.device(request.device) for request in requests}:
            if device.type == "cuda":
                # queued work would slow down one side of the race
                torch.cuda.synchronize(device)
        place = 0
        while place < len(requests):
            with _Worker(requests[place:], self.limit_s, self.environment) as worker:
                while place < len(requests):
                    began = worker.line(START_S)
                    if "began" not in began:
                        fault = f"the check does not start: {_told(began)}"
                        for request in requests[place:]:
                            yield Record(request.key, fault, settled=False)
                        return
                    found = worker.line(self.limit_s)
                    yield _record(requests[place], found)
                    place += 1
                    if "number" not in found:
                        break

    def say(self, request: Request, record: Record) -> None:
        """Log the record, and warn once per process if the kernels are wrong."""
        if request.key in self._said:
            return
        self._said.add(request.key)
        _log.info("%s", record)
        if record.fault and not record.fault.startswith(SLOWER):
            rival = record.rival or request.rival or "another backend"
            warnings.warn(
                f"{request.op}: {request.backend!r} is passed over, {record.reason}; {rival} runs "
                f"instead ({request.kind})",
                RuntimeWarning,
                stacklevel=2,
            )


_checks: Checks | None = None


def checks() -> Checks:
    """The `Checks` of this process, shared by all ops."""
    global _checks
    if _checks is None:
        _checks = Checks()
    return _checks


@contextmanager
def use_checks(other: Checks) -> Iterator[Checks]:
    """Use `other` instead of `checks()` for the duration of a `with` block."""
    global _checks
    before, _checks = _checks, other
    try:
        yield other
    finally:
        _checks = before


def verdict(request: Request, rival: Callable[[], str]) -> tuple[str, bool]:
    """Why `auto` skips the kernels, empty if it uses them; and whether the answer is final.

    Args:
        request: Without a rival.
        rival: Returns the rival's name; called only if a check is needed.
    """
    known = checks()
    (record,) = known.find([request])
    if record is None:
        busy = _busy()
        if busy:
            return NOT_NOW.format(busy=busy), False
        (record,) = known.settle([replace(request, rival=rival())])
    else:
        known.say(request, record)
    return record.reason, True


@torch.compiler.assume_constant_result
def recorded(op: str, backend: str, kind: str, device: str, folder: str, source: str) -> str:
    """`verdict` while tracing: from records alone, a constant of the traced program."""
    known, request = checks(), Request(op, backend, kind, device, folder, source)
    (record,) = known.find([request])
    if record is None:
        return NOT_NOW.format(busy=TRACED)
    known.say(request, record)
    return record.reason


def _busy() -> str:
    """What this process is doing that a check must not interrupt; empty if nothing."""
    traced = torch.compiler.is_compiling() or torch.jit._trace.is_tracing()
    if traced or get_proxy_mode() is not None:
        return TRACED
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return ""


class _Worker:
    """A worker process that runs checks, and the lines that it writes.

    Args:
        requests: The checks, in order.
        limit_s: Time limit of a check, in seconds; the process ends itself a little later.
        environment: Variables added to this process's own.
        compile_only: Run the kernels without examining their results.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        limit_s: float,
        environment: Mapping[str, str],
        compile_only: bool = False,
    ) -> None:
        more = {"limit_s": limit_s, "compile_only": compile_only}
        self._asked = [
            {**asdict(request), "card": request.key.card, **more} for request in requests
        ]
        # import the same modules as this process, whatever its working directory
        paths = [str(PACKAGE), *(path for path in sys.path if path)]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            **environment,
        }
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> _Worker:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            # -P: do not import from the working directory
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
            # a process group, so that its compilers are killed with it
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        with suppress(BrokenPipeError):
            stdin = self._process.stdin
            if stdin is not None:
                stdin.write(json.dumps(self._asked))
                stdin.close()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for file in (self._process.stdout, self._errors):
            if file is not None:
                file.close()

    def line(self, limit_s: float) -> dict[str, Any]:
        """The next line; `hung` (seconds) on a timeout; `ended` (status, last words) on exit."""
        try:
            text = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return {"hung": limit_s}
        if text:
            found: dict[str, Any] = json.loads(text)
            return found
        status = self._process.wait()
        self._errors.seek(0)
        return {"ended": status, "words": self._errors.read().strip()[-_TAIL_CHARACTERS:]}

    def _listen(self) -> None:
        stream = self._process.stdout
        if stream is not None:
            for text in stream:
                self._lines.put(text)
        self._lines.put("")


def _record(request: Request, line: Mapping[str, Any]) -> Record:
    """The record of a check that was started, from its final line."""
    if "number" in line:
        return Record(
            request.key,
            line["fault"],
            rival=request.rival,
            ours_us=line["ours_us"],
            rival_us=line["rival_us"],
            seconds=line["seconds"],
        )
    return Record(request.key, _told(line), _blames_kernels(line), rival=request.rival)


def _told(line: Mapping[str, Any]) -> str:
    """Describe how the process ended."""
    if "hung" in line:
        return f"hung: no result after {line['hung']:.0f} s"
    if "raised" in line:
        return f"raised {line['raised']}: {line['message']}"
    status = line["ended"]
    if status < 0:
        return f"crashed: {signal.Signals(-status).name}"
    return f"ended with status {status}: {line['words'] or 'no message'}"


def _blames_kernels(line: Mapping[str, Any]) -> bool:
    """Whether the kernels are to blame for the outcome, rather than a transient condition."""
    if "raised" in line:
        words = f"{line['raised']} {line['message']}"
        return not any(sign in words for sign in _OF_THE_MOMENT)
    # signals from outside: out of memory, or killed by a user
    return "hung" in line or -line["ended"] not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
