"""The Triton kernels of the glue ops: on a GPU where there is one, else through the interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from glue_cases import assert_as_exact_as, make_rows
from torch import Tensor
from triton_cases import DEVICE, DTYPES, run_interpreted, runs_kernels, starts_interpreter

from blip2fast.kernels.dropout_add_layer_norm import pytorch, reference
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import bias_gelu, dropout_add_layer_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")
P = 0.3


@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


def make_inputs(R: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight, bias, x_bias."""
    shapes = [(R, C), (R, C), (C,), (C,), (C,)]
    return [make_rows(*s, seed=i, dtype=dtype, device=DEVICE) for i, s in enumerate(shapes)]


def plain(p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor):
    total = x + x_bias
    if p > 0:
        total = total * reference.keep(*x.shape, philox_state(5, 2, DEVICE), p) / (1 - p)
    return F.layer_norm(total + residual, x.shape[-1:], weight, bias, 1e-12)


def op(
    p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, **options
):
    philox = philox_state(5, 2, DEVICE) if p > 0 else None
    options = {"impl": "triton"} | options
    return dropout_add_layer_norm(
        x, residual, weight, bias, x_bias=x_bias, dropout_p=p, philox=philox, **options
    )


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
# a tile of 4 rows and one row more
@pytest.mark.parametrize(("R", "C"), [(1, 1), (3, 33), (5, 768), (4, 1024), (37, 7)])
def test_layer_norm_is_as_exact_as_pytorch(R: int, C: int, dtype: torch.dtype, p: float) -> None:
    inputs = make_inputs(R, C, dtype)
    dout = make_rows(R, C, seed=9, device=DEVICE).detach()
    if C == 1:
        # a row of one has no spread: nothing but the bias comes out, nothing goes back
        out = op(p, *inputs)
        torch.testing.assert_close(out, inputs[3].expand_as(out))
        return
    assert_as_exact_as(partial(op, p), partial(plain, p), inputs, dout)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
def test_layer_norm_alone(p: float) -> None:
    """Without residual and bias of x, the sum that is saved may be x itself."""
    x, _, weight, bias, _ = make_inputs(6, 40, torch.float32)
    philox = philox_state(5, 2, DEVICE) if p > 0 else None
    got, expected = (
        dropout_add_layer_norm(x, None, weight, bias, dropout_p=p, philox=philox, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected)
    grads, wanted = (torch.autograd.grad(y.sin().sum(), (x, weight, bias)) for y in (got, expected))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
def test_layer_norm_types(p: float) -> None:
    x, residual, weight, bias, x_bias = make_inputs(6, 40, torch.float32)
    half = x.detach().half().requires_grad_()
    inputs = (half, residual, weight, bias, x_bias)
    out = op(p, *inputs)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out.sin().sum(), inputs)
    assert [g.dtype for g in grads] == [y.dtype for y in inputs]
    with torch.no_grad():
        torch.testing.assert_close(op(p, *inputs), out)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
def test_layer_norm_copy(p: float) -> None:
    """A 16-bit copy beside the fp32 result, and the gradients of either or both."""
    x, residual, weight, bias, x_bias = make_inputs(6, 40, torch.float32)
    inputs = (x.detach().half().requires_grad_(), residual, weight, bias, x_bias)
    got = op(p, *inputs, copy_dtype=torch.float16)
    assert torch.equal(got[0], op(p, *inputs))
    assert torch.equal(got[1], got[0].half())
    expected = op(p, *inputs, impl="reference", copy_dtype=torch.float16)
    incoming = [make_rows(6, 40, seed=7 + i, device=DEVICE).detach() for i in range(2)]
    for chosen in ([0], [1], [0, 1]):
        grads, wanted = (
            torch.autograd.grad(
                [y[i] for i in chosen],
                inputs,
                [incoming[i].to(y[i]) for i in chosen],
                retain_graph=True,
            )
            for y in (got, expected)
        )
        for a, b in zip(grads, wanted, strict=True):
            assert a.dtype == b.dtype
            rounding = {"rtol": 2e-3, "atol": 2e-3} if a.dtype == torch.float16 else {}
            torch.testing.assert_close(a, b, **(rounding or {"rtol": 1e-4, "atol": 1e-5}))


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
def test_layer_norm_no_rows_and_opcheck(p: float) -> None:
    inputs = make_inputs(0, 6, torch.float32)
    grads = torch.autograd.grad(op(p, *inputs).sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert all((g == 0).all() for g in grads)
    philox = philox_state(5, 2, DEVICE) if p > 0 else None
    rows = make_inputs(5, 6, torch.float32)
    options = (philox, 1e-12, p, torch.float32, None, True, "triton")
    torch.library.opcheck(torch.ops.blip2fast.dropout_add_layer_norm.default, (*rows, *options))
    copied = (*options[:4], torch.float16, *options[5:])
    torch.library.opcheck(torch.ops.blip2fast.dropout_add_layer_norm.default, (*rows, *copied))
    alone = (rows[0], None, *rows[2:4], None, *options)
    torch.library.opcheck(torch.ops.blip2fast.dropout_add_layer_norm.default, alone)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
# a tile of 8 x 256 and one more
@pytest.mark.parametrize(("R", "width"), [(1, 1), (7, 33), (9, 257), (37, 8)])
def test_gelu_is_as_exact_as_pytorch(R: int, width: int, dtype: torch.dtype) -> None:
    x, bias = (make_rows(*s, seed=0, dtype=dtype, device=DEVICE) for s in ((R, width), (width,)))
    dout = make_rows(R, width, seed=9, device=DEVICE).detach()

    def plain_gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    assert_as_exact_as(partial(bias_gelu, impl="triton"), plain_gelu, (x, bias), dout)
    assert_as_exact_as(partial(bias_gelu, impl="triton"), F.gelu, (x,), dout)


@runs_kernels
def test_gelu_of_every_16_bit_number_is_within_its_rounding() -> None:
    """Far below 0 too, where `1 + erf` has nothing left; derivatives likewise."""
    # fp16, whose numbers the interpreter computes like a GPU
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()].reshape(-1, 8).to(DEVICE).requires_grad_()
    out = bias_gelu(x, impl="triton")
    (dx,) = torch.autograd.grad(out.sum(), x)
    t = x.detach().double()
    cdf = 0.5 * torch.erfc(-t * 0.5**0.5)
    pdf = torch.exp(-0.5 * t * t) / (2 * torch.pi) ** 0.5
    step = torch.finfo(torch.float16).eps
    for found, exact in ((out, t * cdf), (dx, cdf + t * pdf)):
        error = (found.double() - exact).abs()
        # half a step to the nearest number, and the formula's error; the least step is 2^-24
        bound = (0.5 * step * exact.abs()).clamp(min=0.5 * 2.0**-24) + 2e-7
        assert bool((error <= bound).all())


@runs_kernels
def test_few_programs_take_turns() -> None:
    """Backward passes in which a program has several blocks of rows, the last one not full."""
    from blip2fast.kernels.bias_gelu import backward as gelu_backward
    from blip2fast.kernels.bias_gelu import config as gelu_config
    from blip2fast.kernels.dropout_add_layer_norm import backward, config, forward

    x, residual, weight, bias, x_bias = (y.detach() for y in make_inputs(37, 20, torch.float32))
    dout = make_rows(37, 20, seed=9, device=DEVICE).detach().float()
    philox = philox_state(5, 2, DEVICE)
    few = replace(config.rows_config(20), programs=2)
    _, _, *saved = forward.forward(
        x, residual, weight, bias, x_bias, philox, 1e-12, P, x.dtype, None, True, few
    )
    rest = (weight, philox, P, x.dtype, x.dtype, True, True, True)
    expected = pytorch.backward(dout, None, *saved, *rest)
    for got, wanted in zip(
        backward.backward(dout, None, *saved, *rest, few), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    tile = gelu_config.TileConfig(block_r=4, block_f=8, num_warps=4, programs=6)
    dx, dbias = gelu_backward.backward(dout, x, bias, True, tile)
    wanted = torch.ops.aten.gelu_backward(dout, x + bias)
    torch.testing.assert_close(dx, wanted)
    torch.testing.assert_close(dbias, wanted.sum(0), rtol=1e-4, atol=1e-5)


@runs_kernels
def test_gelu_no_rows_opcheck_and_compile() -> None:
    x, bias = (make_rows(*s, seed=0, dtype=torch.float32, device=DEVICE) for s in ((0, 5), (5,)))
    dx, dbias = torch.autograd.grad(bias_gelu(x, bias, "triton").sum(), (x, bias))
    assert dx.shape == (0, 5)
    assert torch.equal(dbias, torch.zeros_like(bias))
    rows = make_rows(6, 5, seed=1, dtype=torch.float32, device=DEVICE)
    torch.library.opcheck(torch.ops.blip2fast.bias_gelu.default, (rows, bias))
    torch.library.opcheck(torch.ops.blip2fast.bias_gelu.default, (rows, None))
    compiled = torch.compile(bias_gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows, bias, "triton"), bias_gelu(rows, bias, "triton"))


@runs_kernels
def test_gelu_result_may_be_changed_in_place() -> None:
    x, bias = (make_rows(*s, seed=0, dtype=torch.float32, device=DEVICE) for s in ((6, 5), (5,)))
    out = bias_gelu(x, bias, "triton")
    expected = torch.autograd.grad(out.sum(), (x, bias), retain_graph=True)
    out.data.fill_(torch.nan)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, bias)), expected)
