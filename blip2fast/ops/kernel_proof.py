"""One check of kernels: accurate, complete, deterministic, and faster than `auto`'s alternative.

Runs in the worker process (`_check_worker.py`), on cases from `kernel_cases.py`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# seconds to time each backend in a race
RACE_S = 0.02
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


class NotCheckable(RuntimeError):
    """The check cannot run in this process; says nothing about the kernels."""


@dataclass(frozen=True)
class Case:
    """One computation in three implementations.

    Attributes:
        name: For messages.
        inputs: Leaf tensors in the dtypes under test, with `requires_grad` set where needed.
        run: Maps a backend's name to its function of the inputs.
        plain: The same in plain PyTorch and these dtypes: its error sets the tolerance.
        truth: The definition; called with the inputs in fp64.
        outputs: Names of the outputs; differentiable ones get a random gradient.
        grad_rounding: Additional relative rounding of gradients that the interface causes.
    """

    name: str
    inputs: Sequence[Tensor]
    run: Callable[[str], Run]
    plain: Run
    truth: Run
    outputs: Sequence[str]
    grad_rounding: float = 0.0


@dataclass(frozen=True)
class Problem:
    """The test problem of a kind of call.

    Attributes:
        cases: Small cases, with partial tiles in every dimension.
        race: A case of realistic size, only timed; None: timings mean nothing here.
    """

    cases: Sequence[Case]
    race: Case | None = None


@dataclass
class Results:
    """Outputs and gradients of a case by name, and the output gradients that were used."""

    values: dict[str, Tensor]
    douts: list[Tensor] = field(default_factory=list)


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the check that a `kernel_checks.Request` describes.

    Returns:
        `fault`, empty if there is none, and `ours_us` and `rival_us`, 0 if not timed.
    """
    device = torch.device(request["device"])
    card = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if card != request["card"]:
        raise NotCheckable(f"{device} is {card} here, and {request['card']} where it was asked for")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    module, _, name = request["source"].partition(":")
    problem: Problem = getattr(importlib.import_module(module), name)(request["kind"], device)
    timed = {"ours_us": 0.0, "rival_us": 0.0}
    if request["compile_only"]:
        for case in (*problem.cases, *filter(None, [problem.race])):
            compute(case.run(request["backend"]), case.inputs, case.outputs)
        return {"fault": "", **timed}
    for case in problem.cases:
        fault = examine(case, request["backend"], device)
        if fault:
            return {"fault": f"{case.name}: {fault}", **timed}
    if problem.race is None or not request["rival"]:
        return {"fault": "", **timed}
    ours, rival = race(problem.race, (request["backend"], request["rival"]), device)
    timed = {"ours_us": ours, "rival_us": rival}
    fault = ""
    if ours > rival:
        fault = (
            f"slower: {ours:.0f} us forward and backward, {request['rival']} takes {rival:.0f} "
            f"({problem.race.name})"
        )
    return {"fault": fault, **timed}


def examine(case: Case, backend: str, device: torch.device) -> str:
    """What is wrong with a backend's results; an empty string if nothing is.

    Allocated memory is filled with NaN, so that elements a kernel fails to write are detected.
    """
    with _PoisonedMemory(device):
        ours = compute(case.run(backend), case.inputs, case.outputs, seed=9)
        fault = _not_finite(ours)
        if fault:
            return fault
        again = compute(case.run(backend), case.inputs, case.outputs, seed=9)
    for name, value in ours.values.items():
        if not torch.equal(value, again.values[name]):
            return f"{name} differs between two runs on the same inputs"
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in case.inputs
    ]
    truth = compute(case.truth, wide, case.outputs, douts=ours.douts)
    plain = compute(case.plain, case.inputs, case.outputs, douts=ours.douts)
    for place, (name, exact) in enumerate(truth.values.items()):
        rounding = case.grad_rounding if place >= len(case.outputs) else 0.0
        fault = _inexact(ours.values[name], plain.values[name], exact, rounding)
        if fault:
            return f"{name}: {fault}"
    return ""


def compute(
    function: Run,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    *,
    douts: Sequence[Tensor] = (),
    seed: int = 0,
) -> Results:
    """Outputs of a function, and the gradient of every leaf that requires one.

    Args:
        function: Of the inputs.
        inputs: Leaves.
        names: Of the outputs.
        douts: Gradients of the differentiable outputs; by default random, from `seed`.
    """
    outputs = dict(zip(names, function(inputs), strict=True))
    learning = [out for out in outputs.values() if out.requires_grad]
    if not douts:
        device = inputs[0].device
        generator = torch.Generator(device).manual_seed(seed)
        douts = [
            torch.randn(out.shape, generator=generator, device=device).to(out) for out in learning
        ]
    values = {name: out.detach() for name, out in outputs.items()}
    leaves = {f"gradient {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    if learning and leaves:
        given = [dout.to(out) for dout, out in zip(douts, learning, strict=True)]
        grads = torch.autograd.grad(learning, list(leaves.values()), given)
        values |= dict(zip(leaves, grads, strict=True))
    return Results(values, list(douts))


def _not_finite(results: Results) -> str:
    """Report the first NaN, from unwritten memory or computed. Infinities are valid values."""
    for name, value in results.values.items():
        if not value.is_floating_point() or value.numel() == 0:
            continue
        bad = value.isnan()
        if not bool(bad.any()):
            continue
        first = bad.nonzero()[0].tolist()
        rows = bad.reshape(bad.shape[0], -1).all(1) if bad.dim() > 1 else bad
        poison = torch.full_like(value, torch.nan)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
        if not torch.equal(value.view(bits)[bad], poison.view(bits)[bad]):
            return f"{name} is NaN at {first}, and at {int(bad.sum()) - 1} more places"
        where = f"row {first[0]}" if bool(rows[first[0]]) else f"{first}"
        return f"{name} was not written at {where} (of {int(bad.sum())} elements in all)"
    return ""


def _inexact(ours: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> str:
    """Where the error exceeds twice PyTorch's in this dtype plus one rounding.

    The limit applies to the largest error and, more tightly, to the root of the sum of squares.
    """
    if ours.shape != exact.shape or ours.dtype != plain.dtype:
        return f"expected {list(exact.shape)} {plain.dtype}, got {list(ours.shape)} {ours.dtype}"
    if not exact.is_floating_point():
        return "" if torch.equal(ours, exact) else "differs from the definition"
    if exact.numel() == 0:
        return ""
    infinite = exact.isinf()
    if not torch.equal(ours.double()[infinite], exact[infinite]) or ours[~infinite].isinf().any():
        return "is infinite elsewhere than the definition"
    x, y, z = (value.double().masked_fill(infinite, 0) for value in (ours, plain, exact))
    error, other = (x - z).abs(), (y - z).abs()
    # storing a value rounds once; of a single value PyTorch may have hit the very best by chance
    floor = torch.finfo(ours.dtype).eps * (0.5 if exact.numel() > 1 else 1) + rounding
    for name, of, size in (
        ("largest error", torch.amax, z.abs().amax()),
        ("error", torch.linalg.vector_norm, torch.linalg.vector_norm(z)),
    ):
        allowed = 2 * of(other) + floor * size
        # a NaN in PyTorch's result grants no tolerance
        if not bool(of(error) <= allowed):
            place = torch.unravel_index(error.argmax(), error.shape)
            at = [int(index) for index in place]
            return (
                f"{name} {float(of(error)):.3g}, allowed {float(allowed):.3g} (twice PyTorch's "
                f"and a rounding); worst at {at}: {float(x[place]):.6g}, not {float(z[place]):.6g}"
            )
    return ""


def race(case: Case, backends: tuple[str, str], device: torch.device) -> tuple[float, float]:
    """Median forward plus backward time of two backends in microseconds, run alternately."""
    douts = compute(case.run(backends[0]), case.inputs, case.outputs, seed=9).douts
    runs = [
        partial(compute, case.run(name), case.inputs, case.outputs, douts=douts)
        for name in backends
    ]
    host_s = 0.0
    for run in runs:
        # warm-up: compiles and fills caches
        run()
        run()
        host_s = max(host_s, _host_time(run, device))
    once = sum(_time(run, device, host_s) for run in runs) / 2
    rounds = int(min(max(RACE_S / max(once, 1e-6), LEAST_ROUNDS), MOST_ROUNDS))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            taken.append(_time(run, device, host_s))
    ours, rival = (1e6 * median(taken) for taken in times)
    return ours, rival


def _host_time(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until a call returns on the host, whether or not the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _time(run: Callable[[], object], device: torch.device, host_s: float) -> float:
    """Seconds of one call; on a GPU, device time with the host running ahead, as in a real step."""
    if device.type != "cuda":
        return _host_time(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # GPU sleep in cycles, at 2 GHz or less, while the host queues the timed work
    torch.cuda._sleep(int(3e9 * host_s) + 200_000)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class _PoisonedMemory:
    """Within a `with` block, `torch.empty` is filled with NaN (integers: the largest value)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        # documented by PyTorch, but unknown to type checkers
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = True
        if not torch.empty(3, device=self.device).isnan().all():
            raise NotCheckable("PyTorch does not fill memory: unwritten results would not be seen")

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
