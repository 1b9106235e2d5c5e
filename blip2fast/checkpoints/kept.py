"""Which checkpoints of a run are kept: the newest, some for good, and the best."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2fast.checkpoints.files import checkpoints_in, step_of
from blip2fast.data.manifest import replace_file, write_json

BEST = "best.json"


@dataclass(frozen=True)
class Kept:
    """Which checkpoints to keep, besides the best.

    Attributes:
        last: number of newest ones.
        every: also those whose step is a multiple; 0: none.
    """

    last: int
    every: int = 0


def read_best(folder: Path) -> dict[str, Any] | None:
    """The step, metric and value of the best checkpoint in `folder`; None if it has none."""
    try:
        best: dict[str, Any] = json.loads((folder / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if (folder / f"step-{best['step']:08d}").is_dir() else None


def write_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Note that the checkpoint of `step` is the best."""
    values = {"step": step, "checkpoint": f"step-{step:08d}", "metric": metric, "value": value}
    replace_file(folder / BEST, write_json(values))


def remove_others(folder: Path, kept: Kept) -> None:
    """Delete the checkpoints in `folder` that are not to be kept, and unfinished ones."""
    best = read_best(folder)
    for path in sorted(checkpoints_in(folder), key=step_of)[: -kept.last]:
        step = step_of(path)
        if (kept.every and step % kept.every == 0) or (best is not None and step == best["step"]):
            continue
        # Rename first: a kill during deletion must not leave half a checkpoint under this name.
        remove(path.rename(path.with_name(path.name + ".old.partial")))
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Delete partial checkpoints that killed runs left behind."""
    for path in folder.glob("*.partial"):
        remove(path)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
