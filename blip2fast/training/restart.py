"""What a run goes on from, what may change between its starts, and the record of what did.

A resumed run keeps its data, their order, its model and its losses. The schedule, the optimizer's
settings, how a step is split, and where things run may change. `history.jsonl` in the output
folder has a line for each start, with the settings that changed and the environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip2fast import __version__
from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.trained import is_trained
from blip2fast.data.batches import BatchPlan
from blip2fast.data.manifest import naming
from blip2fast.data.order import MOST_SHUFFLED
from blip2fast.frozen.identity import flat
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import config_values, load_config

HISTORY = "history.jsonl"
# What decides the data, their order and the function that is trained is compared on resume.
_COMPARED = ("stage", "seed", "model", "language_model", "image_encoder", "data", "optim")
_FREE = {
    "data": (
        *("workers", "eval_records", "eval_features", "eval_images", "on_error", "max_skipped"),
        "max_pixels",
    ),
    "optim": (
        *("max_steps", "lr", "min_lr", "warmup_steps", "betas", "eps", "weight_decay"),
        *("clip_norm", "batch_size", "accumulation"),
    ),
    "image_encoder": ("layer_decay", "gradient_checkpointing", "compile"),
}
# These say how to start, not what to train.
_OF_A_START = ("resume", "overwrite", "output_dir")


def run_identity(
    config: RunConfig, plan: BatchPlan, contents: Mapping[str, str], image_size: int | None = None
) -> dict[str, Any]:
    """The settings that must match between a checkpoint and a resuming run.

    Args:
        config: the run.
        plan: of its batches, over all processes.
        contents: from `data_identity.identify_data`.
        image_size: that of the image encoder, where there is one.
    """
    values = config_values(config)
    same = {name: values[name] for name in _COMPARED}
    for section, names in _FREE.items():
        for name in names:
            same[section].pop(name)
    _leave_out_new_defaults(same)
    # earlier versions had a number here, also for feature caches
    same["data"]["image_size"] = same["data"]["image_size"] or image_size or 224
    if same["data"]["positives"] == "image":
        same["data"].pop("positives")  # as in checkpoints that do not know it
    found = {**same, "samples_per_step": plan.samples_per_step, **contents}
    if plan.num_records > MOST_SHUFFLED:
        found["shuffle"] = "feistel"
    return found


def last_good(folder: str | Path) -> str:
    """What there is to resume from in an output folder, as a sentence."""
    last = last_checkpoint(Path(folder) / "checkpoints")
    if last is None:
        return "No checkpoint was saved"
    return f"The last checkpoint is good: resume: true continues from {last}"


def with_start(config: RunConfig) -> RunConfig:
    """A resuming run whose start has been deleted is built from its own checkpoint."""
    starts = [s for s in (config.init_from, config.init_text_from) if s is not None]
    if not config.resume or all(is_trained(start) for start in starts):
        return config
    last = last_checkpoint(Path(config.output_dir) / "checkpoints")
    return config if last is None else replace(config, init_from=str(last), init_text_from=None)


def _leave_out_new_defaults(same: dict[str, Any]) -> None:
    """Settings that checkpoints of earlier versions do not have, where they change nothing."""
    if same["language_model"] is not None and same["language_model"]["lora"] is None:
        same["language_model"].pop("lora")
    if not same["optim"]["lr_scales"]:
        same["optim"].pop("lr_scales")
    if same["image_encoder"]["quantization"] == "none":
        same["image_encoder"].pop("quantization")
        if not same["image_encoder"]["train"]:
            same.pop("image_encoder")


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
    line |= {"environment": _environment()}
    path = folder / HISTORY
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "changes": changes}) + "\n")


def _environment() -> dict[str, str]:
    """What the first process runs on."""
    found = {"blip2fast": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "deepspeed"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            continue
    device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {**found, "platform": platform.platform(), "device": device}


def _last_values(folder: Path) -> dict[str, Any]:
    """The configuration of the last start; empty if it cannot be read."""
    try:
        return config_values(load_config(folder / "config.yaml"))
    except (ValueError, OSError):
        return {}
