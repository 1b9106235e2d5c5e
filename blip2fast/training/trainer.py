"""The training loop: a DeepSpeed engine over planned batches, with evaluation and checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.kept import (
    Kept,
    read_best,
    remove_others,
    remove_unfinished,
    write_best,
)
from blip2fast.checkpoints.resume import (
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
    set_random_states,
)
from blip2fast.checkpoints.trained import (
    is_trained,
    load_parameters,
    save_model,
    trained_names,
)
from blip2fast.data.manifest import replace_file, write_json
from blip2fast.data.order import MOST_SHUFFLED
from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run, build_run
from blip2fast.training.config import DTYPE_OF, RunConfig
from blip2fast.training.config_files import save_config
from blip2fast.training.engine import (
    gather_trained,
    learning_rate,
    losing_a_process,
    start_engine,
    start_processes,
)
from blip2fast.training.engine_state import (
    keep_temperature,
    lowers_loss_scale,
    master_parameters,
    optimizer_moments,
    optimizer_state,
    restore,
    restore_loss_scale,
)
from blip2fast.training.finite import Outcome, StepGate, nonfinite_names, some_of
from blip2fast.training.finite_causes import explain, explain_held_out, frozen_weights
from blip2fast.training.folder import FolderLock, folder_faults, remove_earlier_run
from blip2fast.training.loading import read_batches
from blip2fast.training.log import Progress, RunLog
from blip2fast.training.placement import choose_placement
from blip2fast.training.preflight import check_machine, prepare_kernels
from blip2fast.training.restart import check_steps, record_start, run_identity
from blip2fast.training.stopping import RunStopped, StopRequest
from blip2fast.training.validation import validate
from blip2fast.training.word_means import Weights, pass_weights, weighted

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class TrainingStep(nn.Module):
    """The module that the engine wraps; returns the loss, and other scalars detached.

    DeepSpeed traverses everything that its module returns, so logits and features are not returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, *, for_contrast: bool = False, weights: Weights | None = None, **batch: Any
    ) -> tuple[Any, ...]:
        """Return `(loss, scalars)` of the model, or with `for_contrast` its `features`.

        Args:
            weights: the weights of the losses in their optimizer step, from `pass_weights`.
        """
        if for_contrast:
            return cast(Blip2Stage1, self.model).features(**batch)
        found = weighted(self.model(**batch), weights or {})
        return found["loss"], {name: value.detach().float() for name, value in found.items()}


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
        FloatingPointError: a value is not finite; see `RunConfig.on_nonfinite`.
        RunStopped: a signal stopped the run, and a checkpoint was saved.
    """
    stop = StopRequest()
    device = start_processes()
    check_machine(_with_start(config), dist.get_world_size())
    prepare_kernels(config, say if dist.get_rank() == 0 else None)
    machines = max(1, dist.get_world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    config = choose_placement(
        config, dist.get_world_size(), machines, say if dist.get_rank() == 0 else None
    )
    with _locked(config, say):
        parts = build_run(_with_start(config), dist.get_rank(), dist.get_world_size())
        if parts.start and dist.get_rank() == 0:
            say(parts.start)
        if config.overwrite and dist.get_rank() == 0:
            remove_earlier_run(Path(config.output_dir))
        return Trainer(config, parts, device, say, stop).run()


def _with_start(config: RunConfig) -> RunConfig:
    """A resuming run whose `init_from` has been deleted is built from its own checkpoint."""
    if not config.resume or config.init_from is None or is_trained(config.init_from):
        return config
    last = last_checkpoint(Path(config.output_dir) / "checkpoints")
    return config if last is None else replace(config, init_from=str(last))


def _locked(config: RunConfig, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    """Lock the output folder on rank 0; every process must call this.

    Raises:
        ValueError: another run is in it, or has been since `check_machine`.
    """
    faults: list[str | None] = [None]
    lock: AbstractContextManager[Any] = nullcontext()
    if dist.get_rank() == 0:
        folder = Path(config.output_dir)
        try:
            lock = FolderLock(folder, say)
            faults[0] = "; ".join(folder_faults(folder, config.resume, config.overwrite)) or None
        except (ValueError, OSError) as error:
            faults[0] = str(error)
    dist.broadcast_object_list(faults)
    if faults[0] is not None:
        with lock:
            raise ValueError(faults[0])
    return lock


class Trainer:
    """One training run: its engine and its state.

    Args:
        config: the run.
        parts: model, data and the other parts of the run.
        device: the device of this process.
        say: prints a line; called on rank 0 only.
        stop: notes requests to stop, during `run`.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Run,
        device: torch.device,
        say: Callable[[str], None],
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.parts, self.device = config, parts, device
        self.stop = stop or StopRequest()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.say = say if self.rank == 0 else _silent
        self.dtype = DTYPE_OF[config.precision]
        self.folder = Path(config.output_dir)
        self.model = parts.model
        self.step = 0
        self.skipped = self.rescaled = 0
        self._saved = 0  # step of the last checkpoint
        self.progress = Progress({})
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if parts.image_encoder is not None:
            parts.image_encoder.to(device)
        self.engine = self._start()
        self.gate = StepGate(self.engine, device, stays_closed=config.on_nonfinite == "raise")

    def _start(self) -> DeepSpeedEngine:
        """Build the engine; a resuming run restores its last checkpoint."""
        found = last_checkpoint(self.folder / "checkpoints")
        checkpoint = None
        if self.config.resume and found is not None:
            frozen = self.parts.description.frozen
            checkpoint = read_checkpoint(found, self._identity(), frozen)
            check_steps(self.config, checkpoint.step, found)
            load_parameters(self.model, checkpoint.parameters, str(found))
            self.step = self._saved = checkpoint.step
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        initial = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
        }
        bad = nonfinite_names(initial)
        if bad:
            source = found if checkpoint is not None else f"init_from {self.config.init_from!r}"
            raise ValueError(f"{source}: {some_of(bad)} not finite: start from another model")
        engine, values = start_engine(TrainingStep(self.model), self.config)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder / "checkpoints")
            record_start(self.folder, self.config, self.step, self.world_size, self.say)
            replace_file(self.folder / "config.yaml", partial(save_config, self.config))
            replace_file(self.folder / "deepspeed.json", write_json(values))
        if checkpoint is None:
            restore(engine, self.model, initial)
            # Each rank draws its own dropout and negatives; rank 0 as in a single-process run.
            torch.manual_seed(self.config.seed + self.rank)
        else:
            kept = checkpoint.state["optimizer"]
            restore(engine, self.model, checkpoint.parameters, checkpoint.moments, kept["updates"])
            restore_loss_scale(engine, kept)
            self.skipped, self.rescaled = (checkpoint.state[n] for n in ("skipped", "rescaled"))
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
        plan = self.parts.batches.plan
        same = run_identity(self.config, plan.samples_per_step, self.parts.contents)
        if same["data"]["positives"] == "image":
            same["data"].pop("positives")  # as in checkpoints that do not know it
        if plan.num_records > MOST_SHUFFLED:
            same["shuffle"] = "feistel"
        return same

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
            with self.stop, losing_a_process(self._last_good):
                metrics = self._steps(log)
                self._save_model(self.folder)
                if self._stops_at_end():
                    raise RunStopped(
                        f"the run is complete; stopped by {self._reason()}", self.stop.exit_code
                    )
        finally:
            if log is not None:
                log.close()
        return metrics

    def _stops_at_end(self) -> bool:
        """Whether a process was asked to stop since the last step; alike on every process."""
        flag = torch.tensor([int(self.stop.reason is not None)], device=self.device)
        if self.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _reason(self) -> str:
        return self.stop.reason or "a signal to another process"

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
            self._train_step(batches)
            self.step += 1
            if log is not None:
                log.advance()
            logs_now = self.step % config.log_every == 0 or self.step == last
            saves_now = bool(config.save_every) and self.step % config.save_every == 0
            evaluates_now = self._evaluates_now()
            stops = self._read_outcomes(wait=logs_now or saves_now or evaluates_now)
            if stops:
                self._read_outcomes(wait=True)
            if logs_now:
                metrics = progress.take(self.parts.batches.plan.samples_per_step)
                if log is not None:
                    log.write(self.step, {**metrics, "lr": rate})
            paused = time.perf_counter()
            if saves_now or stops:
                if log is not None:
                    log.flush()
                self._save_checkpoint()
            if stops:
                raise self._stopped()
            if evaluates_now:
                metrics = self._evaluate_and_keep(log)
            progress.since += time.perf_counter() - paused
        self._say_skipped()
        return metrics

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """An optimizer step: forward and backward passes, and an update if all is finite."""
        passes, sums = self.config.optim.accumulation, dict[str, Tensor]()
        lowest_scale = not lowers_loss_scale(self.engine)
        for number, batch in enumerate(self._micro_batches(batches), 1):
            loss, scalars = self.engine(**batch)
            self.engine.backward(loss)
            sums = {n: sums[n] + v if n in sums else v for n, v in scalars.items()}
            if number == passes:
                losses = {n: v for n, v in sums.items() if n.startswith("loss")}
                stop = self.stop.reason is not None
                left_out = self.gate.judge(self.step + 1, losses, stop)
                self.progress.add(sums, passes, left_out)
            self.engine.step()
        self.gate.record(lowest_scale)
        if not self.engine.was_step_applied():
            gather_trained(self.model)
        keep_temperature(self.engine, self.model)

    def _read_outcomes(self, wait: bool) -> bool:
        """Act on the outcomes of steps; returns whether to stop, alike on every process.

        Raises:
            FloatingPointError: a step was not finite, and `on_nonfinite` does not allow it.
        """
        stops = False
        for outcome in self.gate.outcomes(wait):
            stops = stops or outcome.stop
            if outcome.rescaled:
                self.progress.skipped += 1
                self.rescaled += 1
            if outcome.nonfinite:
                self.progress.skipped += 1
                self.skipped += 1
                self._answer_nonfinite(outcome)
        return stops

    def _answer_nonfinite(self, outcome: Outcome) -> None:
        """Report a step that was not finite; raises unless the run skips it and goes on."""
        first = (outcome.step - 1) * self.config.optim.accumulation
        count = self.config.optim.accumulation
        found, bad_parameters = explain(
            outcome,
            {**frozen_weights(self.model), **self._parameters()},
            (self.parts.batches[first + i] for i in range(count)),
            [key for i in range(count) for key in self.parts.batches.keys(first + i)],
            self.tokens,
        )
        limit = self.config.skip_limit
        if self.config.on_nonfinite == "raise" or bad_parameters:
            raise FloatingPointError(f"{found}. {self._last_good()}")
        if self.skipped > limit:
            raise FloatingPointError(
                f"{found}. {self.skipped} steps of the run were skipped, more than skip_limit "
                f"{limit}. {self._last_good()}"
            )
        self.say(f"{found}. Skipped ({self.skipped} of at most {limit})")

    def _last_good(self) -> str:
        """What there is to resume from, as a sentence."""
        last = last_checkpoint(self.folder / "checkpoints")
        if last is None:
            return "No checkpoint was saved"
        return f"The last checkpoint is good: resume: true continues from {last}"

    def _say_skipped(self) -> None:
        if self.skipped:
            self.say(f"{self.skipped} step(s) were skipped, as they were not finite")
        if self.rescaled:
            self.say(f"{self.rescaled} step(s) only lowered the loss scale of fp16")

    def _stopped(self) -> RunStopped:
        return RunStopped(
            f"stopped by {self._reason()} after step {self.step} of "
            f"{self.config.optim.max_steps}; saved. To go on, run the same command with --set "
            "resume=true",
            self.stop.exit_code,
        )

    def _micro_batches(self, batches: Iterator[dict[str, Tensor]]) -> Iterable[dict[str, Any]]:
        """The arguments of the forward passes of an optimizer step.

        They are moved to the device one by one, unless ITC contrasts all of them.
        """
        optim = self.config.optim
        if optim.word_mean == "per_pass" or optim.accumulation * self.world_size == 1:
            weights: Iterable[Weights] = repeat({})
            of_step: Iterable[dict[str, Tensor]] = islice(batches, optim.accumulation)
        else:
            of_step = list(islice(batches, optim.accumulation))
            weights = pass_weights(self.model, of_step, self.device)
        moved = ({**self.tokens(b), "weights": w} for b, w in zip(of_step, weights, strict=False))
        if not optim.grad_cache or not isinstance(self.model, Blip2Stage1):
            return moved
        held = list(moved)
        alone = [{n: v for n, v in batch.items() if n != "weights"} for batch in held]
        shares = step_contrast(partial(self.engine, for_contrast=True), alone, self.model.config)
        return [{**batch, "contrast": share} for batch, share in zip(held, shares, strict=True)]

    def _missing_evaluation(self, log: RunLog | None) -> dict[str, float]:
        """Run the evaluation that is due at the resumed checkpoint, if the log does not have it."""
        missing = log is not None and self.step > 0 and not log.has_evaluation(self.step)
        flag = torch.tensor([int(missing)], device=self.device)
        dist.broadcast(flag, 0)
        if not (flag.item() and self._evaluates_now()):
            return {}
        return self._evaluate_and_keep(log)

    def _evaluate_and_keep(self, log: RunLog | None) -> dict[str, float]:
        """Evaluate, log the metrics, and keep the checkpoint if it is the best."""
        metrics = self.evaluate()
        metric = self.config.keep_best
        if metric is not None:
            self._keep_if_best(metric, metrics[f"eval_{metric}"], log)
        if log is not None:
            log.write(self.step, metrics)
        return metrics

    def _keep_if_best(self, metric: str, value: float, log: RunLog | None) -> None:
        folder = self.folder / "checkpoints"
        decided = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.rank == 0:
            before = read_best(folder)
            if before is None or before["metric"] != metric:
                better = True
            elif metric.startswith("loss"):
                better = value < before["value"]
            else:
                better = value > before["value"]
            decided += int(better)
        dist.broadcast(decided, 0)
        if not decided.item():
            return
        if self._saved != self.step:
            if log is not None:
                log.flush()
            self._save_checkpoint()
        if self.rank == 0:
            write_best(folder, self.step, metric, value)
            remove_others(folder, self._kept())
        dist.barrier()

    def _kept(self) -> Kept:
        return Kept(self.config.keep_last, self.config.keep_every)

    def _evaluates_now(self) -> bool:
        if self.parts.held_out is None:
            return False
        every = self.config.eval_every
        return self.step == self.config.optim.max_steps or bool(every and self.step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out set, named `eval_*`; every process must call this."""
        self._finite_parameters()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            metrics = validate(self._whole_model(), self.parts, self.config, self.tokens)
        self.engine.train()
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            if self._saved != self.step:
                self._save_checkpoint()
            raise FloatingPointError(
                f"held-out data, step {self.step}: {some_of(bad)} not finite: "
                f"{explain_held_out(self.parts, self.tokens)}. {self._last_good()}"
            )
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
        end = self.config.optim.max_steps * self.config.optim.accumulation
        return read_batches(
            self.parts.batches,
            range(first, end),
            self.config.data.workers,
            self.device.type == "cuda",
            self.say,
        )

    def _save_checkpoint(self) -> None:
        parameters = self._finite_parameters()
        moments = optimizer_moments(self.engine, self.model)
        self._refuse_nonfinite(moments)
        state = {
            "run": self._identity(),
            "optimizer": optimizer_state(self.engine),
            "skipped": self.skipped,
            "rescaled": self.rescaled,
        }
        try:
            save_checkpoint(
                self.folder / "checkpoints",
                replace(self.parts.description, step=self.step),
                parameters,
                moments,
                state,
                {"progress": self.progress.state()},
                self._kept(),
            )
        except OSError as error:
            raise OSError(
                f"step {self.step}: no checkpoint: {error}. {self._last_good()}"
            ) from error
        self._saved = self.step

    def _finite_parameters(self) -> dict[str, Tensor]:
        """The parameters, to be saved or evaluated.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        parameters = self._parameters()
        self._refuse_nonfinite(parameters)
        return parameters

    def _refuse_nonfinite(self, tensors: Mapping[str, Tensor]) -> None:
        bad = nonfinite_names(tensors)
        if bad:
            raise FloatingPointError(
                f"step {self.step}: {some_of(bad)} not finite after the update: lower optim.lr. "
                f"Neither saved nor evaluated. {self._last_good()}"
            )

    def _parameters(self) -> dict[str, Tensor]:
        """The full trained parameters in fp32, with scalars back in shape []."""
        whole = master_parameters(self.engine, self.model)
        return {name: value.view(self.shapes[name]) for name, value in whole.items()}

    def _save_model(self, folder: Path) -> None:
        state = self._finite_parameters()
        if self.rank == 0:
            try:
                save_model(folder, state, replace(self.parts.description, step=self.step))
            except OSError as error:
                raise OSError(f"the trained model: {error}. {self._last_good()}") from error
        dist.barrier()


def _silent(_: str) -> None:
    """Print nothing; used on all ranks but 0."""
