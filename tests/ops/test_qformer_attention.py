"""The Q-Former's attentions against their definition: values, log-sum-exps, dropout."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CROSS_CASES,
    SELF_CASES,
    CrossCase,
    SelfCase,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
    philox_of,
)
from attention_strategies import cross_cases, self_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import padded as _attention_padded
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.qformer.masks import qformer_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# the accelerators' path of `sdpa`, on the CPU
PADDED = "padded"


def run_self(
    impl: str, qkv: Tensor, layout: AttentionLayout, p: float = 0.0, philox: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if impl == PADDED:
        return _attention_padded.self_attention(qkv, layout, qkv.shape[-1] ** -0.5, p, philox)
    return qformer_attention(qkv, layout, dropout_p=p, philox=philox, impl=impl, return_lse=True)


def run_cross(
    impl: str,
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    mask: Tensor | None = None,
    p: float = 0.0,
    philox: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if impl == PADDED:
        image = None if index is None else index.index
        return _attention_padded.cross_attention(q, kv, image, mask, q.shape[-1] ** -0.5, p, philox)
    return qformer_cross_attention(
        q, kv, index, key_mask=mask, dropout_p=p, philox=philox, impl=impl, return_lse=True
    )


@pytest.mark.parametrize("impl", ["sdpa", PADDED])
@pytest.mark.parametrize("name", SELF_CASES)
def test_self_is_the_definition(impl: str, name: str) -> None:
    case = SELF_CASES[name]
    qkv, layout, philox = make_qkv(case, torch.float64), case.layout(), philox_of(case.p)
    out, lse = run_self(impl, qkv, layout, case.p, philox)
    expected, expected_lse = run_self("reference", qkv, layout, case.p, philox)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["sdpa", PADDED])
@pytest.mark.parametrize("name", CROSS_CASES)
def test_cross_is_the_definition(impl: str, name: str) -> None:
    case = CROSS_CASES[name]
    inputs = (*make_q_kv(case, torch.float64), make_index(case), make_key_mask(case))
    options = case.p, philox_of(case.p)
    out, lse = run_cross(impl, *inputs, *options)
    expected, expected_lse = run_cross("reference", *inputs, *options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", list(MaskKind))
def test_definition_is_the_padded_mask_of_the_model(kind: MaskKind) -> None:
    """The token buffer's attention is that of `masks.qformer_mask` on padded rows."""
    N, Q, T, H, D = 3, 4, 5, 2, 16
    lengths = [5, 2, 3]
    layout = AttentionLayout.build(N, Q, lengths, kind)
    qkv = make_qkv(SelfCase(N, Q, tuple(lengths), kind), torch.float64)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(N, Q + T, 3, H, D, dtype=torch.float64)
    padded[:, :Q] = qkv[: N * Q].unflatten(0, (N, Q))
    padded[:, Q:][real] = qkv[N * Q :]
    q, k, v = padded.permute(2, 0, 3, 1, 4)
    mask = qformer_mask(kind, Q, real)[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    for impl in ("reference", "sdpa"):
        out = qformer_attention(qkv, layout, impl=impl)
        torch.testing.assert_close(out[: N * Q].unflatten(0, (N, Q)), expected[:, :Q])
        torch.testing.assert_close(out[N * Q :], expected[:, Q:][real])


@pytest.mark.parametrize("impl", ["reference", "sdpa", PADDED])
def test_a_row_that_sees_nothing_gives_zero(impl: str) -> None:
    case = CROSS_CASES["masked"]
    q, kv = (x.requires_grad_() for x in make_q_kv(case, torch.float32))
    out, lse = run_cross(impl, q, kv, make_index(case), make_key_mask(case))
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    assert lse[1:].isfinite().all()
    d_q, d_kv = torch.autograd.grad(out.sum(), (q, kv))
    assert (d_q[0] == 0).all()
    assert (d_kv[0] == 0).all()
    assert d_q[1:].abs().sum() > 0


def test_key_lengths_are_a_key_mask() -> None:
    case = CROSS_CASES["masked"]
    q, kv = make_q_kv(case, torch.float32)
    lengths = torch.tensor([0, case.S, 4])
    mask = torch.arange(case.S) < lengths[:, None]
    index = make_index(case)
    by_length = qformer_cross_attention(q, kv, index, key_lengths=lengths)
    assert by_length.equal(qformer_cross_attention(q, kv, index, key_mask=mask))


def test_plain_index_is_a_kv_index() -> None:
    case = CROSS_CASES["every image twice"]
    q, kv = make_q_kv(case, torch.float32)
    expected = qformer_cross_attention(q, kv, make_index(case))
    assert qformer_cross_attention(q, kv, torch.tensor(case.index)).equal(expected)


def test_other_images_and_layers_are_not_read() -> None:
    merged = torch.full((2, 9, 3, 2, 2, 16), torch.nan)
    merged[1, :, 1] = torch.randn(9, 2, 2, 16)
    q = torch.randn(2, 3, 2, 16)
    out = qformer_cross_attention(q, merged[:, :, 1], torch.tensor([1, 1]), impl="sdpa")
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_of_results(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case, cross = SELF_CASES["all kinds"], CROSS_CASES["masked"]
    for impl in ("reference", "sdpa", PADDED):
        out, lse = run_self(impl, make_qkv(case, dtype), case.layout())
        assert (out.dtype, lse.dtype, lse.requires_grad) == (dtype, wide, False)
        out, lse = run_cross(impl, *make_q_kv(cross, dtype), make_index(cross))
        assert (out.dtype, lse.dtype, lse.requires_grad) == (dtype, wide, False)


def test_scale() -> None:
    case = SELF_CASES["all kinds"]
    qkv = make_qkv(case, torch.float64)
    scaled = qkv.clone()
    scaled[:, 0] *= 3
    out = qformer_attention(qkv, case.layout(), scale=3 * case.D**-0.5)
    torch.testing.assert_close(out, qformer_attention(scaled, case.layout()))


@settings(max_examples=40, deadline=None)
@given(case=self_cases(), seed=st.integers(0, 1000))
def test_any_token_buffer(case: SelfCase, seed: int) -> None:
    qkv, layout = make_qkv(case, torch.float64, seed), case.layout()
    expected = _with_grads("reference", qkv, layout, case.p)
    for impl in ("sdpa", PADDED):
        for x, y in zip(_with_grads(impl, qkv, layout, case.p), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def _with_grads(impl: str, qkv: Tensor, layout: AttentionLayout, p: float) -> list[Tensor]:
    leaf = qkv.detach().requires_grad_()
    out, lse = run_self(impl, leaf, layout, p, philox_of(p))
    (grad,) = torch.autograd.grad((out * out).sum(), leaf)
    return [out.detach(), lse, grad]


@settings(max_examples=40, deadline=None)
@given(case=cross_cases(), seed=st.integers(0, 1000))
def test_any_images_and_blocks(case: CrossCase, seed: int) -> None:
    results: dict[str, list[Tensor]] = {}
    for impl in ("reference", "sdpa", PADDED):
        leaves = [x.detach().requires_grad_() for x in make_q_kv(case, torch.float64, seed)]
        mask = make_key_mask(case, seed)
        out, lse = run_cross(impl, *leaves, make_index(case), mask, case.p, philox_of(case.p))
        grads = torch.autograd.grad((out * out).sum(), leaves)
        results[impl] = [out.detach(), lse, *grads]
    for impl in ("sdpa", PADDED):
        for x, y in zip(results[impl], results["reference"], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa", PADDED])
def test_dropout_keeps_its_share_and_the_mean(impl: str) -> None:
    """With equal scores and unit values an output is a count of kept weights."""
    p, keys = 0.3, 64
    layout = AttentionLayout.build(40, keys)
    qkv = torch.zeros(layout.num_rows, 3, 4, 16)
    qkv[:, 2] = 1
    out, _ = run_self(impl, qkv, layout, p, philox_state(11))
    draws = layout.num_rows * 4 * keys
    share = out[..., 0].double().mean().item() * (1 - p)
    # five standard deviations of a binomial
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / draws) ** 0.5
    q, kv = torch.zeros(9, 8, 4, 16), torch.ones(9, 200, 2, 4, 16)
    out, _ = run_cross(impl, q, kv, None, None, p, philox_state(11))
    share = out[..., 0].double().mean().item() * (1 - p)
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / (9 * 8 * 4 * 200)) ** 0.5


@pytest.mark.parametrize("impl", ["sdpa", PADDED])
def test_dropout_is_the_mask_that_can_be_exported(impl: str) -> None:
    case = SELF_CASES["dropout"]
    qkv, layout, philox = make_qkv(case, torch.float64), case.layout(), philox_of(case.p)
    keep = reference.self_attention_keep(layout, case.H, philox, case.p)
    visible, _ = reference.visible_pairs(layout)
    q, k, v = qkv.permute(1, 2, 0, 3)
    scores = (q @ k.mT * case.D**-0.5).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) * keep / (1 - case.p)) @ v
    out, _ = run_self(impl, qkv, layout, case.p, philox)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=1e-13)
    assert 0 < keep[:, visible].double().mean() < 1


@pytest.mark.parametrize("impl", ["reference", "sdpa", PADDED])
def test_dropout_is_reproducible_and_differs_by_layer_and_seed(impl: str) -> None:
    case, cross = SELF_CASES["dropout"], CROSS_CASES["dropout"]
    qkv, layout = make_qkv(case, torch.float32), case.layout()
    q_kv, index = make_q_kv(cross, torch.float32), make_index(cross)
    for run in (
        lambda philox: run_self(impl, qkv, layout, 0.3, philox)[0],
        lambda philox: run_cross(impl, *q_kv, index, None, 0.3, philox)[0],
    ):
        first = run(philox_state(1, 0))
        assert run(philox_state(1, 0)).equal(first)
        for other in (philox_state(1, 1), philox_state(2, 0), philox_state(1 + 2**32, 0)):
            assert not run(other).equal(first)


def test_no_dropout_needs_no_seed() -> None:
    case = SELF_CASES["all kinds"]
    qkv = make_qkv(case, torch.float32)
    plain = qformer_attention(qkv, case.layout())
    assert qformer_attention(qkv, case.layout(), philox=philox_state(3)).equal(plain)
