"""`blip2fast doctor`: what a bug report should carry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip2fast import __version__
from blip2fast.command_line import main
from blip2fast.ops import dispatch, kernel_calls
from blip2fast.ops.kernel_calls import UNCHECKED, op_choices, usual_calls
from blip2fast.ops.kernel_checks import Checks, Request, use_checks
from blip2fast.ops.records import Record


def test_the_command_names_versions_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--precision", "fp32"])
    said = capsys.readouterr().out
    assert said.startswith(f"blip2fast {__version__}, Python 3")
    assert f"torch {torch.__version__.partition('+')[0]}" in said
    for op in ("itc_loss", "qformer_attention", "qformer_cross_attention", "bias_gelu"):
        assert f"\n  {op}: " in said
    if not torch.cuda.is_available():
        assert "no CUDA device; torch is built for" in said
        assert "not triton: tensors on cpu: needs a CUDA device" in said


def test_a_gpu_runs_what_is_recorded_and_says_why_not_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records alone decide: nothing is checked, nothing compiled."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    device = torch.device("cuda", 0)
    (call,) = [
        (op, backends, call)
        for op, backends, call in usual_calls(device, torch.bfloat16)
        if op == "bias_gelu" and call.bias == torch.float32
    ]
    op, backends, gelu = call
    check = backends[0].check
    assert check is not None
    monkeypatch.setattr(kernel_calls, "capability_of", lambda device: 90)
    monkeypatch.setattr("blip2fast.ops.kernel_checks.machine", _machine)
    what = (op, "triton", check.kind(gelu), check.device(gelu), check.folder, check.source)
    key = Request(*what).key
    for fault, backend, reasons in (
        (None, "pytorch", {"triton": UNCHECKED}),
        ("", "triton", {}),
        ("slower", "pytorch", {"triton": "its kernels were checked on A card: slower"}),
    ):
        checks = Checks(tmp_path, shipped={})
        if fault is not None:
            checks.known[key] = Record(key, fault)
        with use_checks(checks):
            (choice,) = [
                c
                for c in op_choices(device, torch.bfloat16)
                if c.op == "bias_gelu" and c.kind == check.kind(gelu)
            ]
        assert (choice.backend, choice.passed_over) == (backend, reasons)


def _machine(device: str):
    from blip2fast.ops.records import Machine

    return Machine("A card", "9.0", "1", "2", "13", "3", "0")
