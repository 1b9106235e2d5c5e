"""Checkpoints from which a run resumes as if it had never stopped.

A checkpoint holds a trained model (`blip2fast.checkpoints.trained`) and the state of its run: the
optimizer's moments, and each process's random states and running sums for the log.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from blip2fast.checkpoints.files import (
    OPTIMIZER,
    STATE,
    find_file,
    load_tensors,
    on_cpu,
    read_json,
)
from blip2fast.checkpoints.kept import Kept, remove, remove_others
from blip2fast.checkpoints.trained import (
    Description,
    check_frozen,
    model_files,
    read_description,
    read_parameters,
)
from blip2fast.data import manifest
from blip2fast.data.manifest import write_json, write_through
from blip2fast.frozen.identity import FrozenIdentity, flat


def save_checkpoint(
    folder: Path,
    description: Description,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    process: Mapping[str, Any],
    kept: Kept,
) -> Path:
    """Write `folder/step-<step>`. Every process must call this; rank 0 writes the tensors.

    Args:
        folder: the run's checkpoint folder.
        description, parameters: as for `save_model`.
        moments: AdamW's moments, `exp_avg/<name>` and `exp_avg_sq/<name>`.
        state: stored in `state.json` with the step; `run` holds the run's settings, which are
            compared on resume.
        process: state of this process besides its random states; tensors and plain values.
        kept: which checkpoints to keep; others are deleted.

    Raises:
        ValueError: a checkpoint of this step already exists.
        OSError: it cannot be written; nothing of it is left, and earlier ones are untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{description.step:08d}"
    partial = manifest.aside(final)
    if final.exists():
        raise ValueError(f"{final} is there already; delete it, or resume from it")
    dist.barrier()

    def begin() -> None:
        if rank == 0:
            remove(partial)
            partial.mkdir(parents=True)

    def write_own() -> None:
        own = io.BytesIO()  # for errors of the system; torch.save gives others for a full disk
        torch.save({"random": random_states(), **process}, own)
        write_through(partial / _process_file(rank), lambda path: path.write_bytes(own.getvalue()))

    def write_rest() -> None:
        if rank != 0:
            return
        files = {
            **model_files(parameters, description),
            OPTIMIZER: lambda path: save_file(on_cpu(moments), path),
            STATE: write_json({"step": description.step, "world_size": world, **state}),
        }
        for name, write in files.items():
            write_through(partial / name, write)
        manifest.seal(partial, [*files, *(_process_file(each) for each in range(world))])
        manifest.rename_folder(partial, final)
        manifest.flush(folder.parent)

    for work in (begin, write_own, write_rest):
        _together(work, partial)
    if rank == 0:
        remove_others(folder, kept)
    dist.barrier()
    return final


def _together(work: Callable[[], None], partial: Path) -> None:
    """Do a part of the writing on every process; if one fails, all of them fail.

    Raises:
        OSError: a process could not write; what was written of the checkpoint is removed.
    """
    fault = None
    try:
        work()
    except OSError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = next((each for each in faults if each is not None), None)
    if found is not None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(found)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint; see `read_checkpoint`.

    Attributes:
        state: the contents of `state.json`.
    """

    path: Path
    step: int
    world_size: int
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def process(self, rank: int) -> dict[str, Any]:
        """The state of process `rank`; its random states are under `random`."""
        file = find_file(self.path, _process_file(rank))
        kept: dict[str, Any] = torch.load(file, weights_only=True)
        return kept


def read_checkpoint(
    path: Path, run: Mapping[str, Any], frozen: Mapping[str, FrozenIdentity]
) -> Checkpoint:
    """Read a checkpoint written by a run with the settings `run`.

    Args:
        path: the checkpoint's folder.
        run: the resuming run's settings, as in the state passed to `save_checkpoint`.
        frozen: the frozen models of the resuming run, as in `Description`.

    Raises:
        ValueError: a missing or damaged file; or a checkpoint of a run with other settings or
            other frozen models; each difference is named with both values.
    """
    state = read_json(path, STATE)
    if "optimizer" not in state:
        raise ValueError(
            f"{path} was written by an earlier version and cannot be resumed: start a new "
            "output_dir with init_from"
        )
    there = dict(flat(state["run"]))
    here = dict(flat(json.loads(json.dumps(run))))
    differing = [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path} was written by another run and cannot be resumed: {'; '.join(differing)}. Set "
            "the same values, or start a new output_dir with init_from"
        )
    description = read_description(path)
    for part, identity in frozen.items():
        remedy = "Resume with the one it was trained with, or start a new output_dir with init_from"
        check_frozen(description, part, identity, str(path), remedy)
    return Checkpoint(
        path,
        state["step"],
        state["world_size"],
        read_parameters(path),
        load_tensors(path, OPTIMIZER),
        state,
    )


def _process_file(rank: int) -> str:
    return f"process_{rank:05d}.pt"


def random_states() -> dict[str, Any]:
    """The states of the Python, NumPy and PyTorch random generators of this process."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the one that libraries draw from)
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore states returned by `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
