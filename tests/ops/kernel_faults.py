"""A kernel of this file's own, right or with a planted fault, for the tests of `kernel_checks`.

The process that checks imports it by name: nothing here needs pytest.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip2fast.ops.kernel_kinds import read_kind
from blip2fast.ops.kernel_proof import Case, Problem

ROWS, WIDTH = 9, 17


class Squares(torch.autograd.Function):
    """`x * x`, written into memory as it comes, by a kernel with `fault`."""

    calls = 0

    @staticmethod
    def forward(ctx: object, x: Tensor, fault: str) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        ctx.fault = fault  # type: ignore[attr-defined]
        Squares.calls += 1
        out = torch.empty_like(x)
        last = ROWS - 1 if fault == "unwritten row" else ROWS
        torch.mul(x[:last], x[:last], out=out[:last])
        if fault == "wrong element":
            out[3, 5] += 0.01
        elif fault == "nan":
            out[3, 5] = torch.tensor(torch.inf).sub(torch.inf)
        elif fault == "varies" and Squares.calls % 2:
            out[3, 5] = out[3, 5].nextafter(torch.tensor(torch.inf))
        elif fault == "hang":
            time.sleep(600)
        elif fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
        elif fault == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        elif fault == "slow":
            time.sleep(0.01)
        return out

    @staticmethod
    def backward(ctx: object, dout: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        dx = 2 * x * dout
        if ctx.fault == "wrong gradient":  # type: ignore[attr-defined]
            dx[0, 0] += 0.01
        return dx, None


def squares(impl: str, fault: str, given: Sequence[Tensor]) -> list[Tensor]:
    if impl == "kernel":
        return [Squares.apply(given[0], fault)]
    if impl == "quick":
        return plain(given)
    # a fallback that everything is quicker than
    time.sleep(0.002)
    return plain(given)


def plain(given: Sequence[Tensor]) -> list[Tensor]:
    return [given[0] * given[0]]


def problem(kind: str, device: torch.device) -> Problem:
    """Of a kind `fault=... [log=FILE]`; the file gets a line for each check."""
    told = read_kind(kind)
    fault = told["fault"].replace("_", " ")
    if "log" in told:
        with Path(told["log"]).open("a") as log:
            log.write("checked\n")
        # long enough that another process asks meanwhile
        time.sleep(0.5)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0), device=device)
    case = Case(
        "squares",
        [x.requires_grad_()],
        lambda impl: partial(squares, impl, fault),
        plain,
        plain,
        ("output",),
    )
    return Problem([case], case)
