"""Chooses the backend of an op from one ordered list; an error lists every reason.

An op describes a call as a named tuple (shapes, dtypes, device, options) and lists its
backends, fastest first. `impl="auto"` takes the first that supports the call and has no reason to
be skipped; a name forces that backend. There is no silent fallback.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, TypeVar, get_args

import torch

from blip2fast._choices import Kernels
from blip2fast.ops import kernel_checks

Call = TypeVar("Call")

HALVES = (torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None
# Triton's own switch: kernels then run in the interpreter on the CPU, slowly, for testing
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AS_DEFINED = "it is the definition, in several passes: force it with impl='reference'"
ALL_PAIRS = "it is the definition, with every pair in memory: force it with impl='reference'"
KERNELS_OFF = "kernels are switched off (kernels='never'): force it with impl={name!r}"
INTERPRETED_ONLY = "Triton's interpreter runs its kernels, slowly: force it with impl={name!r}"
NO_DEVICE = "there is no CUDA device to check its kernels on: force it with impl={name!r}"

_kernels: Kernels = "check"
# device types on which kernels are checked
_CHECKED_ON = ("cuda",)
# (op, `impl`, call) -> (backends, name of the chosen one)
_decisions: dict[tuple[str, str, Any], tuple[Sequence[Backend[Any]], str]] = {}
_MOST_DECISIONS = 4096


def set_kernels(kernels: Kernels) -> None:
    """Set, process-wide, whether `impl="auto"` may choose this library's own kernels.

    Args:
        kernels: `"never"`; `"check"` (the default): only kernels that a check on this device found
            correct and faster; `"trust"`: whenever they support the call, unchecked. A backend
            forced by name runs regardless.

    Raises:
        ValueError: `kernels` is none of these.
    """
    global _kernels
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels: expected one of {list(get_args(Kernels))}, got {kernels!r}")
    _kernels = kernels
    forget_decisions()


def kernels_setting() -> Kernels:
    """What `set_kernels` was last given."""
    return _kernels


def forget_decisions() -> None:
    """Clear cached choices after a change that `choose` cannot detect, such as a repeated check."""
    _decisions.clear()


@contextmanager
def kernels_set_to(kernels: Kernels) -> Iterator[None]:
    """`set_kernels` for the duration of a `with` block."""
    before = _kernels
    set_kernels(kernels)
    try:
        yield
    finally:
        set_kernels(before)


@dataclass(frozen=True)
class KernelCheck(Generic[Call]):
    """How `impl="auto"` decides whether kernels may run a call.

    Attributes:
        folder: The kernels' folder in `kernels/`; changing its code invalidates their records.
        kind: Maps a call to its kind, shared by equivalent calls (`kernel_kinds`).
        device: Maps a call to its device: `cuda:0` and so on, or `cpu`.
        source: `module:function` that builds the test problem for a kind and a device
            (`kernel_cases`).
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
        missing: Why the extension lacks the kernel; empty if it has it.
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
        what: What to call the data in the message.
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
        name: Its name for `impl=`.
        not_supported_reasons: Why it cannot run a call; empty if it can.
        not_automatic_reasons: Why `impl="auto"` skips it although it could run a call.
        check: For this library's own kernels: the check whose result `auto` requires, and which it
            runs if there is no record yet (`set_kernels`).
    """

    name: str
    not_supported_reasons: Callable[[Call], list[str]]
    not_automatic_reasons: Callable[[Call], list[str]]
    check: KernelCheck[Call] | None = None


def choose(op: str, backends: Sequence[Backend[Call]], call: Call, impl: str) -> str:
    """Choose the backend that runs a call.

    Args:
        op: The op's name, for messages.
        backends: In order of preference.
        call: Description of the call.
        impl: `"auto"`, or the name of the backend to use.

    Returns:
        The backend's name.

    Raises:
        ValueError: `impl` is not the name of a backend.
        NotImplementedError: the requested backend (or, for `"auto"`, every backend) does not
            support the call; lists every backend with every reason.
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
    """As `choose`; also returns whether the choice is final and may be cached."""
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
    """Why `auto` skips `backends[place]` for a call that this backend supports.

    Returns:
        The reasons, and whether they are final.
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
    """The backend after `backends[place]` that `auto` would choose; empty if there is none."""
    for other in range(place + 1, len(backends)):
        if backends[other].not_supported_reasons(call):
            continue
        if not passed_over(op, backends, other, call)[0]:
            return backends[other].name
    return ""


def describe_choices() -> list[str]:
    """Which kernels `auto` chose in this process, and why it skipped others; for a `repr`.

    Empty if no kernels were available, as on a CPU.
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
