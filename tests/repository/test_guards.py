"""Counted costs: none is worse than benchmarks/guards.json says, and counts are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def guards() -> Any:
    """The script, whose import chooses the linear layers of its process; not of this one."""
    before = os.environ.get("BLIP2FAST_LINEAR")
    import guards

    del os.environ["BLIP2FAST_LINEAR"]
    if before is not None:
        os.environ["BLIP2FAST_LINEAR"] = before
    return guards


def test_nothing_costs_more_than_is_recorded() -> None:
    """If a change is worth it, the printed command records what it costs."""
    # a process of its own: DeepSpeed replaces functions of PyTorch for a whole process
    done = subprocess.run(
        [sys.executable, "benchmarks/guards.py"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_worse_is_named_with_both_values(guards: Any) -> None:
    old = {"step/flops": 1000, "step/calls": 7, "step/gone": 1, "step/same": 3}
    worse, better = guards.compare(old, old | {"step/flops": 1200, "step/calls": 6, "new": 5})
    assert worse == ["step/flops: 1,000 recorded, 1,200 now", "new: 5 now, none recorded"]
    assert better == ["step/calls: 7 recorded, 6 now"]
    del old["step/same"]
    worse, _ = guards.compare(old | {"step/same": 3}, old)
    assert worse == ["step/same: 3 recorded, not counted now"]


def test_a_step_that_costs_more_fails(
    guards: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = guards.recorded()
    monkeypatch.setattr(guards, "measure", lambda: costs | {"qformer_forward/calls": 10_000})
    monkeypatch.setattr(sys, "argv", ["guards.py"])
    assert guards.main() == 1
    before = costs["qformer_forward/calls"]
    printed = capsys.readouterr().out
    assert f"worse: qformer_forward/calls: {before} recorded, 10,000 now\n" in printed
    assert f"to record what is counted now: {guards.COMMAND}" in printed
    monkeypatch.setattr(guards, "measure", lambda: costs)
    assert guards.main() == 0


def test_counts_are_those_of_a_known_function(guards: Any) -> None:
    """`(x.to(bf16) @ w).sum()`: the copy of x is kept for the gradient of w, w is there anyway."""
    x, w = torch.randn(3, 5), nn.Parameter(torch.randn(5, 7, dtype=torch.bfloat16))

    def call() -> None:
        (x.to(torch.bfloat16) @ w).sum().backward()

    found = guards.count(call, [x, w])
    assert found["flops"] == 2 * (2 * 3 * 5 * 7), "forward, and backward for w alone"
    assert found["casts"] == 1
    assert found["saved_bytes"] == 3 * 5 * 2
    assert found["calls"] > 4


def test_changing_lengths_do_not_make_a_graph_each(guards: Any) -> None:
    assert guards.recorded()["compiled_qformer/graphs"] < len(guards.LENGTHS)
