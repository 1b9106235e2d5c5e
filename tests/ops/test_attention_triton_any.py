"""The public attentions through Triton, interpreted, for any shapes, kinds and index patterns."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CrossCase,
    SelfCase,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
    philox_of,
)
from attention_strategies import cross_cases, self_cases
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import run_interpreted, starts_interpreter

from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
# fp32 against fp64: sums of at most 14 products of 24, twice; no entry is above a few units
TOLERANCE = 1e-5
few = settings(
    max_examples=25,
    deadline=None,
    # the fixture's state is the same for every example
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


def self_results(case: SelfCase, seed: int, impl: str, dtype: torch.dtype) -> list[Tensor]:
    qkv = make_qkv(case, torch.float32, seed).to(dtype).requires_grad_()
    out, lse = qformer_attention(
        qkv, case.layout(), dropout_p=case.p, philox=philox_of(case.p), impl=impl, return_lse=True
    )
    return [out.detach(), lse, *torch.autograd.grad((out * out).sum(), qkv)]


def cross_results(case: CrossCase, seed: int, impl: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in make_q_kv(case, torch.float32, seed)]
    out, lse = qformer_cross_attention(
        *leaves,
        make_index(case),
        key_mask=make_key_mask(case, seed),
        dropout_p=case.p,
        philox=philox_of(case.p),
        impl=impl,
        return_lse=True,
    )
    return [out.detach(), lse, *torch.autograd.grad((out * out).sum(), leaves)]


def assert_close(found: list[Tensor], expected: list[Tensor], inputs: list[Tensor]) -> None:
    """Output, lse and gradients.

    The gradient of a score is a difference of two sums, each up to `sum(out * dout)`: rounding that
    stays, where they cancel, reaches q and k times an input.
    """
    sums = (expected[0] * expected[0]).sum(-1)
    # of no rows and no keys 0
    largest = max([float(x.detach().abs().max()) for x in inputs if x.numel()], default=0.0)
    most = float(sums.max()) if sums.numel() else 0.0
    cancelled = 2 * most * largest * torch.finfo(torch.float32).eps
    for place, (x, y) in enumerate(zip(found, expected, strict=True)):
        atol = TOLERANCE + (cancelled if place > 1 else 0.0)
        torch.testing.assert_close(x.double(), y, rtol=TOLERANCE, atol=atol)


@interpreted
@few
@given(case=self_cases(), seed=st.integers(0, 1000))
def test_any_token_buffer(case: SelfCase, seed: int) -> None:
    found = self_results(case, seed, "triton", torch.float32)
    expected = self_results(case, seed, "reference", torch.float64)
    assert_close(found, expected, [make_qkv(case, torch.float32, seed)])


@interpreted
@few
@example(
    # one key is visible: sums of about 90 cancel, and the gradient of its score is 0
    case=CrossCase(6, 4, 2, 2, index=(0, 0, 0, 1, 0, 1), H=2, D=16, masked=True, p=0.4),
    seed=193,
)
@given(case=cross_cases(), seed=st.integers(0, 1000))
def test_any_images_and_blocks(case: CrossCase, seed: int) -> None:
    found = cross_results(case, seed, "triton", torch.float32)
    expected = cross_results(case, seed, "reference", torch.float64)
    assert_close(found, expected, list(make_q_kv(case, torch.float32, seed)))
