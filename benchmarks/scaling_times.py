"""Time and peak memory against B, N and S on this machine, ours and the textbook's, in turns.

A Q-Former a quarter as wide, of a third of the layers, so that a sweep takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench_itc import Inputs, agree, providers
from comparing import Race
from shapes import VIT_G, ITCShape, Shape
from stage1_contenders import judged_provider, make_batch, make_models, step_provider
from timing import Spread

CPU, FP32 = torch.device("cpu"), torch.float32
NARROW = Shape(
    replace(
        VIT_G,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        encoder_hidden_size=352,
        vocab_size=4096,
        bos_token_id=4095,
    ),
    batch=4,
    image_tokens=65,
)
OURS, TEXTBOOK = "blip2fast", "textbook"
OUR_ITC, PLAIN_ITC = "blip2fast auto", "torch matmul, amax"
# relative norm of the difference between ours and the textbook's
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TimedSweep:
    """One size that is varied.

    Attributes:
        values: Of the size.
        race: The contenders at a value, checked.
    """

    values: tuple[int, ...]
    race: Callable[[int], Race[Any]]


def contrast(pairs: int) -> Race[Any]:
    """ITC with its gradients and negatives, over N pairs of 32 queries, width 256."""
    shape = ITCShape(pairs)
    race = Race(lambda seed: Inputs(shape, FP32, CPU, True, seed), agree, CPU, timed=True)
    found = providers(compiled=False)
    for name in (OUR_ITC, PLAIN_ITC):
        race.enter(name, found[name])
    return race


def step(shape: Shape) -> Race[Any]:
    """A stage-1 step: forward, backward, optimiser."""
    batch = make_batch(shape, CPU)
    models = make_models(shape, CPU, (OURS, TEXTBOOK))
    seen: list[Mapping[str, Any]] = []

    def alike(_: Any, found: Mapping[str, Any]) -> None:
        seen.append(found)
        for name, expected in seen[0].items():
            error = float((found[name] - expected).norm() / expected.norm())
            assert error < _TOLERANCE, f"{name}: relative error {error:.1e}"

    race: Race[Any] = Race(lambda seed: None, alike, CPU, timed=True)
    for name, model in models.items():
        judged = judged_provider(model, batch, FP32, name)
        race.enter(name, step_provider(model, batch, FP32, name), judged)
    return race


SWEEPS = {
    "N": TimedSweep((64, 128, 256, 512, 1024, 2048), contrast),
    "B": TimedSweep((4, 8, 16, 32), lambda x: step(replace(NARROW, batch=x))),
    "S": TimedSweep((33, 65, 129, 257, 513, 1025), lambda x: step(replace(NARROW, image_tokens=x))),
}


def measure(
    sweep: TimedSweep, rounds: int = 5, say: Callable[[str], None] = lambda line: None
) -> dict[int, dict[str, dict[str, Any]]]:
    """Medians, quartiles and peaks by value and contender.

    Raises:
        RuntimeError: a contender's result is wrong, or it breaks.
    """
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for value in sweep.values:
        race = sweep.race(value)
        if race.failures():
            raise RuntimeError(f"{value}: {race.failures()}")
        running = race.running()
        for turn in range(rounds):
            for place in range(len(running)):
                running[(turn + place) % len(running)].take()
        found[value] = {}
        for entry in race.entries:
            spread = Spread.of([sample[""] for sample in entry.samples])
            found[value][entry.name] = {**vars(spread), "peak_bytes": entry.peak_bytes}
        told = ", ".join(f"{n} {x['median_s']:.4g} s" for n, x in found[value].items())
        say(f"{value}: {told}")
    return found
