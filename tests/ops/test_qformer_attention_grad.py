"""Gradients of the Q-Former's attentions: exact, as precise as PyTorch's, deterministic."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import (
    CROSS_CASES,
    SELF_CASES,
    assert_exact,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
    narrow_cross,
    narrow_self,
    philox_of,
    value_and_grads,
)
from glue_cases import saved_tensors
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blip2fast.kernels.qformer_attention import padded as _attention_padded
from blip2fast.kernels.qformer_attention.cpu import core as _attention_core
from blip2fast.ops import qformer_attention as attend_self
from blip2fast.ops import qformer_cross_attention as attend_cross

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["reference", "sdpa"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name", ["all kinds", "pair and caption share a block", "dropout", "odd width"]
)
def test_self_gradcheck(impl: str, name: str) -> None:
    """The mask of the backward pass is that of the forward pass, too."""
    case = SELF_CASES[name]
    qkv = make_qkv(case, torch.float64).requires_grad_()
    function = partial(
        attend_self, layout=case.layout(), dropout_p=case.p, philox=philox_of(case.p), impl=impl
    )
    assert torch.autograd.gradcheck(function, qkv, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name",
    ["own image", "masked", "dropout", "dropout, shared queries", "every image twice"],
)
def test_cross_gradcheck(impl: str, name: str) -> None:
    case = CROSS_CASES[name]
    q, kv = (x.requires_grad_() for x in make_q_kv(case, torch.float64))
    function = partial(
        attend_cross,
        kv_index=make_index(case),
        key_mask=make_key_mask(case),
        dropout_p=case.p,
        philox=philox_of(case.p),
        impl=impl,
    )
    assert torch.autograd.gradcheck(function, (q, kv), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", [*IMPLS, "padded"])
@pytest.mark.parametrize("name", SELF_CASES)
def test_self_is_as_exact_as_pytorch(name: str, impl: str, dtype: torch.dtype) -> None:
    case = SELF_CASES[name]
    qkv, layout, philox = make_qkv(case, dtype), case.layout(), philox_of(case.p)

    def ours(x: Tensor) -> Tensor:
        if impl == "padded":
            scale = case.D**-0.5
            return _attention_padded.self_attention(x, layout, scale, case.p, philox)[0]
        return attend_self(x, layout, dropout_p=case.p, philox=philox, impl=impl)

    truth = partial(attend_self, layout=layout, dropout_p=case.p, philox=philox, impl="reference")
    rival = partial(narrow_self, layout=layout, p=case.p, philox=philox)
    assert_exact(
        value_and_grads(ours, [qkv]),
        value_and_grads(rival, [qkv]),
        value_and_grads(truth, [qkv.double()]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", [*IMPLS, "padded"])
@pytest.mark.parametrize("name", CROSS_CASES)
def test_cross_is_as_exact_as_pytorch(name: str, impl: str, dtype: torch.dtype) -> None:
    case = CROSS_CASES[name]
    inputs, index = make_q_kv(case, dtype), make_index(case)
    mask, philox = make_key_mask(case), philox_of(case.p)

    def run(q: Tensor, kv: Tensor, impl: str) -> Tensor:
        if impl == "padded":
            image = None if index is None else index.index
            scale = case.D**-0.5
            return _attention_padded.cross_attention(q, kv, image, mask, scale, case.p, philox)[0]
        return attend_cross(q, kv, index, key_mask=mask, dropout_p=case.p, philox=philox, impl=impl)

    assert_exact(
        value_and_grads(partial(run, impl=impl), inputs),
        value_and_grads(partial(narrow_cross, case=case, mask=mask, philox=philox), inputs),
        value_and_grads(partial(run, impl="reference"), [x.double() for x in inputs]),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bitwise_equal(impl: str) -> None:
    case, cross = SELF_CASES["dropout"], CROSS_CASES["one image once, one three times, one nine"]
    qkv, inputs = make_qkv(case, torch.bfloat16), make_q_kv(cross, torch.bfloat16)
    options = {"dropout_p": 0.3, "philox": philox_of(0.3), "impl": impl}
    for function, given in (
        (partial(attend_self, layout=case.layout(), **options), [qkv]),
        (partial(attend_cross, kv_index=make_index(cross), **options), inputs),
    ):
        first, second = (value_and_grads(function, given) for _ in range(2))
        assert all(x.equal(y) for x, y in zip(first, second, strict=True))


def test_an_image_that_nobody_reads_gets_no_gradient() -> None:
    case = CROSS_CASES["one image once, one three times, one nine"]
    for impl in IMPLS:
        function = partial(attend_cross, kv_index=make_index(case), impl=impl)
        _, _, d_kv = value_and_grads(function, make_q_kv(case, torch.float32))
        assert (d_kv[0] == 0).all()
        assert (d_kv[1:].flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_of_the_size_of_the_weights_is_kept(p: float) -> None:
    """Kept for the backward pass: inputs, output, lse, indices."""
    case, cross = SELF_CASES["captions"], CROSS_CASES["257 tokens"]
    qkv = make_qkv(case, torch.float32).requires_grad_()
    q, kv = (x.requires_grad_() for x in make_q_kv(cross, torch.float32))
    options = {"dropout_p": p, "philox": philox_of(p), "impl": "sdpa"}
    kept = saved_tensors(lambda: attend_self(qkv, case.layout(), **options))
    R = len(qkv)
    floats = [x for x in kept if x.is_floating_point()]
    assert sum(x.numel() for x in floats) == qkv.numel() + R * case.H * (case.D + 1)
    kept = saved_tensors(lambda: attend_cross(q, kv, **options))
    floats = [x for x in kept if x.is_floating_point()]
    assert sum(x.numel() for x in floats) == 2 * q.numel() + kv.numel() + q[..., 0].numel()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_draw_the_same_mask(impl: str, use_reentrant: bool) -> None:
    case = SELF_CASES["dropout"]
    layout, philox = case.layout(), philox_of(case.p)

    def layer(x: Tensor) -> Tensor:
        return attend_self(x, layout, dropout_p=case.p, philox=philox, impl=impl)

    leaves = [make_qkv(case, torch.float32).requires_grad_() for _ in range(2)]
    layer(leaves[0]).square().sum().backward()
    checkpoint(layer, leaves[1], use_reentrant=use_reentrant).square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert leaves[0].grad.equal(leaves[1].grad)


def test_gradient_of_any_strides() -> None:
    """The gradient of a sum is expanded from one element."""
    case = SELF_CASES["all kinds"]
    grads = []
    for impl in IMPLS:
        qkv = make_qkv(case, torch.float64).requires_grad_()
        grads += torch.autograd.grad(attend_self(qkv, case.layout(), impl=impl).sum(), qkv)
    torch.testing.assert_close(grads[1], grads[0])


def test_inputs_that_want_no_gradient() -> None:
    case = CROSS_CASES["masked"]
    q, kv = make_q_kv(case, torch.float32)
    assert not attend_cross(q, kv, make_index(case)).requires_grad
    out = attend_cross(q.requires_grad_(), kv, make_index(case))
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("pieces", [1, 40, 200])
def test_pieces_of_explicit_weights(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Under dropout weights are held piece by piece: rows, problems, or all."""
    results = []
    for elements in (1 << 19, pieces):
        monkeypatch.setattr(_attention_core, "_PIECE_ELEMENTS", elements)
        for cases, make in ((SELF_CASES, make_qkv), (CROSS_CASES, make_q_kv)):
            case = cases["dropout"]
            options = {"dropout_p": case.p, "philox": philox_of(case.p), "impl": "sdpa"}
            if make is make_qkv:
                function = partial(attend_self, layout=case.layout(), **options)
                results.append(value_and_grads(function, [make_qkv(case, torch.float64)]))
            else:
                function = partial(attend_cross, kv_index=make_index(case), **options)
                results.append(value_and_grads(function, make_q_kv(case, torch.float64)))
    for whole, cut in zip(results[:2], results[2:], strict=True):
        for x, y in zip(whole, cut, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
