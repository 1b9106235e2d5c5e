"""Train stage 1 or stage 2.

deepspeed blip2fast/train.py --config configs/scenes_stage1.yaml
deepspeed --num_gpus 2 blip2fast/train.py --config ... --set optim.lr=3e-4 --set zero_stage=2
python blip2fast/train.py --config ...                       (one process)
deepspeed blip2fast/train.py --resume runs/scenes/stage1     (continues in its own way)
deepspeed blip2fast/train.py --config STAGE1 --set ... --config STAGE2 --set ...   (one start)
deepspeed --module blip2fast.train --config ...              (installed, without a checkout)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class _Runs(argparse.Action):
    """`--config` and `--resume` add a run; `--set` overrides settings of the most recent one."""

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
        elif self.metavar == "FOLDER":
            own = (f"output_dir={json.dumps(values)}", "resume=true", "overwrite=false")
            runs.append((str(Path(values, "config.yaml")), own))
        elif runs:
            config, overrides = runs[-1]
            runs[-1] = (config, (*overrides, values))
        else:
            parser.error(f"--set {values}: comes before the --config or --resume that it changes")
        setattr(namespace, self.dest, runs)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Entry point; exits with a one-line message on bad input.

    Args:
        arguments: those of the command line; None: `sys.argv[1:]`.
        program: its name in messages; None: the script's.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train stage 1 or stage 2 of BLIP-2.",
        epilog="Example: %(prog)s --config configs/scenes_stage1.yaml --set optim.lr=1e-3",
    )
    parser.add_argument(
        "--config",
        action=_Runs,
        metavar="FILE",
        dest="runs",
        help="a yaml file, such as those in configs/; several run one after another",
    )
    parser.add_argument(
        "--resume",
        action=_Runs,
        metavar="FOLDER",
        dest="runs",
        help="the output folder of a run, which continues with its own configuration",
    )
    parser.add_argument(
        "--set",
        action=_Runs,
        metavar="KEY=VALUE",
        dest="runs",
        help="override one key of the run before it, such as optim.lr=1e-4; repeatable",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = get_close_matches(unknown[0], ("--config", "--resume", "--set", "--help"), 1)
        hint = f"; the nearest option is {near[0]}" if near else ""
        if unknown[0].endswith((".yaml", ".yml")):
            hint = f"; give a configuration by --config {unknown[0]}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if not given.runs:
        parser.error("give a --config FILE to start, or a --resume FOLDER to continue")
    _share_cores()
    from blip2fast.training.config_files import load_config

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several:  # a typing error is told before torch is imported
        try:
            for each in given.runs:
                load_config(*each)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

    import transformers

    from blip2fast.training.agreement import SharedFault, together
    from blip2fast.training.engine import ProcessLostError, start_processes
    from blip2fast.training.stopping import RunStopped
    from blip2fast.training.trainer import train

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if several:
            start_processes()  # a file that one machine lacks is an error of all
        for run in together(lambda: [load_config(*each) for each in given.runs]):
            try:
                train(run)
            except (FloatingPointError, RunStopped):
                _write_report(run.output_dir)
                raise
            _write_report(run.output_dir, samples=run.zero_stage != 3)
    except SharedFault as error:
        _exit_together(f"error: {error}")
    except (ValueError, FloatingPointError, OSError, ProcessLostError) as error:
        # The launcher kills all processes as soon as one exits, so each prints its own error.
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}")
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # before the first step, or after the last


def _write_report(folder: str, samples: bool = False) -> None:
    """Write the run's `report.html`; the run itself does not depend on it.

    Args:
        folder: of the run.
        samples: draw pictures for it, for which the model of the run is loaded.
    """
    if os.environ.get("RANK", "0") != "0" or not Path(folder, "metrics.jsonl").is_file():
        return
    from blip2fast.reporting import draw_samples, write_report

    try:
        # should drawing be killed, this one stays
        path = write_report(folder, notes=[f"No sample pictures: blip2fast report {folder}"])
        if samples:
            drawn = draw_samples(folder)
            write_report(folder, drawn.samples, notes=drawn.notes)
            for note in drawn.notes:
                print(note, file=sys.stderr)
        print(f"report: {path}", file=sys.stderr)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"no report: {error}", file=sys.stderr)


def _share_cores() -> None:
    """Limit each process to its share of the CPU cores; must run before PyTorch is imported.

    With two processes of two threads each on two cores, a step takes sixty times as long.
    """
    # Processes on this machine (torchrun, DeepSpeed's launcher), or in total (other launchers).
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    processes = int(next((os.environ[name] for name in names if os.environ.get(name)), 1))
    # Missing on macOS, which has no CPU affinity anyway.
    bound = getattr(os, "sched_getaffinity", None)
    cores = len(bound(0)) if bound is not None else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def _exit_together(line: str) -> NoReturn:
    """Print a line once a machine, and exit when all machines have.

    A launcher kills the other processes as soon as one exits.
    """
    import torch.distributed as dist

    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    sys.exit(1)


def _import_from_repository() -> None:
    """Replace this folder, which is inside the package, by the repository root in `sys.path`."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    sys.path.insert(0, str(here.parent))


def leave_processes() -> None:
    """Leave the process group, if one was joined; no training is possible afterwards."""
    engine = sys.modules.get("blip2fast.training.engine")
    if engine is not None:
        engine.leave_processes()


if __name__ == "__main__":
    _import_from_repository()
    try:
        main()
    finally:
        leave_processes()
