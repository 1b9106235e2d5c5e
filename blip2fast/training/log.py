"""Logging of a run on rank 0: metrics.jsonl, TensorBoard, others, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from blip2fast._imports import needs
from blip2fast.data.manifest import naming, replace_file
from blip2fast.training.restart import last_good

with needs("log a run", "tensorboard"):
    from torch.utils.tensorboard import SummaryWriter

# Entropy of one match in three pairs: the ITM loss of a model that cannot tell them apart.
_ITM_PLATEAU = 0.6365
_ITM_HINT = (
    "loss_itm sits at 0.636, the entropy of one match to two mismatches: usual for the first few "
    "hundred steps (300 to 700 on the embedded scenes), then it falls"
)


class MetricsWriter(Protocol):
    """Another place for the metrics of a run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics after `step` steps, named `train/*` and `eval/*`."""

    def close(self, failed: bool) -> None:
        """Write what is left."""


class RunLog:
    """Writes the metrics of a run.

    Args:
        folder: the run's output folder. Lines of `metrics.jsonl` after `start_step` are removed,
            so a resumed run produces the same file as an uninterrupted one.
        start_step: steps already taken.
        max_steps: total steps of the run.
        stage: training stage, shown in the progress bar.
        also: another place for the metrics, such as Weights & Biases.

    Raises:
        OSError: here and in the methods; a file cannot be written. Names it, and what there is to
            resume from.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        max_steps: int,
        stage: int,
        also: MetricsWriter | None = None,
    ) -> None:
        self._also, self._folder = also, folder
        self._path, self._board_path = folder / "metrics.jsonl", folder / "tensorboard"
        self._lines = _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._hook = threading.excepthook
        threading.excepthook = self._hear_of_thread
        try:
            with self._writing(self._board_path):
                self._board = SummaryWriter(str(self._board_path), purge_step=start_step + 1)
        except OSError:
            threading.excepthook = self._hook
            raise
        self._bar = tqdm(
            total=max_steps,
            initial=start_step,
            desc=f"stage {stage}",
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
        )
        self._itm_hinted = False

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics after `step` steps wherever they go; evaluations are printed."""
        with self._writing(self._path):
            self._file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
            self._file.flush()
        grouped = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": v
            for name, v in metrics.items()
        }
        with self._writing(self._board_path):
            for name, value in grouped.items():
                self._board.add_scalar(name, value, step)
        if self._also is not None:
            self._also.write(step, grouped)
        if _is_evaluation(metrics):
            shown = ", ".join(f"{n.removeprefix('eval_')} {v:.4g}" for n, v in metrics.items())
            self.say(f"step {step}, held-out data: {shown}")
        if "loss" in metrics:
            losses = {n: f"{v:.3f}" for n, v in metrics.items() if n.startswith("loss")}
            self._bar.set_postfix(losses, refresh=False)
        itm = metrics.get("loss_itm")
        if itm is not None and not self._itm_hinted and abs(itm - _ITM_PLATEAU) < 0.01:
            self._itm_hinted = True
            self.say(_ITM_HINT)

    def has_evaluation(self, step: int) -> bool:
        """Whether an interrupted run had already logged the evaluation after `step` steps."""
        return any(line["step"] == step and _is_evaluation(line) for line in self._lines)

    def flush(self) -> None:
        """Flush all logs to disk, before a checkpoint."""
        with self._writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with self._writing(self._board_path):
            self._board.flush()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(line)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # an error of closing must not take the place of the one that ends the run
        with contextlib.suppress(*() if kind is None else (OSError,)):
            self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Close all logs.

        Args:
            failed: the run ends with an error.
        """
        self._bar.close()
        try:
            if self._also is not None:
                self._also.close(failed)
            with self._writing(self._path):
                self._file.close()
            with self._writing(self._board_path):
                self._board.close()
        finally:
            threading.excepthook = self._hook

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            with naming(path):
                yield
        except OSError as error:
            raise OSError(f"{error}. {last_good(self._folder)}") from error

    def _hear_of_thread(self, fault: threading.ExceptHookArgs) -> None:
        """Print the errors of threads, but for TensorBoard's: its next call raises them again."""
        if not (fault.thread and type(fault.thread).__module__.startswith("tensorboard.")):
            self._hook(fault)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read a run's `metrics.jsonl`, also while the run is active.

    An unterminated last line, left by an active or killed run, is ignored.

    Raises:
        ValueError: the file is missing, or a terminated line is invalid.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"no metrics at {path}: not a file; give the output folder of a run")
    lines, fault = _read_lines(path)
    if fault:
        raise ValueError(fault)
    return lines


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines before the first damaged one, and a description of the damage."""
    lines: list[dict[str, Any]] = []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(whole, 1):
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            return lines, f"{path}, line {number} is not JSON ({error}); delete it to read the rest"
        if not isinstance(values, dict) or "step" not in values:
            return lines, f"{path}, line {number}: expected a step and its metrics, got {line!r}"
        lines.append(values)
    return lines, ""


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step` from a metrics file; returns the remaining ones."""
    if not path.exists():
        return []
    # the log is flushed before a checkpoint, so a line damaged by a crash is of a later step
    kept = [values for values in _read_lines(path)[0] if values["step"] <= step]
    text = "".join(json.dumps(values) + "\n" for values in kept)
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return kept


# the number of steps that are counted in the sums
_STEPS = "steps"


@dataclass
class Progress:
    """Running sums of the scalars since the last log line, kept on the device to avoid syncs.

    Attributes:
        sums: over the steps whose losses are finite, of the means of their passes; after a resume
            they include steps of the interrupted run.
        skipped: steps since the last log line that did not update the parameters.
        replaced: samples since then whose record could not be used, of all processes.
        timed: steps since `since`.
        waited: seconds since `since` in which this process waited for a batch.
        since: time of the last log line or of the resume, in seconds; pauses are added to it.
    """

    sums: dict[str, Tensor]
    skipped: int = 0
    replaced: int = 0
    timed: int = 0
    waited: float = 0.0
    since: float = 0.0

    def add(self, scalars: Mapping[str, Tensor], passes: int, left_out: Tensor) -> None:
        """Add one step.

        Args:
            scalars: sums over its passes.
            passes: number of passes.
            left_out: a bool scalar: not to be counted, as a loss is not finite.
        """
        count = left_out.new_full((), passes, dtype=torch.float32)
        for name, value in {**scalars, _STEPS: count}.items():
            kept = (value / passes).masked_fill(left_out, 0)
            self.sums[name] = self.sums[name] + kept if name in self.sums else kept
        self.timed += 1

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, so that the next log line after a resume covers all its steps."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "skipped": self.skipped, "replaced": self.replaced}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a state returned by `state`."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.skipped = state["skipped"]
        self.replaced = state.get("replaced", 0)  # earlier versions replaced none

    def take(
        self, samples_per_step: int, beside: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Means over steps and processes, and the throughput; resets the sums.

        Every process must call this. Without a step to count, the means are left out; the number
        of skipped steps and of replaced samples is left out if there is none.

        Args:
            samples_per_step: samples per optimizer step, over all processes.
            beside: scalars on the device to be read with the means, alike on every process; left
                out where they are not finite.
        """
        beside = beside or {}
        counted = self.sums.pop(_STEPS)
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / counted
        if dist.get_world_size() > 1:
            dist.all_reduce(means)
            means /= dist.get_world_size()
        values = torch.cat([means, *(x.view(1).to(means) for x in beside.values())]).tolist()
        now, steps = time.perf_counter(), self.timed
        metrics = dict(zip(names, values[: len(names)], strict=True)) if counted.item() else {}
        read = dict(zip(beside, values[len(names) :], strict=True))
        metrics |= {name: value for name, value in read.items() if math.isfinite(value)}
        if self.skipped:
            metrics["skipped"] = self.skipped
        if self.replaced:
            metrics["replaced"] = self.replaced
        metrics["seconds_per_step"] = (now - self.since) / steps
        metrics["samples_per_second"] = steps * samples_per_step / (now - self.since)
        metrics["data_wait_share"] = min(self.waited / (now - self.since), 1.0)
        self.sums, self.skipped, self.replaced = {}, 0, 0
        self.timed, self.waited, self.since = 0, 0.0, now
        return metrics
