"""The checkpoints of a run on disk: which there are, and files that are as they were written."""

from __future__ import annotations

import shutil
from pathlib import Path

from blip2fast.data import manifest
from blip2fast.data.manifest import MANIFEST, DamagedError

MODEL, DESCRIPTION = "model.safetensors", "model.json"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; half-written ones do not count."""
    return max(_checkpoints(folder), key=_step_of, default=None)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed runs left half-written, or half-deleted, among the checkpoints."""
    for path in folder.glob("*.partial"):
        shutil.rmtree(path)


def keep_newest(folder: Path, count: int) -> None:
    """Delete the checkpoints in `folder` but the `count` of the highest steps."""
    for path in sorted(_checkpoints(folder), key=_step_of)[:-count]:
        # Renamed first: a kill while deleting must not leave half a checkpoint under its name.
        shutil.rmtree(path.rename(path.with_name(path.name + ".old.partial")))
    remove_unfinished(folder)


def find_file(folder: Path, name: str) -> Path:
    """A file of a trained model or checkpoint, if it is as it was written.

    Raises:
        ValueError: it is not, with what to use instead; or nothing is there.
    """
    if not (folder / MANIFEST).is_file() and any((folder / n).is_file() for n in (name, MODEL)):
        raise ValueError(
            f"{folder} has no {MANIFEST}: it was written by an earlier version, whose files cannot "
            f"be checked, or copied without it. {_remedy(folder)}"
        )
    try:
        return manifest.find(folder, name)
    except DamagedError as error:
        raise ValueError(f"{error}. {_remedy(folder)}") from error


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.name[5:].isdigit()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _remedy(damaged: Path) -> str:
    """What to use instead of a damaged model or checkpoint."""
    inside = damaged.name.startswith("step-") and damaged.name[5:].isdigit()
    others = _checkpoints(damaged.parent if inside else damaged / "checkpoints")
    for path in sorted(others, key=_step_of, reverse=True):
        if (inside and _step_of(path) >= _step_of(damaged)) or not _is_whole(path):
            continue
        if inside:
            return f"The checkpoint before it is whole: delete {damaged} to resume from {path}"
        return f"The checkpoint {path} is whole: use it, or resume the run, which writes it again"
    if inside:
        return f"There is no whole checkpoint before it: delete {damaged} and start again"
    return "Put back a copy, or train again"


def _is_whole(folder: Path) -> bool:
    try:
        manifest.check(folder)
    except ValueError:
        return False
    return True
