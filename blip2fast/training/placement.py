"""Chooses the placement of a run's frozen language model, and loads it there.

none: set by `zero_stage` and `offload_param`. stream: blocks on the host, streamed to the device.
zero3: DeepSpeed ZeRO-3 with its parameters on the host. auto: the first of these that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from blip2fast.frozen.language_models import load_language_model
from blip2fast.offload.loading import empty_language_model, load_partitioned, load_streamed
from blip2fast.offload.zero3_linear import keep_no_inputs
from blip2fast.training.config import RunConfig
from blip2fast.training.engine import deepspeed_config
from blip2fast.training.memory_plan import (
    Memory,
    MemoryPlan,
    Option,
    machine_memory,
    plan_memory,
)
from blip2fast.training.precision import DTYPE_OF


def choose_placement(
    config: RunConfig,
    processes: int = 1,
    machines: int = 1,
    say: Callable[[str], None] | None = None,
    memory: Memory | None = None,
) -> RunConfig:
    """Resolve `offload` to a placement and the settings it implies; nothing is loaded.

    Args:
        config: the run.
        processes, machines: numbers of processes and machines of the run.
        say: called with a line that describes the choice of `auto`.
        memory: the available memory, used by `auto` only. By default the minimum of the free
            memory over all processes, so that all make the same choice.

    Raises:
        ValueError: `auto`, and nothing fits; or a model configuration that is not found.
    """
    if config.offload == "zero3":
        return placed(config, "zero3")
    if config.offload != "auto":
        return config
    plan = plan_memory(config, processes, machines, memory or _least_memory())
    chosen = plan.choose(config.stream_storage)
    if say is not None:
        say(describe_choice(plan, chosen))
    settled = placed(config, chosen.offload)
    settled.gradient_checkpointing = chosen.gradient_checkpointing
    return settled


def placed(config: RunConfig, offload: Literal["none", "stream", "zero3"]) -> RunConfig:
    """The configuration with the placement `offload` and the DeepSpeed settings it implies."""
    if offload == "zero3":
        param = "cpu" if config.offload_param == "none" else config.offload_param
        return replace(
            config,
            offload="zero3",
            zero_stage=3,
            offload_param=param,
            stream_storage="as_is",
            stream_buffers=2,
        )
    if offload == "none":
        return replace(config, offload="none", stream_storage="as_is", stream_buffers=2)
    return replace(config, offload="stream")


def _least_memory() -> Memory:
    found = machine_memory()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return found
    where = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = torch.tensor([found.device, found.host], device=where)
    dist.all_reduce(sizes, dist.ReduceOp.MIN)
    device, host = (int(size) for size in sizes)
    return Memory(device, host, found.device_is_host)


def describe_choice(plan: MemoryPlan, chosen: Option) -> str:
    """One line that describes the choice."""
    device, host = chosen.device_bytes / 2**30, chosen.host_bytes / 2**30
    return (
        f"offload: auto chose {chosen.name!r}: {device:.2f} GiB on each device, {host:.2f} GiB of "
        "host memory for each process (`blip2fast plan` shows all options)"
    )


def load_frozen(config: RunConfig) -> PreTrainedModel:
    """Load the language model of a run into its placement.

    Raises:
        ValueError: not found, or damaged.
    """
    if config.language_model is None:
        raise ValueError("language_model: stage 2 needs one")
    path, dtype = config.language_model.path, DTYPE_OF[config.precision]
    if config.offload == "stream":
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        recompute = config.gradient_checkpointing
        model, _ = load_streamed(
            path, dtype, device, config.stream_buffers, config.stream_storage, recompute
        )
        return model
    if config.offload == "zero3":
        # bucket sizes matter only to the engine, which gets its own configuration when it starts
        largest = max(p.numel() for p in empty_language_model(path, dtype).parameters())
        values = deepspeed_config(config, dist.get_world_size(), [1], largest)
        model = load_partitioned(path, dtype, values)
    else:
        model = load_language_model(path, dtype)
    if config.zero_stage == 3:
        keep_no_inputs(model.requires_grad_(False))
    return model
