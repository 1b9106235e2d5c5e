"""Checks that a run can start on this machine, before anything is loaded.

The checks inspect the configuration, the disk and the devices; no weights are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig

from blip2fast._imports import needs
from blip2fast.data.source_config import HUB, as_sources, source_files
from blip2fast.frozen.hub import check_pretrained, check_weights
from blip2fast.frozen.identity import flat
from blip2fast.frozen.language_models import quantised_fault
from blip2fast.frozen.lavis_files import is_lavis_file
from blip2fast.frozen.timm_models import is_timm
from blip2fast.ops import check_kernels, set_kernels
from blip2fast.ops.collectives import rank
from blip2fast.ops.kernel_calls import BLIP2, Sizes
from blip2fast.ops.records import Record
from blip2fast.published.reading import published_fault
from blip2fast.training.agreement import check_alike
from blip2fast.training.build import Run
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import config_values
from blip2fast.training.folder import folder_faults
from blip2fast.training.precision import DTYPE_OF


def check_machine(config: RunConfig, world_size: int = 1) -> None:
    """Raise if a run cannot start on this machine; each error is listed with its fix.

    Args:
        config: the run.
        world_size: number of processes.

    Raises:
        ValueError: the run cannot start; all errors are listed.
    """
    faults = _path_faults(config)
    faults += folder_faults(Path(config.output_dir), config.resume, config.overwrite)
    faults += _batch_faults(config, world_size)
    faults += _device_faults(config)
    if config.log.wandb and rank() == 0 and find_spec("wandb") is None:
        faults.append(
            f"log.wandb {config.log.wandb!r} needs wandb, which is not installed: pip install "
            "wandb, or leave log.wandb out"
        )
    if faults:
        raise ValueError("the run cannot start:\n  " + "\n  ".join(faults))


def check_same_run(config: RunConfig) -> None:
    """Raise if a process has another configuration; every process must call this.

    Raises:
        SharedFault: a machine has another version of the configuration's file.
    """
    values = {name: value for name, value in flat(config_values(config)) if name != "nvme_path"}
    check_alike(values, "Give every machine the same configuration")


def check_same_data(parts: Run) -> None:
    """Raise if a process reads other data, which it would take for the others'.

    Every process must call this.

    Raises:
        SharedFault: a machine has other records, images, features or tokenizers.
    """
    found = dict(parts.contents)
    if parts.held_out is not None:
        keys = hashlib.sha256("\0".join(parts.held_out.keys()).encode()).hexdigest()[:16]
        found["the held-out set"] = f"{len(parts.held_out.records)} records, {keys}"
    check_alike(found, "Copy the same files to every machine")


def prepare_kernels(
    config: RunConfig, say: Callable[[str], None] | None = None, beside: int = 1
) -> list[Record]:
    """Select the kernels that the run may use, and check them on a GPU if that is not yet done.

    Every process of a run must call this: on each machine one process checks and the others wait.

    Args:
        config: the run.
        say: prints a line.
        beside: processes of the run on this machine, with this one.

    Returns:
        The check results of the kernels that the run is likely to use; empty without a GPU.
    """
    set_kernels(config.kernels)
    if config.kernels != "check" or not torch.cuda.is_available():
        return []
    model = config.model
    dropout = 0.1 if model.dropout is None else model.dropout
    sizes = Sizes(
        hidden=model.hidden_size or BLIP2.hidden,
        heads=model.num_attention_heads or BLIP2.heads,
        queries=model.num_query_tokens or BLIP2.queries,
        text=config.data.max_txt_len if config.stage == 1 or model.text_conditioned else 0,
        features=(model.embed_dim or BLIP2.features) if config.stage == 1 else 0,
        dropout=dropout > 0,
    )
    jobs = max(1, min(8, (os.cpu_count() or 1) // beside))
    records = check_kernels(dtype=DTYPE_OF[config.precision], sizes=sizes, jobs=jobs)
    if say is not None:
        taken = sum(not record.fault for record in records)
        say(f"kernels: {taken} of {len(records)} kinds are right and quicker here")
        for record in records:
            if record.fault:
                say(f"kernels: {record}")
    return records


def _path_faults(config: RunConfig) -> list[str]:
    data = config.data
    faults = [
        f"data.{name} {source.source!r}: not a file, folder or pattern of files; write the records "
        "first"
        for name in ("records", "eval_records")
        if (value := getattr(data, name)) is not None
        for source in as_sources(value)
        if not source.source.startswith(HUB) and not source_files(source.source)
    ]
    faults += [
        f"data.{name} {value!r}: no feature cache; build it with `blip2fast features`"
        for name in ("features", "eval_features")
        if (value := getattr(data, name)) is not None and not Path(value, "manifest.json").is_file()
    ]
    faults += [
        f"data.{name} {value!r}: not a folder of images"
        for name in ("images", "eval_images")
        if (value := getattr(data, name)) is not None and not Path(value).is_dir()
    ]
    asked: list[str | None] = []
    if config.init_from is not None:
        asked.append(published_fault("init_from", config.init_from))
    if config.init_text_from is not None:
        asked.append(published_fault("init_text_from", config.init_text_from))
    if config.model.tokenizer is not None:
        asked.append(check_pretrained("model.tokenizer", config.model.tokenizer))
    if config.model.bert is not None:
        asked.append(check_weights("model.bert", config.model.bert))
    if config.language_model is not None:
        asked.append(_language_model_fault("language_model.path", config.language_model.path))
    named = data.image_encoder
    if named is not None and not (is_timm(named) or is_lavis_file(named)):
        asked.append(check_weights("data.image_encoder", named))
    return faults + [fault for fault in asked if fault is not None]


def _language_model_fault(key: str, name: str) -> str | None:
    fault = check_weights(key, name)
    if fault is not None:
        return fault
    try:
        return quantised_fault(key, name, AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as error:
        return f"{key} {name!r}: its config.json cannot be read ({str(error).splitlines()[0]})"


def _batch_faults(config: RunConfig, world_size: int) -> list[str]:
    faults = []
    if config.stage == 1 and config.optim.batch_size * world_size < 2:
        faults.append(
            "optim.batch_size 1 on one process: ITC and ITM take their negatives from the batch, "
            "so stage 1 needs at least 2 samples"
        )
    if config.eval_batch_size % world_size or config.eval_batch_size < 2 * world_size:
        faults.append(
            f"eval_batch_size {config.eval_batch_size} on {world_size} processes: give a multiple "
            f"of {world_size}, at least {2 * world_size}"
        )
    return faults


def _device_faults(config: RunConfig) -> list[str]:
    faults = []
    on_cpu = not torch.cuda.is_available()
    if config.precision == "fp16" and on_cpu:
        faults.append("precision 'fp16' needs a GPU, none is found: use bf16 or fp32")
    if config.offload_param != "none" and config.zero_stage != 3 and config.offload != "zero3":
        faults.append(
            f"offload_param {config.offload_param!r} needs zero_stage 3, it is {config.zero_stage}"
        )
    on_zero = config.zero_stage > 0 or config.offload == "zero3"
    if config.offload_optimizer != "none" and not on_zero:
        faults.append(f"offload_optimizer {config.offload_optimizer!r} needs zero_stage 1, 2 or 3")
    if "nvme" in (config.offload_param, config.offload_optimizer):
        faults += _nvme_faults(config)
    return faults


def _nvme_faults(config: RunConfig) -> list[str]:
    faults = []
    if config.zero_stage != 3 and config.offload != "zero3":
        faults.append(f"offloading to nvme needs zero_stage 3, it is {config.zero_stage}")
    if config.offload_param == "nvme" and config.precision == "fp32":
        faults.append(
            "offload_param 'nvme' needs precision bf16 or fp16, it is fp32: DeepSpeed keeps "
            "weights on a disk in 16 bits"
        )
    if config.nvme_path is None or not Path(config.nvme_path).is_dir():
        faults.append(f"nvme_path {config.nvme_path!r}: not a folder; offloading to nvme needs one")
    with needs("train", "deepspeed"):
        from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        faults.append(
            "offloading to nvme needs DeepSpeed's async_io op, which cannot be built here: it "
            "takes a C++ compiler and libaio with its headers (Debian: libaio-dev)"
        )
    return faults
