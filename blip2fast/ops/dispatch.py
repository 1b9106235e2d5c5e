"""Which backend runs an op: one ordered list, and an error that gives every reason.

An op describes a call as a frozen dataclass (shapes, dtypes, device, options) and lists its
backends, fastest first. `impl="auto"` takes the first that supports the call and has no reason to
be passed over; a name forces one. There is no silent fallback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

Call = TypeVar("Call")
Kernels = Literal["never", "check", "trust"]

COMPILED_NOT_RUN = "its kernels were compiled but never run on a GPU: force it with impl={name!r}"


KERNELS_OFF = "kernels are switched off (kernels='never'): force it with impl={name!r}"

_kernels: Kernels = "check"


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


@contextmanager
def kernels_set_to(kernels: Kernels) -> Iterator[None]:
    """`set_kernels` for the length of a `with` block."""
    before = _kernels
    set_kernels(kernels)
    try:
        yield
    finally:
        set_kernels(before)


def kernel_reasons(name: str) -> list[str]:
    """Why `impl="auto"` passes over a backend made of this library's own kernels."""
    if _kernels == "trust":
        return []
    text = KERNELS_OFF if _kernels == "never" else COMPILED_NOT_RUN
    return [text.format(name=name)]


@dataclass(frozen=True)
class Backend(Generic[Call]):
    """One way to compute an op.

    Attributes:
        name: What `impl=` calls it.
        not_supported_reasons: Why it cannot run a call; empty where it can.
        not_automatic_reasons: Why `impl="auto"` passes over it although it could run a call.
    """

    name: str
    not_supported_reasons: Callable[[Call], list[str]]
    not_automatic_reasons: Callable[[Call], list[str]]


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
    names = [backend.name for backend in backends]
    if impl != "auto" and impl not in names:
        near = difflib.get_close_matches(impl, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"impl: expected 'auto' or one of {names}, got {impl!r}{hint}")
    for backend in backends:
        if impl not in ("auto", backend.name) or backend.not_supported_reasons(call):
            continue
        if impl == backend.name or not backend.not_automatic_reasons(call):
            return backend.name
    raise NotImplementedError(_explain(op, backends, call, impl))


def _explain(op: str, backends: Sequence[Backend[Call]], call: Call, impl: str) -> str:
    lines = [f"{op}: impl={impl!r} does not run {call}"]
    for backend in backends:
        unsupported = backend.not_supported_reasons(call)
        reasons = unsupported or backend.not_automatic_reasons(call)
        if not reasons:
            lines.append(f"  {backend.name}: runs it; use impl={backend.name!r}")
        lines += [f"  {backend.name}: {reason}" for reason in reasons]
    return "\n".join(lines)
