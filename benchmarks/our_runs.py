"""Real runs of this library, from their first step to the last that is timed.

`blip2fast.training.trainer.train` does everything, as for `blip2fast train`: it builds the run from
its configuration, starts the loader and its workers, and logs. What is added is a clock, and the
end after as many steps as are timed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from run_clock import PartClock
from torch import Tensor

from blip2fast import Blip2
from blip2fast.inference import captioning
from blip2fast.inference.captioning import Outputs, caption_files
from blip2fast.training import trainer
from blip2fast.training.config import RunConfig
from blip2fast.training.log import RunLog

# first steps, whose losses are compared; until then everything is warm, too
JUDGED = 2
# the parts, in the order of a step
DATA, ENCODER, FORWARD, BACKWARD = "data", "image encoder", "forward", "backward"
OPTIMISER, LOGGING = "optimiser", "logging"
QFORMER, LANGUAGE = "Q-Former", "language model"

Negatives = tuple[Tensor, Tensor]


@dataclass
class Steps:
    """What a run did.

    Attributes:
        losses: of the first `JUDGED` steps.
        parts: seconds of a step by part; empty where none was timed.
        whole: seconds of a step.
    """

    losses: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    whole: float = 0.0

    def take(self, clock: PartClock, count: int) -> None:
        """Take over what a stopped clock says of so many steps."""
        self.whole = clock.whole() / count
        self.parts = {part: seconds / count for part, seconds in clock.seconds().items()}

    def times(self) -> dict[str, float]:
        """As a sampler gives them."""
        return {"": self.whole, **self.parts}


def fixed_negatives(batch: int, device: torch.device) -> Negatives:
    """The negatives of the first `JUDGED` steps, which are otherwise drawn."""
    others = (torch.arange(batch, device=device) + 1) % batch
    return others, (others + 1) % batch


class _Enough(Exception):
    """All steps that are timed have been taken."""


class _TimedTrainer(trainer.Trainer):
    """A trainer with a clock, which ends after the timed steps."""

    def __init__(self, found: Steps, steps: int, *args: Any) -> None:
        super().__init__(*args)
        self._found, self._count = found, steps
        self._clock = clock = PartClock(self.device)
        if self.parts.image_encoder is not None:
            clock.watch(ENCODER, self.parts.image_encoder)
        clock.watch(FORWARD, self.engine)
        self.engine.register_forward_hook(self._note_loss)
        self.engine.backward = clock.wrapped(BACKWARD, self.engine.backward)
        self.engine.step = clock.wrapped(OPTIMISER, self.engine.step)
        gate: Any = self.faults.gate
        gate.judge = clock.wrapped(OPTIMISER, gate.judge)
        self._measure = clock.wrapped(LOGGING, self._measure)
        self._move = self.to_device
        self.to_device: Any = self._with_negatives

    def _open_log(self) -> RunLog | None:
        log: Any = super()._open_log()
        for name in ("write", "advance"):
            setattr(log, name, self._clock.wrapped(LOGGING, getattr(log, name)))
        return log

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return self._clock.waits(DATA, super()._batches())

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        taken = self.state.step - JUDGED
        if taken == self._count:
            if self._count:
                self._clock.stop()
                self._found.take(self._clock, self._count)
            raise _Enough
        if taken == 0:
            self._clock.start()
        super()._train_step(batches)

    def _with_negatives(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        moved: dict[str, Any] = self._move(batch)
        if self.state.step < JUDGED and self.config.stage == 1:
            moved["negatives"] = fixed_negatives(self.config.optim.batch_size, self.device)
        return moved

    def _note_loss(self, module: Any, given: Any, returned: Any) -> None:
        if len(self._found.losses) < JUDGED:
            self._found.losses.append(float(returned[0].detach()))


def train_steps(config: RunConfig, steps: int) -> Steps:
    """Train by a configuration: `JUDGED` steps, and then as many as are timed."""
    found = Steps()
    with patch.object(trainer, "Trainer", partial(_TimedTrainer, found, steps)):
        try:
            trainer.train(config, say=lambda line: None)
        except _Enough as enough:
            enough.__traceback__ = None  # its frames hold the loader, whose workers would go on
    gc.collect()  # engines are in cycles
    return found


def caption_folder(
    model: Blip2, pictures: list[Path], out: Path, batch: int, beams: int, new_tokens: int
) -> tuple[list[str], dict[str, float]]:
    """Caption pictures as `blip2fast caption --out` does; their captions, and seconds by part."""
    clock = PartClock(model.device)
    inner: Any = model.model
    read_ahead: Callable[..., Iterator[Any]] = captioning.read_ahead
    options: Any = {"num_beams": beams, "max_new_tokens": new_tokens}
    written = patch.object(inner, "generate", clock.wrapped(LANGUAGE, inner.generate))
    waited = patch.object(
        captioning, "read_ahead", lambda *given: clock.waits(DATA, read_ahead(*given))
    )
    with clock.watching({ENCODER: inner.image_encoder, QFORMER: inner.qformer}), written, waited:
        clock.start()
        caption_files(model, pictures, Outputs(out=out), options, batch_size=batch)
        clock.stop()
    lines = out.read_text().splitlines()
    captions = [json.loads(line)["captions"][0] for line in lines]
    return captions, {"": clock.whole(), **clock.seconds()}
