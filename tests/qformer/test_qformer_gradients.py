"""`QFormer` with gradients on a CPU: products by oneDNN, 16-bit attention without SDPA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from qformer_cases import blip2_config
from torch import Tensor
from torch.nn import functional as F

from blip2fast import QFormer
from blip2fast.ops import linear as onednn_linear
from blip2fast.qformer import layers


def step(model: QFormer, tokens: Tensor) -> list[Tensor]:
    """The output and all gradients, in fp64."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(1, 5, model.config.hidden_size, generator=generator).to(tokens)
    queries = queries.expand(len(tokens), -1, -1)
    states = model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    (states * torch.randn(states.shape, generator=generator).to(tokens)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.double() for x in (states.detach(), *grads)]


def build(dtype: torch.dtype) -> tuple[QFormer, Tensor]:
    torch.manual_seed(0)
    model = QFormer(blip2_config()).eval()
    tokens = torch.randn(3, 9, model.config.encoder_hidden_size)
    return model.to(dtype), tokens.to(dtype)


def test_onednn_computes_the_same_gradients(
    onednn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build(torch.float32)
    expected = step(copy.deepcopy(model).double(), tokens.double())
    assert not onednn  # too small to be worth it
    monkeypatch.setattr(onednn_linear, "_WORTH_FLOPS", 0)
    found = step(model, tokens)
    assert onednn
    # the gradient of a key's bias is 0, and its rounding errors are those of other gradients
    scale = torch.stack([truth.norm() for truth in expected]).median()
    for ours, truth in zip(found, expected, strict=True):
        assert (ours - truth).norm() <= 1e-5 * torch.maximum(truth.norm(), scale)


def test_a_layer_with_a_hook_is_called(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "_WORTH_FLOPS", 0)
    model, tokens = build(torch.float32)
    layer = model.encoder.layer[0].attention.attention.query
    shapes: list[torch.Size] = []
    layer.register_forward_hook(lambda _m, _i, y: shapes.append(y.shape))
    step(model, tokens)
    assert shapes == [(3, 5, model.config.hidden_size)]
    assert onednn


def test_attention_in_16_bits_is_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's backward pass is slow there; without gradients and in fp32 it is taken."""
    calls: list[torch.dtype] = []
    sdpa = F.scaled_dot_product_attention

    def counted(query: Tensor, *given: Any, **named: Any) -> Tensor:
        calls.append(query.dtype)
        return sdpa(query, *given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    model, tokens = build(torch.bfloat16)
    found = step(model, tokens)
    assert not calls
    with torch.no_grad():
        queries = tokens.new_zeros(3, 5, model.config.hidden_size)
        model(query_embeds=queries, encoder_hidden_states=tokens)
    assert set(calls) == {torch.bfloat16}
    monkeypatch.setattr(layers, "_WEIGHTS", 0)
    calls.clear()
    other = step(model, tokens)
    assert set(calls) == {torch.bfloat16}
    truth = step(copy.deepcopy(model).double(), tokens.double())
    # no further from the truth than SDPA is
    error, theirs = ((x[0] - truth[0]).norm() for x in (found, other))
    assert error <= 1.5 * theirs
