"""Calls of tuned classes compute the same: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kernel_configurations import (
    BI,
    CAUSAL,
    UNI,
    Case,
    CrossSize,
    Inputs,
    Outputs,
    SelfSize,
    cross_cases,
    self_cases,
)

from blip2fast.kernels.qformer_attention import config, reference

HALF = torch.float16
SELF = {"block_n": 64, "num_warps": 4, "num_stages": 1, "max_registers": None}
CROSS = {"num_warps": 4, "num_stages": 2, "max_registers": None}
OWNER = CROSS | {"block_m": 64, "block_n": 32, "interleaved": False}
TABLE: dict[tuple[int, str], tuple[dict[str, Any], ...]] = {
    (90, "self_forward/no_causal"): (SELF | {"block_m": 16, "heads": 2},),
    (90, "self_backward/no_causal"): (SELF | {"block_m": 32, "heads": 2, "reader_m": 16},),
    (90, "self_forward/causal"): (SELF | {"block_m": 64, "heads": 1, "joined": True},),
    (90, "self_backward/causal"): (
        SELF | {"block_m": 64, "heads": 2, "reader_m": 16, "joined": True},
    ),
    (90, "cross_forward/one_use"): (CROSS | {"block_m": 16, "block_n": 32, "interleaved": True},),
    (90, "cross_forward/several_uses"): (OWNER | {"block_m": 32},),
    (90, "cross_backward/one_use"): (
        OWNER | {"block_m": 32, "block_n": 64, "num_stages": 2, "uses": 1},
        OWNER | {"block_m": 32, "uses": 0},
    ),
    # of one width, which may be split; images with more rows than 64
    (90, "cross_backward/several_uses"): (
        OWNER | {"uses": 0},
        OWNER | {"interleaved": True, "uses": 0},
    ),
}
# of two widths, for enough images that keys are not split
WIDE = (
    OWNER,
    OWNER | {"block_n": 64, "block_m": 128, "num_warps": 8},
    OWNER | {"block_n": 16, "block_m": 32},
)
CASES = [
    *self_cases("pairs", SelfSize((BI,), (5, 32, 0), heads=2, width=40, dtype=HALF)),
    *self_cases("captions", SelfSize((UNI, CAUSAL), (7, 22), heads=2, width=40, dtype=HALF)),
    *cross_cases("once", CrossSize(2, tokens=257, layers=2, heads=1, dtype=HALF)),
    *cross_cases("thrice", CrossSize(4, 3, tokens=257, layers=2, heads=1, dtype=HALF)),
]


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


def self_reference(inputs: Inputs) -> Outputs:
    """Of `self_forward`, or of `self_backward` where there is a gradient to start from."""
    qkv = inputs["qkv"].float().requires_grad_()
    names = ("layout", "scale", "dropout_p", "philox")
    out, lse = reference.qformer_attention(qkv, *(inputs[name] for name in names))
    if "dout" not in inputs:
        return out.detach(), lse.detach()
    return torch.autograd.grad(out, qkv, inputs["dout"].float())


def relative_error(x: Tensor, y: Tensor) -> float:
    return ((x - y).double().norm() / y.double().norm()).item()


def check(case: Case, dropout_p: float) -> None:
    torch.manual_seed(0)
    inputs = case.make(DEVICE, dropout_p)
    expected = (case.reference or self_reference)(inputs)
    launcher = case.run.args[0]  # type: ignore[attr-defined]
    found = launcher(**inputs)
    found = (found,) if isinstance(found, Tensor) else found
    for place, (x, y) in enumerate(zip(found, expected, strict=False)):
        assert x.shape == y.shape, place
        assert relative_error(x, y) < 4 * torch.finfo(HALF).eps, place


@runs_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned_memory")
def test_tuned_calls(case: Case, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    class Table(dict):  # type: ignore[type-arg]
        def get(self, key: Any, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    monkeypatch.setattr(config.TUNED, "table", Table(TABLE))
    # the classes are of this capability, wherever the test runs
    monkeypatch.setattr(config, "capability", lambda device: 90)
    check(case, dropout_p)
    assert case.tunes[1] in {name for _, name in asked}


@runs_kernels
@pytest.mark.usefixtures("poisoned_memory")
def test_owners_of_two_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "capability", lambda device: 90)
    table = TABLE | {(90, "cross_backward/several_uses"): WIDE}
    monkeypatch.setattr(config.TUNED, "table", table)
    (case,) = (case for case in CASES if case.name == "cross_backward_thrice")
    inputs = case.make(DEVICE, 0.3)
    N = len(inputs["q"])
    split = config.cross_backward_tiles(inputs["q"], inputs["kv"], N)
    assert len({tiles.block_n for tiles in split}) == 1
    monkeypatch.setattr(config, "PROGRAMS", 1)
    whole = config.cross_backward_tiles(inputs["q"], inputs["kv"], N)
    assert [tiles.block_n for tiles in whole] == [32, 64, 16]
    check(case, 0.3)
