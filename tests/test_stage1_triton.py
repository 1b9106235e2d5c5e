"""LAVIS's reference step through the Triton kernels: on a GPU, else interpreted on the CPU.

The interpreter has to be asked for before Triton is imported, so `test_through_the_interpreter`
runs this file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_cases import ReferenceCase

pytest.importorskip("triton")

from blip2fast.lavis import to_lavis_name
from blip2fast.ops import dispatch
from blip2fast.ops._glue_checks import INTERPRETED
from blip2fast.stage1 import Blip2Stage1

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# every op of a step that has a Triton kernel
TRITON_OPS = {
    "qformer_attention": "qformer_attention",
    "qformer_cross_attention": "qformer_attention",
    "dropout_add_layer_norm": "dropout_add_layer_norm",
    "bias_gelu": "bias_gelu",
    "itc_loss": "itc",
}


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the test below runs anyway")
def test_through_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    # all but this test itself
    assert "2 passed, 1 skipped" in done.stdout, done.stdout[-4000:]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every op that has a Triton kernel runs it, or fails; the ops that did."""
    ran: set[str] = set()

    def choose(op: str, backends: Any, call: Any, impl: str) -> str:
        assert op in TRITON_OPS
        ran.add(op)
        return dispatch.choose(op, backends, call, "triton")

    for module in set(TRITON_OPS.values()):
        monkeypatch.setattr(sys.modules[f"blip2fast.ops.{module}"], "choose", choose)
    return ran


@pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs TRITON_INTERPRET=1")
def test_reference_losses_outputs_and_gradients(reference: ReferenceCase, forced: set[str]) -> None:
    """fp32, held to the bounds of the other backends."""
    model = Blip2Stage1.from_lavis_state_dict(reference.weight, reference.config)
    model.to(DEVICE, torch.float32).eval()
    call = reference.call(torch.float32)
    call["image_embeds"] = call["image_embeds"].to(DEVICE)
    call["negatives"] = tuple(index.to(DEVICE) for index in call["negatives"])
    if call["image_ids"] is not None:
        call["image_ids"] = call["image_ids"].to(DEVICE)
    out = model(**call)
    for name, truth in reference.output.items():
        found = out[name].detach().cpu().double()
        assert (found - truth).norm() / truth.norm() < 1e-5, name

    out.loss.backward()
    assert forced == set(TRITON_OPS)
    compared = set()
    for name, parameter in model.named_parameters():
        truth, found = reference.grad[to_lavis_name(name)].double(), parameter.grad.cpu().double()
        if name.endswith("key.bias"):
            # zero up to rounding on both sides
            assert found.norm() < 100 * torch.finfo(torch.float32).eps, name
        else:
            assert (found - truth).norm() / truth.norm() < 1e-4, name
        compared.add(to_lavis_name(name))
    assert compared == set(reference.grad)
