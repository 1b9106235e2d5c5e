"""What is checked beforehand is what a step asks for."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch

from blip2fast.ops import dispatch
from blip2fast.ops.kernel_calls import Sizes, usual_calls
from blip2fast.stage1.model import Blip2Stage1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Op and kind of every call that kernels could run."""
    kinds: set[tuple[str, str]] = set()

    def choose(op: str, backends: Any, call: Any, impl: str) -> str:
        if backends[0].check is not None:
            kinds.add((op, backends[0].check.kind(call)))
        return dispatch.choose(op, backends, call, impl)

    for module in (
        "qformer_attention.attention",
        "bias_gelu",
        "dropout_add_layer_norm",
        "itc.loss",
    ):
        monkeypatch.setattr(sys.modules[f"blip2fast.ops.{module}"], "choose", choose)
    return kinds


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole model"])
def test_a_step_of_stage_1(asked: set[tuple[str, str]], whole: bool, p: float) -> None:
    config = replace(SMALL, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    model, batch = Blip2Stage1(config).train(), make_batch(config, 6)
    if whole:
        model.bfloat16()
        batch["image_embeds"] = batch["image_embeds"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        model(**batch).loss.backward()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole), torch.no_grad():
        model(**batch)
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        queries=config.num_query_tokens,
        text=int(batch["attention_mask"].sum(1).max()),
        images=batch["image_embeds"].shape[1],
        features=config.embed_dim,
        dropout=p > 0,
    )
    known = {
        (op, backends[0].check.kind(call))
        for op, backends, call in usual_calls(torch.device("cuda", 0), torch.bfloat16, sizes)
    }
    # a GPU multiplies normalised features in fp16, a CPU in fp32
    expected = {(op, kind) for op, kind in asked if op != "itc_loss"}
    assert expected - known == set()
    assert {op for op, _ in known} - {op for op, _ in expected} == {"itc_loss"}
