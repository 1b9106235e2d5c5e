"""What a run writes of its parameters, and when: checkpoints, the best one, the final model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from blip2fast.checkpoints.kept import Kept, read_best, remove_others, write_best
from blip2fast.checkpoints.resume import save_checkpoint
from blip2fast.checkpoints.trained import Description, save_model
from blip2fast.frozen.image_encoders import parse_encoder_id
from blip2fast.training.agreement import first_process
from blip2fast.training.finite import nonfinite_names, some_of
from blip2fast.training.log import RunLog
from blip2fast.training.restart import last_good
from blip2fast.training.run_state import RunState


class Saver:
    """Saves a run; its methods must be called by every process.

    Parameters that are not finite are refused: no file has them.

    Args:
        state: of the run.
    """

    def __init__(self, state: RunState) -> None:
        self._state, self._config = state, state.config
        self._folder = Path(state.config.output_dir)
        self._saved = state.step  # step of the last checkpoint
        self._kept = Kept(state.config.keep_last, state.config.keep_every)

    def is_due(self) -> bool:
        """Whether `save_every` asks for a checkpoint at this step."""
        every = self._config.save_every
        return bool(every) and self._state.step % every == 0

    def save(self, log: RunLog | None = None) -> None:
        """Write a checkpoint of this step.

        Args:
            log: flushed before, so that it has the steps of the checkpoint.

        Raises:
            FloatingPointError: a value is not finite.
            OSError: it cannot be written.
        """
        if log is not None:
            log.flush()
        state, step = self._state, self._state.step
        if state.unusable is not None:
            state.unusable.flush()
        parameters = self.finite_parameters()
        moments = state.moments()
        self._refuse_nonfinite(moments)
        try:
            save_checkpoint(
                self._folder / "checkpoints",
                replace(state.parts.description, step=step),
                parameters,
                moments,
                state.rest(),
                {"progress": state.progress.state()},
                self._kept,
            )
        except OSError as error:
            raise OSError(
                f"step {step}: no checkpoint: {error}. {last_good(self._folder)}"
            ) from error
        self._saved = step

    def save_unless_saved(self, log: RunLog | None = None) -> None:
        """Write a checkpoint if this step has none."""
        if self._saved != self._state.step:
            self.save(log)

    def keep_if_best(self, metrics: Mapping[str, float], log: RunLog | None) -> None:
        """Keep the checkpoint of this step if it is the best by `keep_best`.

        Args:
            metrics: of the evaluation of this step, named `eval_*`.
            log: as in `save`.
        """
        metric = self._config.keep_best
        if metric is None:
            return
        folder, value = self._folder / "checkpoints", metrics[f"eval_{metric}"]
        better = dist.get_rank() == 0 and _is_better(folder, metric, value)
        if not first_process(better, self._state.device):
            return
        self.save_unless_saved(log)
        if dist.get_rank() == 0:
            write_best(folder, self._state.step, metric, value)
            remove_others(folder, self._kept)
        dist.barrier()

    def save_model(self) -> None:
        """Write the trained model into the output folder."""
        parameters = self.finite_parameters()
        if dist.get_rank() == 0:
            description = replace(self._state.parts.description, step=self._state.step)
            try:
                save_model(self._folder, parameters, description)
            except OSError as error:
                raise OSError(f"the trained model: {error}. {last_good(self._folder)}") from error
        dist.barrier()

    def finite_parameters(self) -> dict[str, Tensor]:
        """The parameters, to be saved or evaluated.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        parameters = self._state.parameters()
        self._refuse_nonfinite(parameters)
        return parameters

    def _refuse_nonfinite(self, tensors: Mapping[str, Tensor]) -> None:
        bad = nonfinite_names(tensors)
        if bad:
            raise FloatingPointError(
                f"step {self._state.step}: {some_of(bad)} not finite after the update: lower "
                f"optim.lr. Neither saved nor evaluated. {last_good(self._folder)}"
            )


def how_to_use(folder: str, description: Description, task: str) -> str:
    """Where the trained model is, and what to do with it next, as a line."""
    path = shlex.quote(folder)
    if description.stage == 1:
        return f"model in {folder}; train stage 2 from it: --set init_from={path}"
    # the command loads the image encoder by its name and number of blocks
    if task == "sequence" or parse_encoder_id(description.image_encoder) is None:
        code = f"blip2fast.checkpoints.load_trained({folder!r})"
        return f"model in {folder}, try: {code}"
    question = ' --question "..."' if task == "vqa" else ""
    return f"model in {folder}, try: blip2fast caption --model {path} IMAGE{question}"


def _is_better(folder: Path, metric: str, value: float) -> bool:
    """Whether `value` is better than that of the best checkpoint in `folder`."""
    before = read_best(folder)
    if before is None or before["metric"] != metric:
        return True
    return bool(value < before["value"] if metric.startswith("loss") else value > before["value"])
