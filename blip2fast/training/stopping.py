"""Stops a run on SIGINT, SIGTERM or SIGUSR1, or when its launcher has ended.

The step in progress is finished and a checkpoint is saved. Where that takes longer than
`STOP_SECONDS`, the process exits without: the checkpoint before it is what the run resumes from.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from blip2fast._imports import needs

with needs("train", "psutil"):
    import psutil  # type: ignore[import-untyped]

# Slurm sends SIGUSR1 ahead of its time limit if asked to (`sbatch --signal=USR1@120`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# From the signal until the process has ended: a step, and writing a checkpoint.
STOP_SECONDS = 120.0
# From the signal until an evaluation is given up for the checkpoint; launchers kill after 30 s.
PATIENCE_SECONDS = 15.0
_POLL_SECONDS = 0.5


class RunStopped(Exception):
    """A run was stopped by a signal and has saved a checkpoint.

    Attributes:
        exit_code: 128 + the number of the signal, as shells report it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Notes signals that ask this process to stop, within a `with` block.

    A thread watches beside the training loop, as the interpreter does not run its handlers while it
    waits in a collective. In a thread other than the main one, signals keep their handlers.

    Attributes:
        reason: what asked this process to stop; None: nothing.
        exit_code: that of a process stopped so.
    """

    def __init__(self, seconds: float = STOP_SECONDS) -> None:
        self.reason: str | None = None
        self.exit_code = 128 + signal.SIGTERM
        self._seconds, self._since = seconds, 0.0
        self._launcher = _Launcher()
        self._ended = threading.Event()
        self._kept: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._kept[number] = signal.signal(number, self._handle)
            self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._kept:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._kept.items():
                signal.signal(number, handler)
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def presses(self) -> bool:
        """Whether a stop was asked for so long ago that an evaluation has to wait for a resume."""
        return self.reason is not None and time.monotonic() - self._since > PATIENCE_SECONDS

    def stopped(self, step: int, max_steps: int) -> RunStopped:
        """The error of a run that has saved a checkpoint after `step` steps."""
        return RunStopped(
            f"stopped by {self._told()} after step {step} of {max_steps}; saved. To go on, run the "
            "same command with --set resume=true",
            self.exit_code,
        )

    def complete(self) -> RunStopped:
        """The error of a run that was asked to stop after its last step, and is complete."""
        return RunStopped(f"the run is complete; stopped by {self._told()}", self.exit_code)

    def _told(self) -> str:
        return self.reason or "a signal to another process"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._request(signal.Signals(number).name, 128 + number)

    def _request(self, reason: str, exit_code: int) -> None:
        if self.reason is None:
            self._since = time.monotonic()
            self.exit_code, self.reason = exit_code, reason

    def _watch(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._read], [], [], _POLL_SECONDS)
            for number in os.read(self._read, 64) if ready else b"":
                if number in SIGNALS:
                    self._request(signal.Signals(number).name, 128 + number)
            if self._launcher.has_ended():
                self._request("the end of its launcher", 128 + signal.SIGTERM)
            if self.reason is not None and time.monotonic() - self._since > self._seconds:
                sys.stderr.write(
                    f"error: not stopped within {self._seconds:.0f} s of {self.reason}: exiting "
                    "without a checkpoint; resume: true goes on from the last one\n"
                )
                sys.stderr.flush()
                os._exit(self.exit_code)


def ignore_signals(_: int = 0) -> None:
    """Leave these signals to the training process; for a DataLoader's workers.

    Ctrl-C, Slurm and DeepSpeed's launcher send them to workers as well. A worker ends when the
    training process does.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Launcher:
    """The processes of `deepspeed` or `torchrun` above this one, if any.

    DeepSpeed's launcher is two processes. Where one is killed, the ranks are not told.
    """

    def __init__(self) -> None:
        self._parents: list[tuple[int, int]] = []
        if "RANK" not in os.environ:
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process()
            while (parent := process.parent()) is not None and _is_launcher(parent):
                self._parents.append((process.pid, parent.pid))
                process = parent

    def has_ended(self) -> bool:
        """Whether one of them has ended; its child then has another parent."""
        try:
            return any(psutil.Process(child).ppid() != parent for child, parent in self._parents)
        except psutil.Error:
            return True


def _is_launcher(process: psutil.Process) -> bool:
    words = process.cmdline()[:4]
    names = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
    return any(Path(word).name in names for word in words)
