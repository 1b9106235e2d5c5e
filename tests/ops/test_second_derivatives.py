"""Second derivatives of the ops are refused: without that, terms would be missing in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import CROSS_CASES, SELF_CASES, make_q_kv, make_qkv, philox_of
from torch import Tensor

from blip2fast.ops import (
    dropout_add_layer_norm,
    itc_loss,
    lm_cross_entropy,
    qformer_attention,
    qformer_cross_attention,
)


def _normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


SELF, CROSS = SELF_CASES["dropout"], CROSS_CASES["own image"]
ROWS = (_normal(5, 8), _normal(5, 8), _normal(8), _normal(8))
OPS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "qformer_attention": (
        lambda x: qformer_attention(x, SELF.layout(), dropout_p=SELF.p, philox=philox_of(SELF.p)),
        (make_qkv(SELF, torch.float64),),
    ),
    "qformer_cross_attention": (qformer_cross_attention, make_q_kv(CROSS, torch.float64)),
    "dropout_add_layer_norm": (
        lambda *rows: dropout_add_layer_norm(*rows, dropout_p=0.3, philox=philox_of(0.3)),
        ROWS,
    ),
    "lm_cross_entropy": (
        lambda hidden, weight: lm_cross_entropy(hidden, weight, None, torch.arange(5))[0],
        (_normal(5, 8), _normal(11, 8)),
    ),
    "itc_loss": (
        lambda image, text: itc_loss(image, text, torch.tensor(0.1, dtype=torch.float64)).loss,
        (_normal(4, 3, 8), _normal(4, 8)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_of_a_gradient_is_an_error(name: str) -> None:
    """Also where other terms of the penalty have their derivatives."""
    op, inputs = OPS[name]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    # the incoming gradient needs none itself
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    penalty = leaves[0].square().sum() + sum(g.square().sum() for g in first)
    with pytest.raises(NotImplementedError, match=f"{name}: second derivatives are not"):
        penalty.backward()


@pytest.mark.parametrize("name", OPS)
def test_first_derivatives_are_what_they_were(name: str) -> None:
    op, inputs = OPS[name]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found, expected = (
        torch.autograd.grad(op(*leaves).square().sum(), leaves, create_graph=graph)
        for graph in (True, False)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.requires_grad
        assert torch.equal(a, b)
