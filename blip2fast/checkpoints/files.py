"""Finds the checkpoints of a run on disk and reads their files, verified by the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip2fast.data import manifest
from blip2fast.data.manifest import MANIFEST, DamagedError

MODEL, DESCRIPTION = "model.safetensors", "model.json"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`; partial ones are ignored."""
    return max(checkpoints_in(folder), key=step_of, default=None)


def find_file(folder: Path, name: str) -> Path:
    """The path of a file of a trained model or checkpoint, verified against its manifest.

    Raises:
        ValueError: the file is damaged (the message says what to use instead), or not found.
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


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder."""
    return [path for path in folder.glob("step-*") if path.name[5:].isdigit()]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[5:])


def _remedy(damaged: Path) -> str:
    """What to use instead of a damaged model or checkpoint."""
    inside = damaged.name.startswith("step-") and damaged.name[5:].isdigit()
    others = checkpoints_in(damaged.parent if inside else damaged / "checkpoints")
    for path in sorted(others, key=step_of, reverse=True):
        if (inside and step_of(path) >= step_of(damaged)) or not _is_whole(path):
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


def read_json(folder: Path, name: str) -> Any:
    """Read a JSON file of a trained model or checkpoint, verified against its manifest."""
    return json.loads(find_file(folder, name).read_text(encoding="utf-8"))


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Load the tensors of a file, verified against its manifest, on the CPU."""
    path = find_file(folder, name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors requires."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
