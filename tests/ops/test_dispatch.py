"""Choosing a backend, and saying why not."""

from __future__ import annotations

import re

import pytest

from blip2fast.ops.dispatch import (
    Backend,
    KernelCheck,
    choose,
    kernels_set_to,
    set_kernels,
)


def _always(*reasons: str) -> Backend[int]:
    return Backend("never", lambda call: list(reasons), lambda call: [])


def _backend(name: str, most: int, *not_automatic: str) -> Backend[int]:
    return Backend(
        name,
        lambda call: [f"{call} is above {most}"] if call > most else [],
        lambda call: list(not_automatic),
    )


BACKENDS = (
    _backend("kernel", 10, "never today: force it with impl='kernel'"),
    _backend("fast", 5),
    _backend("slow", 20),
)


def test_first_that_can_and_may() -> None:
    assert choose("op", BACKENDS, 3, "auto") == "fast"
    assert choose("op", BACKENDS, 7, "auto") == "slow"


def test_forced() -> None:
    assert choose("op", BACKENDS, 7, "kernel") == "kernel"
    assert choose("op", BACKENDS, 3, "slow") == "slow"


def test_no_silent_fallback() -> None:
    with pytest.raises(NotImplementedError) as error:
        choose("op", BACKENDS, 7, "fast")
    assert str(error.value).splitlines() == [
        "op: impl='fast' does not run 7",
        "  kernel: never today: force it with impl='kernel'",
        "  fast: 7 is above 5",
        "  slow: runs it; use impl='slow'",
    ]


def test_every_reason_of_every_backend() -> None:
    backends = (_always("no GPU", "no time"), _backend("small", 1))
    expected = "op: impl='auto' does not run 2\n  never: no GPU\n  never: no time\n  small: 2 is"
    with pytest.raises(NotImplementedError, match=re.escape(expected)):
        choose("op", backends, 2, "auto")


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("fsat", "impl: expected 'auto' or one of ['kernel', 'fast', 'slow'], got 'fsat'; did you"),
        ("zzz", "impl: expected 'auto' or one of ['kernel', 'fast', 'slow'], got 'zzz'"),
    ],
)
def test_unknown_name(impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        choose("op", BACKENDS, 1, impl)


# on the CPU nothing is checked, so none of these kernels is known to be right
SWITCHED = (
    Backend(
        "kernel",
        lambda call: [],
        lambda call: [],
        KernelCheck("none", lambda call: "any", lambda call: "cpu", "nowhere:nothing"),
    ),
    _backend("plain", 5),
)


def test_switch_of_kernels() -> None:
    assert choose("op", SWITCHED, 3, "auto") == "plain"
    with kernels_set_to("trust"):
        assert choose("op", SWITCHED, 3, "auto") == "kernel"
        with kernels_set_to("never"):
            assert choose("op", SWITCHED, 3, "auto") == "plain"
            assert choose("op", SWITCHED, 3, "kernel") == "kernel"
            with pytest.raises(NotImplementedError, match="kernels are switched off"):
                choose("op", SWITCHED, 9, "plain")
        assert choose("op", SWITCHED, 3, "auto") == "kernel"
    assert choose("op", SWITCHED, 3, "auto") == "plain"


def test_unknown_switch() -> None:
    with pytest.raises(ValueError, match=re.escape("kernels: expected one of ['never', 'check")):
        set_kernels("always")  # type: ignore[arg-type]
