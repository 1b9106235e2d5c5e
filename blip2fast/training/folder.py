"""The output folder of a run: one run at a time, and what an earlier run left in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from blip2fast.checkpoints.files import DESCRIPTION, MODEL
from blip2fast.checkpoints.kept import remove
from blip2fast.data.manifest import MANIFEST, naming
from blip2fast.training.agreement import SharedFault, together
from blip2fast.training.config import RunConfig
from blip2fast.training.restart import HISTORY
from blip2fast.training.skipped import SKIPPED

LOCK = "run.lock"
# in which a new file is seen on other machines; NFS remembers for some seconds what is not there
_SHARED_SECONDS = 10.0
# `resume` continues from these; others are written again.
EARLIER = ("checkpoints", "metrics.jsonl")
_OF_A_RUN = (
    *(*EARLIER, HISTORY, SKIPPED, "tensorboard", "wandb", "report.html"),
    *("config.yaml", "deepspeed.json"),
    *(DESCRIPTION, MODEL, MANIFEST),
)


class FolderLock:
    """A lock on an output folder, which the system releases when the process ends, however it does.

    The file `run.lock` says who holds it. A file that a killed process left is taken over. It is a
    POSIX record lock, which child processes do not inherit and which holds across machines on NFS.
    The holder must not open the file again: closing it there would release the lock.

    Args:
        folder: created if it does not exist.
        say: prints a line if the file system has no locks.

    Attributes:
        path: of the file.
        text: what the file says.

    Raises:
        ValueError: another process holds the lock; it is named.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / LOCK
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(self._in_use()) from None
                say(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
                break
            # a run that has just ended may have removed the file in between
            if self._is_current():
                break
            self._file.close()
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        self.text = json.dumps(holder) + "\n"
        with naming(self.path):
            self._file.truncate(0)
            self._file.write(self.text)
            self._file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _in_use(self) -> str:
        self._file.seek(0)
        text = self._file.read()
        self._file.close()
        return _in_use(self.path.parent, text)


def _in_use(folder: Path, text: str) -> str:
    """That a run is in `folder`; `text` is that of its lock."""
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"output_dir {str(folder)!r} is in use by {who}: wait until that run has ended, or choose "
        "another folder"
    )


def _in_use_now(folder: Path) -> str | None:
    """`_in_use` if another process holds the lock of `folder`; nothing is locked or created."""
    with suppress(OSError), (folder / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return _in_use(folder, file.read())
    return None


def lock_together(
    config: RunConfig, say: Callable[[str], None]
) -> AbstractContextManager[FolderLock | None]:
    """Lock the output folder on rank 0; every process must call this.

    Raises:
        ValueError: another run is in it, or has been since `check_machine`; or a machine has
            another folder under this name.
    """
    faults: list[str | None] = [None]
    lock: AbstractContextManager[FolderLock | None] = nullcontext()
    text = None
    if dist.get_rank() == 0:
        folder = Path(config.output_dir)
        try:
            lock = held = FolderLock(folder, say)
            text = held.text
            faults[0] = "; ".join(folder_faults(folder, config.resume, config.overwrite)) or None
        except (ValueError, OSError) as error:
            faults[0] = str(error)
    dist.broadcast_object_list(faults)
    try:
        if faults[0] is not None:
            raise SharedFault(faults[0])
        _check_shared(Path(config.output_dir), text)
    except ValueError:
        with lock:
            raise
    return lock


def _check_shared(folder: Path, text: str | None) -> None:
    """Check that all processes see the lock of rank 0; every process must call this.

    Args:
        folder: the output folder.
        text: on rank 0, what its lock says.
    """
    found = [text, socket.gethostname()]
    dist.broadcast_object_list(found)

    def see() -> None:
        end = time.monotonic() + _SHARED_SECONDS
        while text is None and _lock_text(folder) != found[0]:
            if time.monotonic() > end:
                raise ValueError(
                    f"output_dir {str(folder)!r} is another folder than on {found[1]}: every "
                    "process writes its part of a checkpoint, so put it on a file system that all "
                    "machines share"
                )
            with suppress(OSError):
                list(folder.iterdir())  # makes NFS look again
            time.sleep(0.1)

    together(see)


def _lock_text(folder: Path) -> str | None:
    try:
        return (folder / LOCK).read_text(encoding="utf-8")
    except OSError:
        return None


def remove_earlier_run(folder: Path) -> None:
    """Delete what a run writes into its output folder; other files stay."""
    for name in _OF_A_RUN:
        remove(folder / name)


def folder_faults(folder: Path, resume: bool, overwrite: bool) -> list[str]:
    """Why a run cannot write into `folder`, one line each."""
    name = f"output_dir {str(folder)!r}"
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return [f"{name}: {error.strerror}"]
    except ValueError as error:
        return [f"{name}: {error}"]
    if folder.is_symlink() and not folder.exists():
        return [f"{name} is a link to {str(folder.readlink())!r}, which does not exist"]
    if folder.exists() and not folder.is_dir():
        return [f"{name} is a file"]
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        return [f"{name}: {str(above)!r} is a file"]
    if not os.access(above, os.W_OK | os.X_OK):
        return [f"{name}: {str(above)!r} cannot be written to; choose another folder"]
    done = [each for each in EARLIER if (folder / each).exists()]
    if done and not (resume or overwrite):
        earlier = (
            f"{name} holds an earlier run ({', '.join(done)}): set resume: true to continue it, "
            "overwrite: true to delete it, or choose another folder"
        )
        return [_in_use_now(folder) or earlier]
    return []
