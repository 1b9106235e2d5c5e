"""DeepSpeed configuration, process group and engine, and the optimizer that the engine runs."""

from __future__ import annotations

import errno
import gc
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from blip2fast._heap import keep_freed_memory
from blip2fast._imports import needs
from blip2fast.training.config import OptimSection, RunConfig
from blip2fast.training.parameter_groups import parameter_groups
from blip2fast.training.precision import DTYPE_OF

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# By which a process that has lost another notes that it is there, and how long the others have
# for it: they may be in the middle of a step. Launchers kill them 30 s after the first has ended.
_NOTICED = "blip2fast/noticed/"
_ANSWER_SECONDS = 10.0
# For processes to start, and for a collective; DeepSpeed's default.
_TIMEOUT = timedelta(minutes=30)


class ProcessLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


@contextmanager
def losing_a_process(remedy: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of collectives in the `with` block into a `ProcessLostError`.

    Args:
        remedy: a sentence on how to go on, for the error message.
    """
    try:
        yield
    except ProcessLostError:
        raise
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        # gloo raises plain RuntimeErrors
        signs = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")
        if dist.get_world_size() == 1 or not (
            isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
        ):
            raise
        raise ProcessLostError(f"{_lost()} ({first}). {remedy()}") from error


def _lost() -> str:
    """Which processes do not answer within `_ANSWER_SECONDS`, as a clause.

    Every process that has noticed says so in the store in which they met.
    """
    others: list[int] = []
    with suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_NOTICED}{dist.get_rank()}", "")
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        end = time.monotonic() + _ANSWER_SECONDS
        while others and time.monotonic() < end:
            time.sleep(0.1)
            others = [rank for rank in others if not store.check([f"{_NOTICED}{rank}"])]
    if not others:  # they all answer, or the process with the store is gone
        return "another process of the run has ended or cannot be reached"
    named = ", ".join(str(rank) for rank in others)
    return f"process {named} of the run does not answer: it has ended or cannot be reached"


# Number and size (elements) of the host buffers into which DeepSpeed reads weights from NVMe.
NVME_BUFFERS, NVME_BUFFER_SIZE = 5, 100_000_000


def nvme_buffer_size(largest: int, world_size: int) -> int:
    """Elements of an NVMe buffer; large enough for one process's shard of the largest weight."""
    return max(NVME_BUFFER_SIZE, -(-largest // world_size))


def deepspeed_config(
    config: RunConfig, world_size: int, trained_sizes: list[int], largest: int = 0
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Args:
        config: the run.
        world_size: number of processes.
        trained_sizes: number of elements of each trained parameter.
        largest: number of elements of the largest parameter, trained or frozen.
    """
    optim = config.optim
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0:
        # The default bucket takes 2 GB regardless of the model.
        zero["reduce_bucket_size"] = min(sum(trained_sizes), 500_000_000)
    if config.zero_stage == 3:
        # Stage 3 serves to shard the language model. The trained part is 40 times smaller: once
        # gathered it stays resident, and only its gradients and optimizer states are sharded.
        zero["stage3_param_persistence_threshold"] = max(trained_sizes)
    for what in ("param", "optimizer"):
        device = getattr(config, f"offload_{what}")
        if device != "none":
            zero[f"offload_{what}"] = {"device": device}
            if device == "nvme":
                zero[f"offload_{what}"]["nvme_path"] = config.nvme_path
    if config.offload_param == "nvme":
        # DeepSpeed 0.19 prefetches in order of use. At the start of the backward pass a weight
        # appears twice in that order, and DeepSpeed fails on the second occurrence.
        zero["stage3_prefetch_bucket_size"] = 0
        zero["offload_param"]["buffer_count"] = NVME_BUFFERS
        zero["offload_param"]["buffer_size"] = nvme_buffer_size(largest, world_size)
    plain = config.precision == "fp32" and config.zero_stage == 0
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        "train_batch_size": optim.batch_size * optim.accumulation * world_size,
        # In fp32 with ZeRO 0 there is no optimizer of DeepSpeed's around AdamW, and DeepSpeed would
        # clip by a loop over the parameters and a collective; `StepGate` has the norm and clips.
        "gradient_clipping": 0.0 if plain else optim.clip_norm,
        "steps_per_print": None,
        "zero_optimization": zero,
        # We use PyTorch's AdamW even if its states are offloaded.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.precision != "fp32":
        values[config.precision] = {"enabled": True}
        if config.zero_stage > 0 and optim.accumulation > 1:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
    return values


def start_processes() -> torch.device:
    """Join the launcher's process group, or create one of a single process (plain `python`).

    Returns:
        The device of this process.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not torch.accelerator.is_available():
        # Skips DeepSpeed's accelerator detection and its warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Raised by DeepSpeed's own calls into PyTorch, which we cannot change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    with needs("train", "deepspeed"):
        import deepspeed

    if not on_gpu:
        # This op compiles for minutes on first use and fails without a compiler; gloo does the job.
        # Setting the entry also skips the probing that fills the table of ops on first access.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        pass
    elif "RANK" in os.environ:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            _meet(backend)
        except (dist.DistError, OSError) as error:
            raise ProcessLostError(
                f"the processes cannot meet at {place} ({str(error).splitlines()[0]}): if the port "
                "is in use, give the launcher another --master_port"
            ) from error
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        # no socket: PyTorch's store would listen on all interfaces, without authentication
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    if not on_gpu:
        keep_freed_memory()
        return torch.device("cpu")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"LOCAL_RANK is {number}, but this process sees {count} GPU(s): start one process for "
            "each GPU of a machine, and let each see them all"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _meet(backend: str) -> None:
    """Join the process group that the launcher's environment describes.

    Rank 0 holds the store in which the processes meet. PyTorch's own listens on all interfaces,
    without authentication; this one listens on the address at which the others look for it.
    """
    named = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in named if name not in os.environ]
    if missing:
        if find_spec("mpi4py") is None:
            raise ValueError(
                f"RANK is set in the environment, but not {', '.join(missing)}: start through a "
                "launcher, which sets them all, or unset RANK for one process"
            )
        with needs("train", "deepspeed"):
            import deepspeed

        deepspeed.init_distributed(dist_backend=backend)  # asks MPI for the others
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has one already
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return
    listener = None
    if rank == 0:
        try:
            listener = socket.create_server((address, port)).detach()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # the address is not one of this machine's own, as behind a translated one
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )


def leave_processes() -> None:
    """Leave the process group and end its threads; this process cannot train afterwards.

    DeepSpeed keeps a reference to the group, whose threads would go on. One that is still at work
    when the interpreter ends aborts the process. (Under ZeRO-3 the engine keeps others.)
    """
    if not dist.is_initialized():
        return
    with needs("train", "deepspeed"):
        from deepspeed.utils import groups

    dist.destroy_process_group()
    groups._WORLD_GROUP = None
    gc.collect()  # engines are in cycles


def start_engine(model: nn.Module, config: RunConfig) -> tuple[DeepSpeedEngine, dict[str, Any]]:
    """Create a DeepSpeed engine; returns it with its DeepSpeed configuration.

    Args:
        model: its trained parameters must be fp32. The engine casts the model to
            `config.precision`, and scalars (the temperature) become tensors of shape [1].
    """
    with needs("train", "deepspeed"):
        import deepspeed

    for parameter in model.parameters():
        if parameter.ndim == 0:
            # DeepSpeed broadcasts parameters as bytes, and a scalar cannot be viewed as bytes.
            parameter.data = parameter.data.view(1)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        _place_the_rest(model, config)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    largest = max(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    values = deepspeed_config(config, dist.get_world_size(), sizes, largest)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model, config.optim, config.image_encoder.layer_decay),
        config=values,
    )
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # `blip2fast.training.finite` says what happened
    gather_trained(model)
    return engine, values


def gather_trained(model: nn.Module) -> None:
    """Gather the trained part under ZeRO-3, at the start and after a step that DeepSpeed skipped.

    Stage 3 gathers a weight when its module is called, but the fused passes read weights without
    calling modules. Once gathered, the trained part stays so (`deepspeed_config`); only a skipped
    step leaves it partitioned.
    """
    kept: list[Any] = [
        p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_persist")
    ]
    if kept:
        kept[0].all_gather(kept)


def _place_the_rest(model: nn.Module, config: RunConfig) -> None:
    """Move and cast the parameters that are not partitioned.

    If any part of a model is partitioned by ZeRO-3, DeepSpeed assumes that all of it is in place.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = DTYPE_OF[config.precision]
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(device, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def learning_rate(step: int, optim: OptimSection) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear warm-up that reaches `lr` at step `warmup_steps`, then a cosine decay that would reach
    `min_lr` at step `max_steps`. A pure function of the step, so checkpoints need not store it.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / (optim.max_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def adamw(model: nn.Module, optim: OptimSection, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """PyTorch's fused AdamW.

    DeepSpeed's CPU Adam is avoided: it compiles C++ on first use and so requires a compiler.

    Args:
        model: its trained parameters are updated.
        optim: the optimizer's settings.
        layer_decay: as in `parameter_groups`.
    """
    return torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay, optim.lr_scales, layer_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )
