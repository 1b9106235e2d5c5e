"""What a run does about steps and metrics that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from blip2fast.training.finite import Outcome, StepGate, some_of
from blip2fast.training.finite_causes import explain, explain_held_out, frozen_weights
from blip2fast.training.restart import last_good
from blip2fast.training.run_state import RunState
from blip2fast.training.step_passes import DeviceBatches


class Faults:
    """Answers the outcomes of steps as `on_nonfinite` says; every process must call its methods.

    Args:
        state: of the run; its counts of skipped steps are kept here.
        to_device: moves a batch.
        say: prints a line.

    Attributes:
        gate: decides of each step whether it updates the parameters.
    """

    def __init__(
        self, state: RunState, to_device: DeviceBatches, say: Callable[[str], None]
    ) -> None:
        self._state, self._config, self._to_device, self._say = state, state.config, to_device, say
        stays_closed = state.config.on_nonfinite == "raise"
        clip_norm = state.config.optim.clip_norm
        self.gate = StepGate(state.engine, state.device, stays_closed, clip_norm)

    def read_outcomes(self, wait: bool) -> bool:
        """Act on the outcomes of steps; returns whether to stop, alike on every process.

        Args:
            wait: also for the last step's outcome.

        Raises:
            FloatingPointError: a step was not finite, and `on_nonfinite` does not allow it.
            ValueError: more samples are unusable than `data.max_skipped` allows.
        """
        state, stops, outcomes = self._state, False, self.gate.outcomes(wait)
        if state.unusable is not None and any(outcome.news for outcome in outcomes):
            try:
                state.progress.replaced += state.unusable.exchange()
            except ValueError as error:
                raise ValueError(f"{error}. {self._last_good()}") from None
        for outcome in outcomes:
            stops = stops or outcome.stop
            if outcome.rescaled:
                state.progress.skipped += 1
                state.rescaled += 1
            if outcome.nonfinite:
                state.progress.skipped += 1
                state.skipped += 1
                self._answer(outcome)
        return stops

    def check_held_out(self, metrics: Mapping[str, float], before: Callable[[], None]) -> None:
        """Raise if a metric of the held-out set is not finite.

        Args:
            metrics: alike on every process.
            before: called before it raises, so that the training is not lost.

        Raises:
            FloatingPointError: with the images that it comes from.
        """
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not bad:
            return
        before()
        raise FloatingPointError(
            f"held-out data, step {self._state.step}: {some_of(bad)} not finite: "
            f"{explain_held_out(self._state.parts, self._to_device)}. {self._last_good()}"
        )

    def say_skipped(self) -> None:
        """Say at the end how many steps did not update the parameters."""
        if self._state.skipped:
            self._say(f"{self._state.skipped} step(s) were skipped, as they were not finite")
        if self._state.rescaled:
            self._say(f"{self._state.rescaled} step(s) only lowered the loss scale of fp16")

    def _answer(self, outcome: Outcome) -> None:
        """Report a step that was not finite; raises unless the run skips it and goes on."""
        state, batches = self._state, self._state.parts.batches
        count = self._config.optim.accumulation
        first = (outcome.step - 1) * count
        found, bad_parameters = explain(
            outcome,
            state.parameters(),
            frozen_weights(state.parts),
            (batches[first + i] for i in range(count)),
            [key for i in range(count) for key in batches.keys(first + i)],
            self._to_device,
        )
        limit = self._config.skip_limit
        if self._config.on_nonfinite == "raise" or bad_parameters:
            raise FloatingPointError(f"{found}. {self._last_good()}")
        if state.skipped > limit:
            raise FloatingPointError(
                f"{found}. {state.skipped} steps of the run were skipped, more than skip_limit "
                f"{limit}. {self._last_good()}"
            )
        self._say(f"{found}. Skipped ({state.skipped} of at most {limit})")

    def _last_good(self) -> str:
        return last_good(self._config.output_dir)
