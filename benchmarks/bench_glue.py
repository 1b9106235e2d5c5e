"""The ops between the large products against PyTorch's own, forward and backward.

R rows (queries and text tokens of a batch), C = 768, feed-forward width 3072, V = 30523 words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.ops import bias_gelu, dropout_add_layer_norm, lm_cross_entropy
from blip2fast.ops.philox import philox_state

# small enough for the tests; the full sizes are timed only
ROWS = [8, *(pytest.param(R, marks=pytest.mark.fullsize) for R in (1000, 3000, 5000))]
LABELS = [8, *(pytest.param(R, marks=pytest.mark.fullsize) for R in (170, 700, 2000))]
DTYPES = [torch.float32, torch.bfloat16]
# relative norm by which results may differ: roundings in another order
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Race = Callable[..., None]


@pytest.fixture
def race_grads(race: Race, conditions: dict[str, Any]) -> Race:
    """Race functions of the inputs with their gradients, after a look at whether they agree."""

    def run(
        ours: Callable[[], Tensor],
        theirs: Callable[[], Tensor],
        inputs: list[Tensor],
        random: bool = False,
    ) -> None:
        """`random`: the two draw other dropout masks, so their results cannot agree."""
        dtype = inputs[0].dtype
        conditions["dtype"] = str(dtype)
        dout = torch.randn_like(ours())

        def step(function: Callable[[], Tensor]) -> list[Tensor]:
            out = function()
            return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

        for got, wanted in zip(step(ours), step(theirs), strict=True):
            assert got.shape == wanted.shape
            if not random:
                error = (got.double() - wanted.double()).norm() / wanted.double().norm()
                assert error < TOLERANCE[dtype]
        race(lambda: step(ours), {"torch": lambda: step(theirs)}, rounds=15)

    return run


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", ROWS)
def bench_dropout_add_layer_norm(R: int, dtype: torch.dtype, p: float, race_grads: Race) -> None:
    torch.manual_seed(0)
    C, philox = 768, philox_state(0)
    x, residual = leaf(R, C, dtype=dtype), leaf(R, C, dtype=dtype)
    weight, bias = leaf(C, dtype=torch.float32), leaf(C, dtype=torch.float32)

    def ours() -> Tensor:
        return dropout_add_layer_norm(x, residual, weight, bias, dropout_p=p, philox=philox)

    def theirs() -> Tensor:
        total = F.dropout(x, p, training=p > 0) + residual
        return F.layer_norm(total, (C,), weight, bias, 1e-12)

    race_grads(ours, theirs, [x, residual, weight, bias], random=p > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", ROWS)
def bench_bias_gelu(R: int, dtype: torch.dtype, race_grads: Race) -> None:
    torch.manual_seed(0)
    x, bias = leaf(R, 3072, dtype=dtype), leaf(3072, dtype=dtype)
    race_grads(lambda: bias_gelu(x, bias), lambda: F.gelu(x + bias), [x, bias])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", LABELS)
def bench_lm_cross_entropy(R: int, dtype: torch.dtype, race_grads: Race) -> None:
    torch.manual_seed(0)
    C, V = (768, 30523) if R > 8 else (64, 301)
    hidden, weight = leaf(R, C, dtype=dtype), leaf(V, C, dtype=dtype, scale=0.02)
    bias, labels = leaf(V, dtype=dtype, scale=0.02), torch.randint(0, V, (R,))

    def theirs() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, label_smoothing=0.1)

    def ours() -> Tensor:
        return lm_cross_entropy(hidden, weight, bias, labels)[0]

    race_grads(ours, theirs, [hidden, weight, bias])
