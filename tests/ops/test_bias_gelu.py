"""Bias and exact GELU: the definition, and PyTorch's backend against it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glue_cases import assert_as_exact_as, make_rows
from torch import Tensor

from blip2fast.ops import bias_gelu
from blip2fast.ops.bias_gelu import BACKENDS
from blip2fast.ops.calls import BiasGeluCall
from blip2fast.ops.dispatch import choose

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(R: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x and bias, from far below 0 to far above."""
    x, bias = make_rows(R, width, seed=0, dtype=dtype), make_rows(width, seed=1, dtype=dtype)
    return [(3 * x).detach().requires_grad_(), bias]


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_definition_is_pytorchs(impl: str) -> None:
    x, bias = make_inputs(5, 7)
    torch.testing.assert_close(bias_gelu(x, bias, impl), plain(x, bias), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bias_gelu(x, impl=impl), F.gelu(x), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(partial(bias_gelu, impl=impl), (x, bias))
    assert torch.autograd.gradcheck(partial(bias_gelu, impl=impl), (x,))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "width"), [(1, 33), (7, 3072), (301, 100)])
def test_error_is_within_twice_pytorchs(R: int, width: int, dtype: torch.dtype, impl: str) -> None:
    dout = make_rows(R, width, seed=9).detach()
    inputs = make_inputs(R, width, dtype)
    assert_as_exact_as(partial(bias_gelu, impl=impl), plain, inputs, dout)
    assert_as_exact_as(partial(bias_gelu, impl=impl), F.gelu, inputs[:1], dout)


def test_no_rows() -> None:
    inputs = make_inputs(0, 6, torch.float32)
    out = bias_gelu(*inputs)
    assert out.shape == (0, 6)
    dx, dbias = torch.autograd.grad(out.sum(), inputs)
    assert dx.shape == (0, 6)
    assert torch.equal(dbias, torch.zeros(6))


def test_result_may_be_changed_in_place() -> None:
    x, bias = make_inputs(4, 6, torch.float32)
    out = bias_gelu(x, bias)
    expected = torch.autograd.grad(out.sum(), (x, bias), retain_graph=True)
    out.data.fill_(torch.nan)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, bias)), expected)
    changed = bias_gelu(x, bias).mul_(2)
    torch.testing.assert_close(
        torch.autograd.grad(changed.sum(), (x, bias)), tuple(2 * g for g in expected)
    )


def test_types_and_autocast() -> None:
    """The result has the type of x, and bias its gradient in its own."""
    x, bias = make_inputs(4, 6, torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu")):
        with context:
            out = bias_gelu(half, bias)
            assert out.dtype == torch.bfloat16
            assert bias_gelu(x, bias).dtype == torch.float32
        dx, dbias = torch.autograd.grad(out.sum(), (half, bias))
        assert (dx.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)


def test_compiles_into_one_graph_for_all_sizes() -> None:
    compiled = torch.compile(bias_gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    for R in (5, 9):
        inputs = make_inputs(R, 8, torch.float32)
        got, expected = compiled(*inputs), bias_gelu(*inputs)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


def test_backends() -> None:
    for device in ("cpu", "cuda"):
        call = BiasGeluCall(torch.bfloat16, device)
        assert choose("op", BACKENDS, call, "auto") == "pytorch"
    assert choose("op", BACKENDS, BiasGeluCall(torch.bfloat16, "cuda"), "triton") == "triton"
    with pytest.raises(NotImplementedError, match=r"(?s)tensors on cpu: needs .*float64: only"):
        bias_gelu(*make_inputs(2, 4), impl="triton")


x32 = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(x32[None]), r"x: expected \[rows, width\].*got \[1, 3, 4\]"),
        (lambda f: f(x32.int()), "x: expected fp16, .*got torch.int32"),
        (lambda f: f(x32, x32[0, :3]), r"bias: expected shape \[4\], got \[3\]"),
        (lambda f: f(x32, x32[0].to("meta")), "bias: expected on cpu .*got meta"),
        (lambda f: f(x32, x32[0], "triten"), "did you mean 'triton'"),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(bias_gelu)
