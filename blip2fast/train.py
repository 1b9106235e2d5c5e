"""Train stage 1 or stage 2.

deepspeed blip2fast/train.py --config configs/scenes_stage1.yaml
deepspeed --num_gpus 2 blip2fast/train.py --config ... --set optim.lr=3e-4 --set zero_stage=2
python blip2fast/train.py --config ...                       (one process)
deepspeed blip2fast/train.py --config STAGE1 --set ... --config STAGE2 --set ...   (one start)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class _Runs(argparse.Action):
    """`--config` begins a run, `--set` changes the one that was begun last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        runs = [*(getattr(namespace, self.dest) or ())]
        if self.metavar == "FILE":
            runs.append((values, ()))
        elif runs:
            config, overrides = runs[-1]
            runs[-1] = (config, (*overrides, values))
        else:
            parser.error(f"--set {values}: comes before the --config that it changes")
        setattr(namespace, self.dest, runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with one line of text on bad input."""
    parser = argparse.ArgumentParser(description="Train stage 1 or stage 2 of BLIP-2.")
    parser.add_argument(
        "--config",
        action=_Runs,
        required=True,
        metavar="FILE",
        dest="runs",
        help="a yaml file, such as those in configs/; several run one after another",
    )
    parser.add_argument(
        "--set",
        action=_Runs,
        metavar="KEY=VALUE",
        dest="runs",
        help="override one key of the --config before it, such as optim.lr=1e-4; repeatable",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    given = parser.parse_args(arguments)
    _share_cores()

    import transformers

    from blip2fast.training.config_files import load_config
    from blip2fast.training.trainer import train

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        for run in [load_config(config, overrides) for config, overrides in given.runs]:
            train(run)
    except (ValueError, FloatingPointError) as error:
        # The launcher ends all processes as soon as one has: each says why.
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}")


def _share_cores() -> None:
    """Give each process its share of the cores; must run before PyTorch is imported.

    Two processes of two threads each on two cores take sixty times as long for a step.
    """
    # On this machine, as torchrun and as DeepSpeed's launcher say it; in all, as others do.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    processes = int(next((os.environ[name] for name in names if os.environ.get(name)), 1))
    # Not on macOS, where a process cannot be bound to cores either.
    bound = getattr(os, "sched_getaffinity", None)
    cores = len(bound(0)) if bound is not None else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def _import_from_repository() -> None:
    """Put the repository on the path instead of this folder, whose modules are no packages."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    sys.path.insert(0, str(here.parent))


def _leave_processes() -> None:
    """End what connects the processes; nothing can train in this one afterwards."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _import_from_repository()
    try:
        main()
    finally:
        _leave_processes()
