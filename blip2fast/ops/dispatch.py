"""Which backend runs an op: one ordered list, and an error that gives every reason.

An op describes a call as a named tuple (shapes, dtypes, device, options) and lists its
backends, fastest first. `impl="auto"` takes the first that supports the call and has no reason to
be passed over; a name forces one. There is no silent fallback.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, Literal, TypeVar, get_args

import torch

from blip2fast.ops import kernel_checks

Call = TypeVar("Call")
Kernels = Literal["never", "check", "trust"]

HALVES = (torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None
# Triton's own switch: its kernels then run on the CPU, slowly, to be checked
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AS_DEFINED = "it is the definition, in several passes: force it with impl='reference'"
ALL_PAIRS = "it is the definition, with every pair in memory: force it with impl='reference'"
KERNELS_OFF = "kernels are switched off (kernels='never'): force it with impl={name!r}"
INTERPRETED_ONLY = "Triton's interpreter runs its kernels, slowly: force it with impl={name!r}"
NO_DEVICE = "there is no CUDA device to check its kernels on: force it with impl={name!r}"

_kernels: Kernels = "check"
# where kernels are checked
_CHECKED_ON = ("cuda",)
# an op, `impl` and a call to a list of backends and the one of them that runs it
_decisions: dict[tuple[str, str, Any], tuple[Sequence[Backend[Any]], str]] = {}
_MOST_DECISIONS = 4096


def set_kernels(kernels: Kernels) -> None:
    """Whether `impl="auto"` may take this library's own kernels, in the whole process.

    Args:
        kernels: `"never"`; `"check"` (the default): where they are known to be right and quicker
            on this device; `"trust"`: wherever they support the call, unchecked. A backend forced
            by name runs in any case.

    Raises:
        ValueError: `kernels` is none of these.
    """
    global _kernels
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels: expected one of {list(get_args(Kernels))}, got {kernels!r}")
    _kernels = kernels
    forget_decisions()


def forget_decisions() -> None:
    """Choose anew: for what `choose` cannot know to have changed, such as a check made again."""
    _decisions.clear()


@contextmanager
def kernels_set_to(kernels: Kernels) -> Iterator[None]:
    """`set_kernels` for the length of a `with` block."""
    before = _kernels
    set_kernels(kernels)
    try:
        yield
    finally:
        set_kernels(before)


@dataclass(frozen=True)
class KernelCheck(Generic[Call]):
    """How `impl="auto"` finds out whether kernels may run a call.

    Attributes:
        folder: In `kernels/`; a change of its code makes records of it void.
        kind: What stands for a call and its likes (`kernel_kinds`).
        device: Where a call runs, `cuda:0` and so on, or `cpu`.
        source: `module:function` that makes the problem of a kind and a device (`kernel_cases`).
    """

    folder: str
    kind: Callable[[Call], str]
    device: Callable[[Call], str]
    source: str


def no_reasons(call: object) -> list[str]:
    """No reasons: the backend runs every call."""
    return []


def cuda_reasons(dtype: torch.dtype, missing: str) -> list[str]:
    """Why a kernel written in CUDA cannot run on data of this type.

    Args:
        dtype: Of the data.
        missing: Why the extension lacks the kernel; empty where it has it.
    """
    reasons = []
    if dtype not in HALVES:
        reasons.append(f"{dtype}: only float16 and bfloat16")
    if missing:
        reasons.append(missing)
    return reasons


def triton_reasons(device: str, *dtypes: torch.dtype, what: str = "tensors") -> list[str]:
    """Why a Triton kernel cannot run on data of these types.

    Args:
        device, dtypes: Of the data.
        what: The data, for the message.
    """
    reasons = []
    if device != "cuda" and not INTERPRETED:
        reasons.append(f"{what} on {device}: needs a CUDA device")
    reasons += [
        f"{dtype}: only float16, bfloat16 and float32"
        for dtype in dict.fromkeys(dtypes)
        if dtype not in (*HALVES, torch.float32)
    ]
    if not HAS_TRITON:
        reasons.append("triton is not installed: pip install triton")
    return reasons


@dataclass(frozen=True)
class Backend(Generic[Call]):
    """One way to compute an op.

    Attributes:
        name: What `impl=` calls it.
        not_supported_reasons: Why it cannot run a call; empty where it can.
        not_automatic_reasons: Why `impl="auto"` passes over it although it could run a call.
        check: Of a backend made of this library's own kernels: what `auto` asks before it takes
            them, and makes sure of where nobody has (`set_kernels`).
    """

    name: str
    not_supported_reasons: Callable[[Call], list[str]]
    not_automatic_reasons: Callable[[Call], list[str]]
    check: KernelCheck[Call] | None = None


def choose(op: str, backends: Sequence[Backend[Call]], call: Call, impl: str) -> str:
    """The name of the backend that runs a call.

    Args:
        op: The op's name, for messages.
        backends: In order of preference.
        call: What is to be computed.
        impl: `"auto"`, or the name of the backend to use.

    Returns:
        The backend's name.

    Raises:
        ValueError: `impl` is no backend's name.
        NotImplementedError: the backend asked for (or, for `"auto"`, every backend) does not run
            this call; lists every backend with every reason.
    """
    if torch.compiler.is_compiling():
        return _choose(op, backends, call, impl)[0]
    decision = _decisions.get((op, impl, call))
    if decision is not None and decision[0] is backends:
        return decision[1]
    name, settled = _choose(op, backends, call, impl)
    if settled:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[op, impl, call] = (backends, name)
    return name


def _choose(op: str, backends: Sequence[Backend[Call]], call: Call, impl: str) -> tuple[str, bool]:
    """As `choose`, and whether the same call gets the same answer again."""
    names = [backend.name for backend in backends]
    if impl != "auto" and impl not in names:
        near = difflib.get_close_matches(impl, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"impl: expected 'auto' or one of {names}, got {impl!r}{hint}")
    settled = True
    for place, backend in enumerate(backends):
        if impl not in ("auto", backend.name) or backend.not_supported_reasons(call):
            continue
        if impl == backend.name:
            return backend.name, True
        reasons, stays = passed_over(op, backends, place, call)
        settled = settled and stays
        if not reasons:
            return backend.name, settled
    raise NotImplementedError(_explain(op, backends, call, impl))


def passed_over(
    op: str, backends: Sequence[Backend[Call]], place: int, call: Call
) -> tuple[list[str], bool]:
    """Why `auto` does not take `backends[place]` for a call that it supports.

    Returns:
        The reasons, and whether they stay the same.
    """
    backend = backends[place]
    reasons, check = backend.not_automatic_reasons(call), backend.check
    if reasons or check is None or _kernels == "trust":
        return reasons, True
    if _kernels == "never":
        return [KERNELS_OFF.format(name=backend.name)], True
    device = check.device(call)
    kind = device.partition(":")[0]
    if kind not in _CHECKED_ON:
        return [INTERPRETED_ONLY.format(name=backend.name)], True
    if kind == "cuda" and not torch.cuda.is_available():
        return [NO_DEVICE.format(name=backend.name)], True
    what = (op, backend.name, check.kind(call), device, check.folder, check.source)
    if torch.compiler.is_compiling():
        reason, stays = kernel_checks.recorded(*what), False
    else:
        reason, stays = kernel_checks.verdict(
            kernel_checks.Request(*what), lambda: rival_of(op, backends, place, call)
        )
    return ([reason] if reason else []), stays


def rival_of(op: str, backends: Sequence[Backend[Call]], place: int, call: Call) -> str:
    """The backend behind `backends[place]` that `auto` takes for a call; empty where none."""
    for other in range(place + 1, len(backends)):
        if backends[other].not_supported_reasons(call):
            continue
        if not passed_over(op, backends, other, call)[0]:
            return backends[other].name
    return ""


def describe_choices() -> list[str]:
    """Which kernels `auto` took in this process, and why it passed over others; for a `repr`.

    Empty where there were none to take, as on a CPU.
    """
    lines: dict[str, None] = {}
    for (op, impl, call), (backends, name) in list(_decisions.items()):
        for place, backend in enumerate(backends):
            if impl != "auto" or backend.check is None or backend.not_supported_reasons(call):
                continue
            if backend.name == name:
                lines[f"{op}: {name}"] = None
                break
            reasons = "; ".join(passed_over(op, backends, place, call)[0])
            lines[f"{op}: {name}, {backend.name} is passed over: {reasons}"] = None
    return list(lines)


def _explain(op: str, backends: Sequence[Backend[Call]], call: Call, impl: str) -> str:
    lines = [f"{op}: impl={impl!r} does not run {call}"]
    for place, backend in enumerate(backends):
        unsupported = backend.not_supported_reasons(call)
        reasons = unsupported or passed_over(op, backends, place, call)[0]
        if not reasons:
            lines.append(f"  {backend.name}: runs it; use impl={backend.name!r}")
        lines += [f"  {backend.name}: {reason}" for reason in reasons]
    return "\n".join(lines)
