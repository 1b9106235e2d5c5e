"""Weights and masks written out are those that the ops use."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CROSS_CASES,
    SELF_CASES,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
    philox_of,
)

from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.qformer_attention.weights import (
    attention_keep_mask,
    attention_weights,
    cross_attention_keep_mask,
    cross_attention_weights,
)


@pytest.mark.parametrize("name", SELF_CASES)
def test_self(name: str) -> None:
    case = SELF_CASES[name]
    qkv, layout, philox = make_qkv(case, torch.float64), case.layout(), philox_of(case.p)
    weights = attention_weights(qkv, layout)
    torch.testing.assert_close(weights.sum(-1), weights.new_ones(weights.shape[:-1]))
    if philox is not None:
        weights = weights * attention_keep_mask(layout, case.H, philox, case.p) / (1 - case.p)
    out = qformer_attention(qkv, layout, dropout_p=case.p, philox=philox)
    torch.testing.assert_close(out, (weights @ qkv[:, 2].transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("name", CROSS_CASES)
def test_cross(name: str) -> None:
    case = CROSS_CASES[name]
    q, kv = make_q_kv(case, torch.float64)
    index, mask, philox = make_index(case), make_key_mask(case), philox_of(case.p)
    weights = cross_attention_weights(q, kv, index, key_mask=mask)
    if philox is not None:
        shape = (case.N, case.H, case.Q, case.S)
        weights = weights * cross_attention_keep_mask(shape, philox, case.p) / (1 - case.p)
    out = qformer_cross_attention(q, kv, index, key_mask=mask, dropout_p=case.p, philox=philox)
    image = torch.arange(case.B) if index is None else index.index.long()
    values = kv[image][:, :, 1].transpose(1, 2)
    torch.testing.assert_close(out, (weights @ values).transpose(1, 2))


def test_key_lengths_and_scale() -> None:
    case = CROSS_CASES["masked"]
    q, kv = make_q_kv(case, torch.float32)
    lengths = torch.tensor([0, case.S, 4])
    weights = cross_attention_weights(q, kv, make_index(case), key_lengths=lengths, scale=0.0)
    assert case.index == (0, 2, 2, 1)
    assert (weights[0] == 0).all()
    torch.testing.assert_close(weights[1, ..., :4], torch.full((2, 3, 4), 0.25))
    assert (weights[1, ..., 4:] == 0).all()


def test_refusals() -> None:
    layout = SELF_CASES["queries"].layout()
    with pytest.raises(ValueError, match="qkv: expected 12 rows"):
        attention_weights(torch.zeros(3, 3, 2, 16), layout)
    with pytest.raises(ValueError, match=r"philox: expected \[2\] int64"):
        attention_keep_mask(layout, 2, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 to below 1, got 1\.5"):
        cross_attention_keep_mask((1, 1, 1, 1), torch.zeros(2).long(), 1.5)
    with pytest.raises(ValueError, match="q: expected 3 blocks"):
        cross_attention_weights(torch.zeros(2, 3, 2, 16), torch.zeros(3, 5, 2, 2, 16))
