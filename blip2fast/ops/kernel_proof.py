"""One check of kernels: exact, whole, repeatable, and quicker than what `auto` takes otherwise.

Runs in a process of its own (`_check_worker.py`), on cases from `kernel_cases.py`.
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

# of each, in a race
RACE_S = 0.02
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


class NotCheckable(RuntimeError):
    """This process cannot check; says nothing about the kernels."""


@dataclass(frozen=True)
class Case:
    """One computation, three ways.

    Attributes:
        name: For messages.
        inputs: Leaves, in the types that are checked; those that want a gradient say so.
        run: From the name of a backend to the function of the inputs that it computes.
        plain: What PyTorch makes of the same in these types: its error is the measure.
        truth: The definition; gets the inputs in fp64.
        outputs: Names of what these return; what carries a gradient gets a random one.
        grad_rounding: What the interface rounds further in gradients, relative.
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
    """What a kind of call is checked by.

    Attributes:
        cases: Small ones, each with a rest in every tile.
        race: Of a real size, only run, for its time; None: times mean nothing here.
    """

    cases: Sequence[Case]
    race: Case | None = None


@dataclass
class Results:
    """Outputs and gradients of a case by name, and the gradients that went in."""

    values: dict[str, Tensor]
    douts: list[Tensor] = field(default_factory=list)


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """One check, as `kernel_checks.Request` asks for it.

    Returns:
        `fault`, empty where there is none, and `ours_us` and `rival_us`, 0 where not timed.
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

    Memory that is handed out holds NaN, so that what nobody writes is seen.
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
    """Outputs of a function, and the gradient of every leaf that wants one.

    Args:
        function: Of the inputs.
        inputs: Leaves.
        names: Of the outputs.
        douts: Gradients of the outputs that carry one; by default random, from `seed`.
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
    """The first NaN: of memory that nobody wrote, or computed. Infinities are values."""
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
    """Where the error is more than twice PyTorch's in this type, and one rounding.

    Held to it are the largest error and, closer, the root of the sum of squares.
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
    floor = torch.finfo(ours.dtype).eps / 2 + rounding
    for name, of, size in (
        ("largest error", torch.amax, z.abs().amax()),
        ("error", torch.linalg.vector_norm, torch.linalg.vector_norm(z)),
    ):
        allowed = 2 * of(other) + floor * size
        # a NaN of PyTorch's own allows nothing
        if not bool(of(error) <= allowed):
            place = torch.unravel_index(error.argmax(), error.shape)
            at = [int(index) for index in place]
            return (
                f"{name} {float(of(error)):.3g}, allowed {float(allowed):.3g} (twice PyTorch's "
                f"and a rounding); worst at {at}: {float(x[place]):.6g}, not {float(z[place]):.6g}"
            )
    return ""


def race(case: Case, backends: tuple[str, str], device: torch.device) -> tuple[float, float]:
    """Median time of forward and backward of two backends, in turns, microseconds."""
    douts = compute(case.run(backends[0]), case.inputs, case.outputs, seed=9).douts
    runs = [
        partial(compute, case.run(name), case.inputs, case.outputs, douts=douts)
        for name in backends
    ]
    host_s = 0.0
    for run in runs:
        # compiles, fills caches
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
    """Seconds until a call returns, whether or not a GPU is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _time(run: Callable[[], object], device: torch.device, host_s: float) -> float:
    """Seconds of one call; on a GPU its own, with the host ahead as it is in a large step."""
    if device.type != "cuda":
        return _host_time(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # cycles, at 2 GHz or less, in which the host queues what is timed
    torch.cuda._sleep(int(3e9 * host_s) + 200_000)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class _PoisonedMemory:
    """`torch.empty` gives NaN (integers: the greatest), within a `with` block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        # how PyTorch documents it; its module has no such attribute in the eyes of a type checker
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = True
        if not torch.empty(3, device=self.device).isnan().all():
            raise NotCheckable("PyTorch does not fill memory: unwritten results would not be seen")

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
