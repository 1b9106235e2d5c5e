"""LAVIS's reference step through the Triton kernels: on a GPU, else interpreted on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from stage1_cases import ReferenceCase
from triton_cases import DEVICE, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")

from blip2fast.ops import dispatch
from blip2fast.stage1.lavis import to_lavis_name
from blip2fast.stage1.model import Blip2Stage1

# every op of a step that has a Triton kernel
TRITON_OPS = {
    "qformer_attention": "qformer_attention.attention",
    "qformer_cross_attention": "qformer_attention.attention",
    "dropout_add_layer_norm": "dropout_add_layer_norm",
    "bias_gelu": "bias_gelu",
    "itc_loss": "itc.loss",
}


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


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


@runs_kernels
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
