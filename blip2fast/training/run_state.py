"""What a run trains and counts: started anew, or as its last checkpoint left it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.kept import remove_unfinished
from blip2fast.checkpoints.resume import Checkpoint, read_checkpoint, set_random_states
from blip2fast.checkpoints.trained import load_parameters
from blip2fast.data.manifest import replace_file, write_json
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import save_config
from blip2fast.training.engine import start_engine
from blip2fast.training.engine_state import (
    keep_temperature,
    master_parameters,
    optimizer_moments,
    optimizer_state,
    restore,
    restore_loss_scale,
)
from blip2fast.training.finite import nonfinite_names, some_of
from blip2fast.training.log import Progress
from blip2fast.training.parameter_groups import freeze_names
from blip2fast.training.precision import DTYPE_OF
from blip2fast.training.restart import check_steps, record_start, run_identity
from blip2fast.training.skipped import SkippedSamples
from blip2fast.training.step_passes import TrainingStep

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class RunState:
    """The engine of a run and what the run has counted; every process must create it.

    A resuming run takes both from the last checkpoint in its output folder.

    Args:
        config: the run.
        parts: model, data and the other parts of the run.
        device: the device of this process.
        say: prints a line.

    Attributes:
        engine: runs a `TrainingStep` of `model`.
        model: that of `parts`.
        step: optimizer steps taken.
        skipped: of these, those that were left out as they were not finite.
        rescaled: those that only lowered fp16's loss scale.
        progress: sums for the next log line.
        unusable: the account of unusable samples, while the run takes steps and replaces them.

    Raises:
        ValueError: a checkpoint of another run, or parameters that are not finite.
    """

    def __init__(
        self, config: RunConfig, parts: Run, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.config, self.parts, self.device = config, parts, device
        self.model = parts.model
        self.step = self.skipped = self.rescaled = 0
        self.progress = Progress({})
        self.unusable: SkippedSamples | None = None
        self.engine = self._start(say)

    def parameters(self) -> dict[str, Tensor]:
        """The full trained part in fp32, with scalars back in shape [].

        And what is stored with it although it is not trained (`Run.frozen`).
        """
        whole = {**master_parameters(self.engine, self.model), **self._held}
        return {name: value.view(self._shapes[name]) for name, value in whole.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's full moments as `<moment>/<name>`."""
        return optimizer_moments(self.engine, self.model)

    def rest(self) -> dict[str, Any]:
        """What a checkpoint's `state.json` holds of it."""
        return {
            "run": self._identity(),
            "optimizer": optimizer_state(self.engine),
            "skipped": self.skipped,
            "rescaled": self.rescaled,
        }

    def whole_model(self) -> Blip2Stage1 | Blip2Stage2:
        """The model in a form that can be called outside the engine.

        Under ZeRO-3 this copies the trained part, whose weights are gathered only inside the
        engine's forward. The language model stays partitioned and is gathered layer by layer.
        """
        if self.config.zero_stage < 3:
            return self.model
        dtype = DTYPE_OF[self.config.precision]
        whole: Blip2Stage1 | Blip2Stage2
        if isinstance(self.model, Blip2Stage1):
            whole = Blip2Stage1(self.model.config, losses=self.model.losses)
        else:
            whole = Blip2Stage2(self.model.config, self.model.language_model)
        load_parameters(whole, self.parameters(), "this run")
        for name, child in whole.named_children():
            if name != "language_model":
                child.to(self.device, dtype)
        for name, parameter in whole.named_parameters(recurse=False):
            kept = torch.float32 if name == "temp" else dtype
            parameter.data = parameter.data.to(self.device, kept)
        return whole

    def _start(self, say: Callable[[str], None]) -> DeepSpeedEngine:
        folder = Path(self.config.output_dir)
        found = last_checkpoint(folder / "checkpoints")
        checkpoint = None
        if self.config.resume and found is not None:
            frozen = self.parts.description.frozen
            checkpoint = read_checkpoint(found, self._identity(), frozen)
            check_steps(self.config, checkpoint.step, found)
            load_parameters(self.model, checkpoint.parameters, str(found))
            self.step = checkpoint.step
        self._shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self._held = freeze_names(self.model, self.parts.frozen)
        initial = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
        }
        bad = nonfinite_names(initial)
        if bad:
            source = found if checkpoint is not None else f"init_from {self.config.init_from!r}"
            raise ValueError(f"{source}: {some_of(bad)} not finite: start from another model")
        engine, values = start_engine(TrainingStep(self.model), self.config)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder / "checkpoints")
            record_start(folder, self.config, self.step, dist.get_world_size(), say)
            replace_file(folder / "config.yaml", partial(save_config, self.config))
            replace_file(folder / "deepspeed.json", write_json(values))
        if checkpoint is None:
            restore(engine, self.model, initial)
            # Each rank draws its own dropout and negatives; rank 0 as in a single-process run.
            torch.manual_seed(self.config.seed + dist.get_rank())
        else:
            kept = checkpoint.state["optimizer"]
            restore(engine, self.model, checkpoint.parameters, checkpoint.moments, kept["updates"])
            restore_loss_scale(engine, kept)
            self.skipped, self.rescaled = (checkpoint.state[n] for n in ("skipped", "rescaled"))
            self._restore_random(checkpoint, say)
            say(f"resumed {checkpoint.path} at step {self.step}")
        keep_temperature(engine, self.model)
        if isinstance(self.model, Blip2Stage1) and "temp" in self._held:
            self.model.exact_temp = self._held["temp"].to(self.device)
        return engine

    def _restore_random(self, checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
        if checkpoint.world_size == dist.get_world_size():
            kept = checkpoint.process(dist.get_rank())
            set_random_states(kept["random"])
            self.progress.restore(kept["progress"], self.device)
            return
        say(
            f"{checkpoint.path} is of {checkpoint.world_size} processes, this run has "
            f"{dist.get_world_size()}: random states and the sums of the next log line start anew, "
            "the rest continues"
        )
        torch.manual_seed(hash((self.config.seed, self.step, dist.get_rank())))

    def _identity(self) -> dict[str, Any]:
        parts = self.parts
        size = parts.description.image_size
        return run_identity(self.config, parts.batches.plan, parts.contents, size)
