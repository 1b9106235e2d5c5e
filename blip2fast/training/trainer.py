"""The training loop: a DeepSpeed engine over planned batches, with evaluation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from blip2fast.checkpoints.trained import trained_names
from blip2fast.data.batches import TakenBatches
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training.agreement import (
    any_process,
    first_process,
    processes_by_machine,
    together,
)
from blip2fast.training.build import Run, build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.engine import (
    gather_trained,
    learning_rate,
    losing_a_process,
    start_processes,
)
from blip2fast.training.engine_state import keep_temperature, lowers_loss_scale
from blip2fast.training.faults import Faults
from blip2fast.training.folder import lock_together, remove_earlier_run
from blip2fast.training.loading import read_batches
from blip2fast.training.log import RunLog
from blip2fast.training.placement import choose_placement
from blip2fast.training.precision import DTYPE_OF
from blip2fast.training.preflight import (
    check_machine,
    check_same_data,
    check_same_run,
    prepare_kernels,
)
from blip2fast.training.restart import last_good, with_start
from blip2fast.training.run_state import RunState
from blip2fast.training.saving import Saver, how_to_use
from blip2fast.training.skipped import SkippedSamples
from blip2fast.training.step_metrics import learning_rates, peak_memory_gib, timed
from blip2fast.training.step_passes import DeviceBatches, step_passes
from blip2fast.training.stopping import RunStopped, StopRequest
from blip2fast.training.validation import validate
from blip2fast.training.weights_and_biases import WandbRun


def train(config: RunConfig, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train to the end; resumes from a checkpoint if `config.resume` is set.

    Every process of the run must call this; a process group is created if there is none.

    Args:
        config: the run.
        say: prints a line (rank 0 only).

    Returns:
        The metrics of the last evaluation, or without a held-out set the last logged ones.

    Raises:
        ValueError: the run cannot start; see `blip2fast.training.preflight.check_machine`. With
            several processes all raise it, also where only one machine has the fault.
        FloatingPointError: a value is not finite; see `RunConfig.on_nonfinite`.
        RunStopped: a signal stopped the run, and a checkpoint was saved.
        ProcessLostError: another process of the run has ended.
    """
    stop = StopRequest()
    device = start_processes()
    with losing_a_process(lambda: last_good(config.output_dir)):
        return _train(config, device, say, stop)


def _train(
    config: RunConfig, device: torch.device, say: Callable[[str], None], stop: StopRequest
) -> dict[str, float]:
    say_first = say if dist.get_rank() == 0 else None
    check_same_run(config)
    together(lambda: check_machine(with_start(config), dist.get_world_size()))
    machines, beside = processes_by_machine()
    together(lambda: prepare_kernels(config, say_first, beside))
    config = choose_placement(config, dist.get_world_size(), machines, say_first)
    with lock_together(config, say):
        parts = _build(with_start(config))
        if parts.start and say_first is not None:
            say_first(parts.start)
        if config.overwrite and dist.get_rank() == 0:
            remove_earlier_run(Path(config.output_dir))
        return Trainer(config, parts, device, say, stop).run()


def _build(config: RunConfig) -> Run:
    """Build the parts of the run, from the same data on every machine."""

    def build() -> Run:
        return build_run(config, dist.get_rank(), dist.get_world_size())

    # the parts of a language model under ZeRO-3 are handed out while it is loaded: a collective
    parts = build() if config.zero_stage == 3 else together(build)
    check_same_data(parts)
    return parts


class Trainer:
    """One training run: the loop over its steps.

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
        self.config, self.parts, self.device, self.model = config, parts, device, parts.model
        self.stop, self._print = stop or StopRequest(), say
        encoder = parts.own_encoder()
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        elif encoder is not None and config.image_encoder.gradient_checkpointing:
            encoder.recompute_blocks()
        if parts.image_encoder is not None:
            parts.image_encoder.to(device)
        self.to_device = DeviceBatches(parts, device, DTYPE_OF[config.precision])
        self.state = RunState(config, parts, device, self.say)
        self.engine = self.state.engine
        self.saver = Saver(self.state)
        self._has_evaluated = False
        self.faults = Faults(self.state, self.to_device, self.say)

    def say(self, line: str) -> None:
        """Print a line, on rank 0 only."""
        if dist.get_rank() == 0:
            self._print(line)

    def run(self) -> dict[str, float]:
        """Train to `optim.max_steps`; returns the last metrics."""
        self._introduce()
        config, log = self.config, together(self._open_log)
        self.state.unusable = self._skipped_samples()
        with (
            log or nullcontext(),
            self.state.unusable or nullcontext(),
            self.stop,  # a launcher's SIGTERM must not cut off what is found about a lost process
            losing_a_process(lambda: last_good(config.output_dir)),
        ):
            metrics = self._steps(log)
            self.saver.save_model()
            description = self.parts.description
            self.say(how_to_use(config.output_dir, description, config.data.task))
            if any_process(self.stop.reason is not None, self.device):
                raise self.stop.complete()
        return metrics

    def _open_log(self) -> RunLog | None:
        """The log, on rank 0; it then prints what is said."""
        if dist.get_rank() > 0:
            return None
        config = self.config
        also = WandbRun(config, self.say) if config.log.wandb else None
        folder, last = Path(config.output_dir), config.optim.max_steps
        log = RunLog(folder, self.state.step, last, config.stage, also)
        self._print = log.say
        return log

    def _skipped_samples(self) -> SkippedSamples | None:
        """The account of unusable samples, where `data.on_error` is `skip`."""
        before = self.parts.left_out
        if before is None:
            return None
        total = self.parts.batches.plan.num_records + len(before.train)
        folder, most = Path(self.config.output_dir), self.config.data.max_skipped
        return SkippedSamples(folder, before, total, most, self.state.step, self.say)

    def _steps(self, log: RunLog | None) -> dict[str, float]:
        config, state, last = self.config, self.state, self.config.optim.max_steps
        batches = self._batches()
        metrics = self._missing_evaluation(log)
        state.progress.since = time.perf_counter()
        self.engine.train()
        while state.step < last:
            rate = learning_rate(state.step, config.optim)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            try:
                self._train_step(batches)
            except (ValueError, OSError):  # a sample that cannot be used
                self._save_before_the_end(log)
                raise
            state.step += 1
            if log is not None:
                log.advance()
            logs_now = state.step % config.log_every == 0 or state.step == last
            saves_now, evaluates_now = self.saver.is_due(), self._evaluates_now()
            stops = self.faults.read_outcomes(wait=logs_now or saves_now or evaluates_now)
            if stops:
                self.faults.read_outcomes(wait=True)
            if logs_now:
                metrics = self._measure()
                if log is not None:
                    log.write(state.step, metrics)
            paused = time.perf_counter()
            if saves_now or stops:
                self.saver.save(log)
            if stops:
                raise self.stop.stopped(state.step, last)
            if evaluates_now:
                metrics = self._evaluate_and_keep(log)
            state.progress.since += time.perf_counter() - paused
        self.faults.say_skipped()
        return metrics

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """An optimizer step: forward and backward passes, and an update if all is finite."""
        optim, sums = self.config.optim, dict[str, Tensor]()
        lowest_scale = not lowers_loss_scale(self.engine)
        passes = step_passes(self.engine, self.model, optim, batches, self.to_device)
        for number, batch in enumerate(passes, 1):
            loss, scalars = self.engine(**batch)
            self.engine.backward(loss)
            sums = {n: sums[n] + v if n in sums else v for n, v in scalars.items()}
            if number == optim.accumulation:
                losses = {n: v for n, v in sums.items() if n.startswith("loss")}
                stop = self.stop.reason is not None
                unusable = self.state.unusable
                news = unusable is not None and unusable.news
                left_out = self.faults.gate.judge(self.state.step + 1, losses, stop, news)
                self.state.progress.add(sums, number, left_out)
            self.engine.step()
        self.faults.gate.record(lowest_scale)
        if not self.engine.was_step_applied():
            gather_trained(self.model)
        keep_temperature(self.engine, self.model)

    def _measure(self) -> dict[str, float]:
        """The metrics of the steps since the last log line."""
        beside = {}
        norm = self.faults.gate.gradient_norm()
        if norm is not None:
            beside["gradient_norm"] = norm
        if isinstance(self.model, Blip2Stage1):
            with torch.no_grad():
                beside["temperature"] = self.model.temperature()
        return {
            **self.state.progress.take(self.parts.batches.plan.samples_per_step, beside),
            **learning_rates(self.engine.optimizer.param_groups),
            "peak_memory_gib": peak_memory_gib(self.device),
        }

    def _evaluates_now(self) -> bool:
        if self.parts.held_out is None:
            return False
        step, every = self.state.step, self.config.eval_every
        return step == self.config.optim.max_steps or bool(every and step % every == 0)

    def _missing_evaluation(self, log: RunLog | None) -> dict[str, float]:
        """Run the evaluation that is due at the resumed checkpoint, if the log does not have it."""
        step = self.state.step
        missing = log is not None and step > 0 and not log.has_evaluation(step)
        if not (first_process(missing, self.device) and self._evaluates_now()):
            return {}
        return self._evaluate_and_keep(log)

    def _evaluate_and_keep(self, log: RunLog | None) -> dict[str, float]:
        """Evaluate, log the metrics, and keep the checkpoint if it is the best."""
        with self._nothing_lost(log):
            metrics = self.evaluate()
        self.saver.keep_if_best(metrics, log)
        if log is not None:
            log.write(self.state.step, metrics)
        return metrics

    @contextmanager
    def _nothing_lost(self, log: RunLog | None) -> Iterator[None]:
        """Have a checkpoint of this step if its evaluation fails, as on a damaged image.

        One of several processes that fails ends the others too, which then cannot save: they do so
        before their first evaluation. Later ones have read the same data.
        """
        if dist.get_world_size() > 1 and not self._has_evaluated:
            self.saver.save_unless_saved(log)
        try:
            yield
        except FloatingPointError:
            raise  # and has saved, if there is anything to save
        except RunStopped:
            self.saver.save_unless_saved(log)
            raise
        except Exception:
            self._save_before_the_end(log)
            raise
        self._has_evaluated = True

    def _save_before_the_end(self, log: RunLog | None) -> None:
        """Save the steps taken before an error that leaves the parameters as they were.

        Not with several processes, as the others may wait elsewhere for this one.
        """
        if dist.get_world_size() == 1:
            self.faults.read_outcomes(wait=True)
            self.saver.save_unless_saved(log)
        self.say(f"the run ends with an error. {last_good(self.config.output_dir)}")

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out set, named `eval_*`; every process must call this."""
        self.saver.finite_parameters()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            whole = self.state.whole_model()
            metrics = validate(whole, self.parts, self.config, self._to_device_in_time)
        self.engine.train()
        self.faults.check_held_out(metrics, before=self.saver.save_unless_saved)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _to_device_in_time(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a held-out batch, unless a stop is pressing: a resume evaluates again.

        Several processes do not read equally many batches, so none of them can leave the others.
        """
        if dist.get_world_size() == 1 and self.stop.presses():
            raise self.stop.stopped(self.state.step, self.config.optim.max_steps)
        return self.to_device(batch)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the micro-steps that are left."""
        passes = self.config.optim.accumulation
        first = self.state.step * passes
        taken = read_batches(
            TakenBatches(self.parts.batches),
            range(first, self.config.optim.max_steps * passes),
            self.config.data.workers,
            self.device.type == "cuda",
            self.say,
        )
        for number, (batch, replaced) in enumerate(timed(taken, self.state.progress), first):
            if self.state.unusable is not None:
                self.state.unusable.add(number // passes + 1, replaced)
            yield batch

    def _introduce(self) -> None:
        config, plan = self.config, self.parts.batches.plan
        self.say(
            f"stage {config.stage}: {config.optim.max_steps} steps of {plan.samples_per_step} "
            f"samples ({config.optim.max_steps / plan.steps_per_epoch:.1f} epochs of "
            f"{plan.num_records}), {len(trained_names(self.model))} trained tensors, "
            f"{config.precision}, ZeRO {config.zero_stage}, {dist.get_world_size()} process(es) on "
            f"{self.device.type}"
        )
        if config.precision != "fp32":
            temperature = ", and the learned temperature of the losses (temp)"
            self.say(
                f"weights and products in {config.precision}; kept in fp32: AdamW's copy of the "
                "trained weights, its moments, softmax and losses"
                f"{temperature if isinstance(self.model, Blip2Stage1) else ''}"
            )
