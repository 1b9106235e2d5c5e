"""The training loop: a DeepSpeed engine over planned batches, with evaluation and checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.resume import (
    Checkpoint,
    read_checkpoint,
    remove_unfinished,
    save_checkpoint,
    set_random_states,
)
from blip2fast.checkpoints.trained import load_parameters, save_model, trained_names
from blip2fast.data.manifest import replace_file, write_json
from blip2fast.data.order import MOST_SHUFFLED
from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run, build_run
from blip2fast.training.config import DTYPE_OF, RunConfig
from blip2fast.training.config_files import config_values, save_config
from blip2fast.training.engine import learning_rate, start_engine, start_processes
from blip2fast.training.engine_state import (
    keep_temperature,
    master_parameters,
    optimizer_moments,
    restore,
)
from blip2fast.training.log import Progress, RunLog
from blip2fast.training.placement import choose_placement
from blip2fast.training.preflight import check_machine, prepare_kernels
from blip2fast.training.validation import validate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class TrainingStep(nn.Module):
    """The module that the engine wraps; returns the loss, and other scalars detached.

    DeepSpeed traverses everything that its module returns, so logits and features are not returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, for_contrast: bool = False, **batch: Any) -> tuple[Any, ...]:
        """Return `(loss, scalars)` of the model, or with `for_contrast` its `features`."""
        if for_contrast:
            return cast(Blip2Stage1, self.model).features(**batch)
        output = self.model(**batch)
        scalars = {
            name: value.detach().float()
            for name, value in output.items()
            if name.startswith(("loss", "accuracy")) and value is not None
        }
        return output.loss, scalars


def train(config: RunConfig, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train to the end; resumes from a checkpoint if `config.resume` is set.

    Every process of the run must call this; a process group is created if there is none.

    Args:
        config: the run.
        say: prints a line (rank 0 only).

    Returns:
        The metrics of the last evaluation, or without a held-out set the last logged ones.

    Raises:
        ValueError: the run cannot start; see `blip2fast.training.preflight.check_machine`.
    """
    device = start_processes()
    check_machine(config, dist.get_world_size())
    prepare_kernels(config, say if dist.get_rank() == 0 else None)
    machines = max(1, dist.get_world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    config = choose_placement(
        config, dist.get_world_size(), machines, say if dist.get_rank() == 0 else None
    )
    parts = build_run(config, dist.get_rank(), dist.get_world_size())
    return Trainer(config, parts, device, say).run()


class Trainer:
    """One training run: its engine and its state.

    Args:
        config: the run.
        parts: model, data and the other parts of the run.
        device: the device of this process.
        say: prints a line; called on rank 0 only.
    """

    def __init__(
        self, config: RunConfig, parts: Run, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.config, self.parts, self.device = config, parts, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.say = say if self.rank == 0 else _silent
        self.dtype = DTYPE_OF[config.precision]
        self.folder = Path(config.output_dir)
        self.model = parts.model
        self.step = 0
        self.progress = Progress({})
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if parts.image_encoder is not None:
            parts.image_encoder.to(device)
        self.engine = self._start()

    def _start(self) -> DeepSpeedEngine:
        """Build the engine; a resuming run restores its last checkpoint."""
        found = last_checkpoint(self.folder / "checkpoints")
        checkpoint = None
        if self.config.resume and found is not None:
            frozen = self.parts.description.frozen
            checkpoint = read_checkpoint(found, self._identity(), frozen)
            load_parameters(self.model, checkpoint.parameters, str(found))
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        initial = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
        }
        engine, values = start_engine(TrainingStep(self.model), self.config)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder / "checkpoints")
            replace_file(self.folder / "config.yaml", partial(save_config, self.config))
            replace_file(self.folder / "deepspeed.json", write_json(values))
        if checkpoint is None:
            restore(engine, self.model, initial)
            # Each rank draws its own dropout and negatives; rank 0 as in a single-process run.
            torch.manual_seed(self.config.seed + self.rank)
        else:
            self.step = checkpoint.step
            restore(engine, self.model, checkpoint.parameters, checkpoint.moments, self.step)
            self._restore_random(checkpoint)
            self.say(f"resumed {checkpoint.path} at step {self.step}")
        keep_temperature(engine, self.model)
        return engine

    def _restore_random(self, checkpoint: Checkpoint) -> None:
        if checkpoint.world_size == self.world_size:
            kept = checkpoint.process(self.rank)
            set_random_states(kept["random"])
            self.progress.restore(kept["progress"], self.device)
            return
        self.say(
            f"{checkpoint.path} is of {checkpoint.world_size} processes, this run has "
            f"{self.world_size}: random states and the sums of the next log line start anew, the "
            "rest continues"
        )
        torch.manual_seed(hash((self.config.seed, self.step, self.rank)))

    def _identity(self) -> dict[str, Any]:
        """The settings that must match between a checkpoint and a resuming run."""
        values = config_values(self.config)
        names = ("stage", "seed", "model", "language_model", "data", "optim")
        same = {name: values[name] for name in names}
        for free in ("workers", "eval_records", "eval_features", "eval_images"):
            same["data"].pop(free)
        for name in ("batch_size", "accumulation"):
            same["optim"].pop(name)
        if same["data"]["positives"] == "image":
            same["data"].pop("positives")  # as in checkpoints that do not know it
        if self.parts.batches.plan.num_records > MOST_SHUFFLED:
            same["shuffle"] = "feistel"
        return {**same, "samples_per_step": self.parts.batches.plan.samples_per_step}

    def run(self) -> dict[str, float]:
        """Train to `optim.max_steps`; returns the last metrics."""
        config, parts = self.config, self.parts
        plan, trained = parts.batches.plan, len(trained_names(self.model))
        self.say(
            f"stage {config.stage}: {config.optim.max_steps} steps of {plan.samples_per_step} "
            f"samples ({config.optim.max_steps / plan.steps_per_epoch:.1f} epochs of "
            f"{plan.num_records}), {trained} trained tensors, {config.precision}, ZeRO "
            f"{config.zero_stage}, {self.world_size} process(es) on {self.device.type}"
        )
        if config.precision != "fp32":
            temperature = ", and the learned temperature of the losses (temp)"
            self.say(
                f"weights and products in {config.precision}; kept in fp32: AdamW's copy of the "
                "trained weights, its moments, softmax and losses"
                f"{temperature if isinstance(self.model, Blip2Stage1) else ''}"
            )
        log = None
        if self.rank == 0:
            log = RunLog(self.folder, self.step, config.optim.max_steps, config.stage)
            self.say = log.say
        try:
            metrics = self._steps(log)
        finally:
            if log is not None:
                log.close()
        self._save_model(self.folder)
        return metrics

    def _steps(self, log: RunLog | None) -> dict[str, float]:
        config, last = self.config, self.config.optim.max_steps
        batches = self._batches(self.step * config.optim.accumulation)
        progress = self.progress
        metrics = self._missing_evaluation(log)
        progress.since = time.perf_counter()
        self.engine.train()
        while self.step < last:
            rate = learning_rate(self.step, config.optim)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            for batch in self._micro_batches(batches):
                loss, scalars = self.engine(**batch)
                self.engine.backward(loss)
                self.engine.step()
                progress.add(scalars)
            keep_temperature(self.engine, self.model)
            self.step += 1
            if log is not None:
                log.advance()
            if self.step % config.log_every == 0 or self.step == last:
                samples = self.parts.batches.plan.samples_per_step
                metrics = progress.take(config.optim.accumulation, samples)
                _check_finite(metrics, self.step)
                if log is not None:
                    log.write(self.step, {**metrics, "lr": rate})
            paused = time.perf_counter()
            if config.save_every and self.step % config.save_every == 0:
                if log is not None:
                    log.flush()
                self._save_checkpoint()
            if self._evaluates_now():
                metrics = self.evaluate()
                if log is not None:
                    log.write(self.step, metrics)
            progress.since += time.perf_counter() - paused
        return metrics

    def _micro_batches(self, batches: Iterator[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The micro-batches of an optimizer step; collected first if ITC contrasts all of them."""
        of_step = islice(batches, self.config.optim.accumulation)
        if not self.config.optim.grad_cache or not isinstance(self.model, Blip2Stage1):
            return of_step
        held = list(of_step)
        shares = step_contrast(partial(self.engine, for_contrast=True), held, self.model.config)
        return [{**batch, "contrast": share} for batch, share in zip(held, shares, strict=True)]

    def _missing_evaluation(self, log: RunLog | None) -> dict[str, float]:
        """Run the evaluation that is due at the resumed checkpoint, if the log does not have it."""
        missing = log is not None and self.step > 0 and not log.has_evaluation(self.step)
        flag = torch.tensor([int(missing)], device=self.device)
        dist.broadcast(flag, 0)
        if not (flag.item() and self._evaluates_now()):
            return {}
        metrics = self.evaluate()
        if log is not None:
            log.write(self.step, metrics)
        return metrics

    def _evaluates_now(self) -> bool:
        if self.parts.held_out is None:
            return False
        every = self.config.eval_every
        return self.step == self.config.optim.max_steps or bool(every and self.step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out set, named `eval_*`; every process must call this."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            metrics = validate(self._whole_model(), self.parts, self.config, self.tokens)
        self.engine.train()
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _whole_model(self) -> Blip2Stage1 | Blip2Stage2:
        """The model in a form that can be called outside the engine.

        Under ZeRO-3 this copies the trained part, whose weights are gathered only inside the
        engine's forward. The language model stays partitioned and is gathered layer by layer.
        """
        if self.config.zero_stage < 3:
            return self.model
        whole: Blip2Stage1 | Blip2Stage2
        if isinstance(self.model, Blip2Stage1):
            whole = Blip2Stage1(self.model.config, losses=self.model.losses)
        else:
            whole = Blip2Stage2(self.model.config, self.model.language_model)
        load_parameters(whole, self._parameters(), "this run")
        for name, child in whole.named_children():
            if name != "language_model":
                child.to(self.device, self.dtype)
        for name, parameter in whole.named_parameters(recurse=False):
            kept = torch.float32 if name == "temp" else self.dtype
            parameter.data = parameter.data.to(self.device, kept)
        return whole

    def tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to the device, with images as tokens [B, S, E] in the run's precision.

        Stage-1 texts stay on the CPU for packing, where reading their lengths needs no sync.
        """
        kept = {"input_ids", "attention_mask"} if isinstance(self.model, Blip2Stage1) else set()
        moved = {
            name: value if name in kept else value.to(self.device, non_blocking=True)
            for name, value in batch.items()
        }
        if "images" in moved:
            if self.parts.image_encoder is None:
                raise ValueError("the batch has images, but there is no image encoder")
            moved["image_embeds"] = self.parts.image_encoder(moved.pop("images"))
        moved["image_embeds"] = moved["image_embeds"].to(self.dtype)
        return moved

    def _batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        optim = self.config.optim
        loader = DataLoader(
            self.parts.batches,
            batch_size=None,
            sampler=range(first, optim.max_steps * optim.accumulation),
            num_workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
            # The loader draws a seed on start; from the global generator, a resume would shift it.
            generator=torch.Generator(),
        )
        return (self.tokens(batch) for batch in loader)

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.folder / "checkpoints",
            replace(self.parts.description, step=self.step),
            self._parameters(),
            optimizer_moments(self.engine, self.model),
            self._identity(),
            {"progress": self.progress.state()},
            self.config.keep_last,
        )

    def _parameters(self) -> dict[str, Tensor]:
        """The full trained parameters in fp32, with scalars back in shape []."""
        whole = master_parameters(self.engine, self.model)
        return {name: value.view(self.shapes[name]) for name, value in whole.items()}

    def _save_model(self, folder: Path) -> None:
        state = self._parameters()
        if self.rank == 0:
            save_model(folder, state, replace(self.parts.description, step=self.step))
        dist.barrier()


def _silent(_: str) -> None:
    """Print nothing; used on all ranks but 0."""


def _check_finite(metrics: Mapping[str, float], step: int) -> None:
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"loss is {metrics['loss']} at step {step}: lower optim.lr, or use precision bf16 or "
            "fp32 instead of fp16"
        )
