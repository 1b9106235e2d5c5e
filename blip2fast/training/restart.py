"""What may change between the starts of a run, and the record of what did.

A resumed run keeps its data, their order, its model and its losses. The schedule, the optimizer's
settings, how a step is split, and where things run may change. `history.jsonl` in the output
folder has a line for each start, with the settings that changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blip2fast.data.manifest import naming
from blip2fast.frozen.identity import flat
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import config_values, load_config

HISTORY = "history.jsonl"
# What decides the data, their order and the function that is trained is compared on resume.
_COMPARED = ("stage", "seed", "model", "language_model", "data", "optim")
_FREE = {
    "data": (
        *("workers", "eval_records", "eval_features", "eval_images", "on_error", "max_skipped"),
    ),
    "optim": (
        *("max_steps", "lr", "min_lr", "warmup_steps", "betas", "eps", "weight_decay"),
        *("clip_norm", "batch_size", "accumulation"),
    ),
}
# These say how to start, not what to train.
_OF_A_START = ("resume", "overwrite", "output_dir")


def run_identity(
    config: RunConfig, samples_per_step: int, contents: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that must match between a checkpoint and a resuming run.

    Args:
        config: the run.
        samples_per_step: samples per optimizer step, over all processes.
        contents: from `data_identity.identify_data`.
    """
    values = config_values(config)
    same = {name: values[name] for name in _COMPARED}
    for section, names in _FREE.items():
        for name in names:
            same[section].pop(name)
    return {**same, "samples_per_step": samples_per_step, **contents}


def check_steps(config: RunConfig, step: int, checkpoint: Path) -> None:
    """Refuse a run that would end before the checkpoint it resumes from."""
    if step > config.optim.max_steps:
        raise ValueError(
            f"optim.max_steps {config.optim.max_steps} is below step {step} of {checkpoint}: set "
            f"at least {step}, or resume from an earlier checkpoint by deleting the later ones"
        )


def record_start(
    folder: Path, config: RunConfig, step: int, processes: int, say: Callable[[str], None]
) -> None:
    """Write a line of `history.jsonl`, and say what changed; before `config.yaml` is replaced.

    Args:
        folder: the output folder.
        config: the run.
        step: steps already taken.
        processes: number of processes.
        say: prints a line.
    """
    changes: dict[str, list[Any]] = {}
    if step > 0:
        before, now = (
            dict(flat(values)) for values in (_last_values(folder), config_values(config))
        )
        changes = {
            name: [before.get(name), now.get(name)]
            for name in sorted({*before, *now})
            if before and before.get(name) != now.get(name) and name not in _OF_A_START
        }
    if changes:
        listed = "; ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        say(f"changed since the last start: {listed}")
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "processes": processes}
    path = folder / HISTORY
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "changes": changes}) + "\n")


def _last_values(folder: Path) -> dict[str, Any]:
    """The configuration of the last start; empty if it cannot be read."""
    try:
        return config_values(load_config(folder / "config.yaml"))
    except (ValueError, OSError):
        return {}
