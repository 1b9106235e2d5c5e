"""Sends the metrics of a run to Weights & Biases, as one run there whatever its restarts.

Whether it is online is up to `wandb` itself: `wandb login`, or `WANDB_MODE=offline`, which writes
below the output folder, for `wandb sync`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blip2fast._imports import needs
from blip2fast.data.manifest import replace_file
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import config_values

FOLDER = "wandb"
PROJECT = "blip2fast"


class WandbRun:
    """A run at Weights & Biases.

    Args:
        config: the run; `log.wandb` names the project.
        say: prints a line, where sending fails later on.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        ValueError: wandb cannot start, such as without a login.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        with needs("log to Weights & Biases (log.wandb)", "wandb"):
            import wandb

        self._error, self._say = wandb.Error, say
        project = config.log.wandb if isinstance(config.log.wandb, str) else PROJECT
        folder = Path(config.output_dir)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder / FOLDER),
                resume="allow",
                dir=str(folder),
                config=config_values(config),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ValueError(
                f"log.wandb: {str(error).splitlines()[0]}: run `wandb login`, or set "
                "WANDB_MODE=offline, or leave log.wandb out"
            ) from None
        # A resumed run repeats steps that a killed one has sent; wandb's own count only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics after `step` steps, by the names that TensorBoard has."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except self._error as error:
            # a run of days does not end for its charts
            self._say(f"log.wandb: {str(error).splitlines()[0]}: no more is sent in this run")
            self._run = None

    def close(self, failed: bool) -> None:
        """Finish the run; waits until all is sent or written."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _run_id(folder: Path) -> str:
    """The id of the run there, the same after a resume."""
    path = folder / "run_id.txt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex[:12]
        replace_file(path, lambda aside: aside.write_text(name, encoding="utf-8"))
    return path.read_text(encoding="utf-8").strip()
