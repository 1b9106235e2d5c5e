"""Dropout, residual and LayerNorm: the definition, and PyTorch's backend against it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glue_cases import assert_as_exact_as, make_rows, saved_tensors
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm import reference
from blip2fast.kernels.philox import philox_state, with_offset
from blip2fast.ops import dropout_add_layer_norm
from blip2fast.ops.calls import DropoutAddLayerNormCall
from blip2fast.ops.dispatch import choose
from blip2fast.ops.dropout_add_layer_norm import BACKENDS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
P = 0.3
PHILOX = philox_state(seed=5, offset=2)


def make_inputs(R: int, C: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, residual, weight, bias, x_bias."""
    shapes = [(R, C), (R, C), (C,), (C,), (C,)]
    return [make_rows(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def plain(p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor):
    """The op with PyTorch's functions and the mask handed over, in the type of the inputs."""
    total = x + x_bias
    if p > 0:
        total = total * reference.keep(*x.shape, PHILOX, p) / (1 - p)
    return F.layer_norm(total + residual, x.shape[-1:], weight, bias, 1e-12)


def op(
    p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, **options
):
    philox = PHILOX if p > 0 else None
    return dropout_add_layer_norm(
        x, residual, weight, bias, x_bias=x_bias, dropout_p=p, philox=philox, **options
    )


@pytest.mark.parametrize("p", [0.0, P])
def test_definition_is_pytorchs(p: float) -> None:
    inputs = make_inputs(9, 13)
    expected = plain(p, *inputs)
    torch.testing.assert_close(op(p, *inputs, impl="reference"), expected, rtol=1e-12, atol=1e-12)
    x, _, weight, bias, _ = inputs
    alone = dropout_add_layer_norm(x, None, weight, bias, impl="reference")
    torch.testing.assert_close(alone, F.layer_norm(x, (13,), weight, bias, 1e-12))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_gradcheck(impl: str, p: float) -> None:
    assert torch.autograd.gradcheck(partial(op, p, impl=impl), make_inputs(4, 5))
    x, _, weight, bias, _ = make_inputs(4, 5)
    philox = PHILOX if p > 0 else None

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, None, weight, bias, dropout_p=p, philox=philox, impl=impl)

    assert torch.autograd.gradcheck(alone, (x, weight, bias))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "C"), [(1, 33), (7, 768), (301, 100)])
def test_error_is_within_twice_pytorchs(R: int, C: int, dtype: torch.dtype, p: float) -> None:
    inputs = make_inputs(R, C, dtype)
    assert_as_exact_as(partial(op, p), partial(plain, p), inputs, make_rows(R, C, seed=9).detach())


@pytest.mark.parametrize("p", [0.0, P])
def test_no_rows(p: float) -> None:
    inputs = make_inputs(0, 6, torch.float32)
    out = op(p, *inputs)
    assert out.shape == (0, 6)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("p", [0.0, P])
def test_strides(p: float) -> None:
    """Any strides of data and parameters give what contiguous ones give."""
    inputs = make_inputs(6, 10, torch.float32)
    strided = [
        torch.stack([x, x + 1], -1)[..., 0] if x.dim() == 1 else x.T.contiguous().T for x in inputs
    ]
    assert not any(x.is_contiguous() for x in strided)
    expected, got = op(p, *inputs), op(p, *strided)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_mask_is_a_function_of_seed_and_offset() -> None:
    x = torch.ones(64, 256)
    weight, bias = torch.ones(256), torch.zeros(256)

    def dropped(philox: Tensor) -> Tensor:
        out = dropout_add_layer_norm(x, None, weight, bias, dropout_p=P, philox=philox)
        return out < 0

    keep = reference.keep(64, 256, PHILOX, P)
    assert torch.equal(dropped(PHILOX), ~keep)
    assert abs(keep.float().mean() - (1 - P)) < 0.02
    assert not torch.equal(dropped(with_offset(PHILOX, 3)), ~keep)


def test_no_mask_is_saved() -> None:
    """Saved: the sum, mean and rstd of its rows, the weight, seed and offset."""
    R, C = 50, 24
    inputs = make_inputs(R, C, torch.float32)
    kept = saved_tensors(lambda: op(P, *inputs))
    assert sorted(x.numel() for x in kept) == sorted([R * C, R, R, C, 2])


def test_sum_is_the_input_where_nothing_is_added() -> None:
    x, _, weight, bias, _ = make_inputs(5, 8, torch.float32)
    kept = saved_tensors(lambda: dropout_add_layer_norm(x, None, weight, bias))
    assert any(y.data_ptr() == x.data_ptr() for y in kept)


@pytest.mark.parametrize("p", [0.0, P])
def test_frozen_parameters_get_no_gradient(p: float) -> None:
    x, residual, weight, bias, x_bias = make_inputs(5, 8, torch.float32)
    frozen = [weight.detach(), bias.detach(), x_bias.detach()]
    expected = torch.autograd.grad(op(p, x, residual, weight, bias, x_bias).sin().sum(), x)
    out = op(p, x, residual.detach(), *frozen)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x), expected)


@pytest.mark.parametrize("p", [0.0, P])
def test_types(p: float) -> None:
    """fp32 parameters and a wider residual beside bf16; the type of the result is chosen."""
    x, residual, weight, bias, x_bias = make_inputs(5, 8, torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    assert op(p, half, residual, weight, bias, x_bias).dtype == torch.float32
    narrow = residual.detach().bfloat16().requires_grad_()
    inputs = (half, narrow, weight, bias, x_bias)
    out = op(p, *inputs)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [g.dtype for g in grads] == [y.dtype for y in inputs]
    wide = op(p, *inputs, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.bfloat16(), out, rtol=8e-3, atol=8e-3)
    grads = torch.autograd.grad(wide.sum(), inputs)
    assert [g.dtype for g in grads] == [y.dtype for y in inputs]


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_copy(impl: str, p: float) -> None:
    """The result rounded, in the same call; what comes back to either goes to the inputs."""
    x, residual, weight, bias, x_bias = make_inputs(6, 10, torch.float32)
    inputs = (x.detach().bfloat16().requires_grad_(), residual, weight, bias, x_bias)
    alone = op(p, *inputs, impl=impl)
    out, copy = op(p, *inputs, impl=impl, copy_dtype=torch.bfloat16)
    assert out.dtype == torch.float32
    assert torch.equal(out, alone)
    assert torch.equal(copy, alone.bfloat16())
    dout, dcopy = make_rows(6, 10, seed=7).detach().float(), make_rows(6, 10, seed=8).detach()
    dcopy = dcopy.bfloat16()
    for given in ((dout, None), (None, dcopy), (dout, dcopy)):
        total = sum(d.float() for d in given if d is not None)
        expected = torch.autograd.grad(alone, inputs, total, retain_graph=True)
        pairs = [(y, d) for y, d in zip((out, copy), given, strict=True) if d is not None]
        results, incoming = zip(*pairs, strict=True)
        got = torch.autograd.grad(results, inputs, incoming, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(op(p, *inputs, impl=impl, copy_dtype=torch.bfloat16)[1], copy)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("impl", ["reference", "pytorch"])
def test_gradcheck_of_both(impl: str, p: float) -> None:
    both = partial(op, p, impl=impl, copy_dtype=torch.float64)
    assert torch.autograd.gradcheck(both, make_inputs(4, 5))


@pytest.mark.parametrize("p", [0.0, P])
def test_autocast_changes_nothing(p: float) -> None:
    inputs = make_inputs(5, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = op(p, *inputs)
    assert torch.equal(inside, op(p, *inputs))


@pytest.mark.parametrize("p", [0.0, P])
def test_gradients_are_reproducible(p: float) -> None:
    inputs = make_inputs(300, 40, torch.float32)
    first, second = (torch.autograd.grad(op(p, *inputs).sin().sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(dtype: torch.dtype, full: bool) -> None:
    x, residual, weight, bias, x_bias = make_inputs(5, 8, dtype)
    if not full:
        residual = x_bias = None
    for copied in (None, torch.bfloat16):
        options = (PHILOX, 1e-12, P, dtype, copied, True, "pytorch")
        torch.library.opcheck(
            torch.ops.blip2fast.dropout_add_layer_norm.default,
            (x, residual, weight, bias, x_bias, *options),
        )


@pytest.mark.parametrize("p", [0.0, P])
def test_compiles_into_one_graph_for_all_sizes(p: float) -> None:
    compiled = torch.compile(partial(op, p), fullgraph=True, dynamic=True, backend="aot_eager")
    for R in (5, 9):
        inputs = make_inputs(R, 8, torch.float32)
        got, expected = compiled(*inputs), op(p, *inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.sin().sum(), inputs),
            torch.autograd.grad(expected.sin().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, P])
def test_export(p: float) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return op(p, *inputs)

    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}, None, None, None)
    program = torch.export.export(
        Module(), tuple(make_inputs(5, 8, torch.float32)), dynamic_shapes={"inputs": shapes}
    )
    other = make_inputs(7, 8, torch.float32)
    torch.testing.assert_close(program.module()(*other), op(p, *other))


def test_backends() -> None:
    call = DropoutAddLayerNormCall(768, (torch.bfloat16,), "cpu")
    assert choose("op", BACKENDS, call, "auto") == "pytorch"
    gpu = DropoutAddLayerNormCall(768, (torch.bfloat16,), "cuda")
    assert choose("op", BACKENDS, gpu, "auto") == "pytorch"
    assert choose("op", BACKENDS, gpu, "triton") == "triton"
    with pytest.raises(NotImplementedError, match="width 9000: at most 8192"):
        choose("op", BACKENDS, DropoutAddLayerNormCall(9000, (torch.float64,), "cuda"), "triton")


def test_triton_says_why_it_does_not_run() -> None:
    inputs = make_inputs(2, 4)
    with pytest.raises(NotImplementedError, match=r"(?s)tensors on cpu: needs .*float64: only"):
        op(0.0, *inputs, impl="triton")


x32 = torch.zeros(3, 4)
row = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(x32[0], None, row, row), r"x: expected \[rows, width\].*got \[4\]"),
        (lambda f: f(x32.long(), None, row, row), "x: expected fp16, .*got torch.int64"),
        (lambda f: f(x32, x32[:2], row, row), r"residual: expected shape \[3, 4\], got \[2, 4\]"),
        (lambda f: f(x32, x32, row[:3], row), r"weight: expected shape \[4\], got \[3\]"),
        (lambda f: f(x32, x32, row, row, x_bias=x32), r"x_bias: expected shape \[4\], got \[3, 4"),
        (lambda f: f(x32, x32, row, row.to("meta")), "bias: expected on cpu .*got meta"),
        (lambda f: f(x32, x32, row, row, dropout_p=1.0), "dropout_p: expected 0 to below 1, got 1"),
        (lambda f: f(x32, x32, row, row, dropout_p=0.1), "dropout_p=0.1 needs philox"),
        (
            lambda f: f(x32, x32, row, row, out_dtype=torch.int64),
            "out_dtype: expected fp16, .*got torch.int64",
        ),
        (
            lambda f: f(x32, x32, row, row, copy_dtype=torch.int8),
            "copy_dtype: expected fp16, .*got torch.int8",
        ),
        (lambda f: f(x32, x32, row, row, impl="torch"), "impl: expected 'auto' .*'pytorch'"),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dropout_add_layer_norm)
