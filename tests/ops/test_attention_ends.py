"""The Q-Former's attentions at the ends of what they take: heads, queries, texts, image tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from attention_cases import (
    B,
    C,
    CrossCase,
    SelfCase,
    U,
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
from attention_triton_cases import LSE_ROUNDING
from glue_cases import assert_as_exact_as
from torch import Tensor
from triton_cases import run_interpreted, starts_interpreter

from blip2fast.kernels.qformer_attention import padded as _attention_padded
from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.dispatch import INTERPRETED

Function = Callable[..., Tensor]
IMPLS = ("sdpa", "reference")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# heads 16, 17, 127 and 128 wide; 1 and 256 queries; texts of 1 and 512 tokens
SELF_ENDS = {
    "256 queries, 512 tokens": SelfCase(1, 256, (512,), (B,), (0,), H=1),
    "256 queries, causal 512": SelfCase(1, 256, (512,), (C,), (0,), H=1, p=0.1),
    "512 tokens alone": SelfCase(0, 256, (512, 1), (U, U), H=1, D=17),
    "one query, one token, widest": SelfCase(1, 1, (1,), (B,), (0,), H=2, D=128),
    "one query, 512 tokens, odd width": SelfCase(1, 1, (512,), (C,), (0,), H=1, D=127),
}
# 1 to 16384 image tokens
CROSS_ENDS = {
    "one of each": CrossCase(1, 1, 1, 1, D=17),
    "16384 tokens": CrossCase(2, 1, 1, 16384, (0, 0), H=1),
    "16384 tokens, masked": CrossCase(1, 2, 2, 16384, (1,), H=1, masked=True, p=0.1),
    "256 queries, widest": CrossCase(1, 256, 1, 65, H=1, D=128),
    "256 queries, one token": CrossCase(1, 256, 1, 1, H=2, D=127),
}


def run_self(x: Tensor, case: SelfCase, impl: str) -> Tensor:
    layout, philox = case.layout(), philox_of(case.p)
    if impl == "padded":
        scale = case.D**-0.5
        return _attention_padded.self_attention(x, layout, scale, case.p, philox)[0]
    return qformer_attention(x, layout, dropout_p=case.p, philox=philox, impl=impl)


def run_cross(q: Tensor, kv: Tensor, case: CrossCase, impl: str) -> Tensor:
    index, mask, philox = make_index(case), make_key_mask(case), philox_of(case.p)
    if impl == "padded":
        image = None if index is None else index.index
        scale = case.D**-0.5
        return _attention_padded.cross_attention(q, kv, image, mask, scale, case.p, philox)[0]
    return qformer_cross_attention(
        q, kv, index, key_mask=mask, dropout_p=case.p, philox=philox, impl=impl
    )


def ours_and_rival(name: str, impl: str) -> tuple[Function, Function]:
    """An attention of a case, and PyTorch's under the mask written out."""
    if name in SELF_ENDS:
        case = SELF_ENDS[name]
        rival = partial(narrow_self, layout=case.layout(), p=case.p, philox=philox_of(case.p))
        return partial(run_self, case=case, impl=impl), rival
    cross = CROSS_ENDS[name]
    mask, philox = make_key_mask(cross), philox_of(cross.p)
    rival = partial(narrow_cross, case=cross, mask=mask, philox=philox)
    return partial(run_cross, case=cross, impl=impl), rival


def inputs_of(name: str, dtype: torch.dtype) -> list[Tensor]:
    if name in SELF_ENDS:
        return [make_qkv(SELF_ENDS[name], dtype)]
    return list(make_q_kv(CROSS_ENDS[name], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "padded"])
@pytest.mark.parametrize("name", [*SELF_ENDS, *CROSS_ENDS])
def test_as_exact_as_pytorch(name: str, impl: str, dtype: torch.dtype) -> None:
    ours, rival = ours_and_rival(name, impl)
    inputs = inputs_of(name, dtype)
    assert_exact(
        value_and_grads(ours, inputs),
        value_and_grads(rival, inputs),
        value_and_grads(rival, [x.double() for x in inputs]),
    )


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", [*SELF_ENDS, *CROSS_ENDS])
def test_triton_is_as_exact_as_pytorch(name: str) -> None:
    ours, rival = ours_and_rival(name, "triton")
    inputs = [x.requires_grad_() for x in inputs_of(name, torch.float32)]
    dout = torch.randn(rival(*inputs).shape, generator=torch.Generator().manual_seed(9))
    # scores of normal numbers over their width: their lse is that of the keys, and 1
    keys = SELF_ENDS[name] if name in SELF_ENDS else CROSS_ENDS[name]
    most = keys.S if isinstance(keys, CrossCase) else keys.num_queries + max(keys.lengths)
    rounding = LSE_ROUNDING * (1.0 + math.log(most))
    assert_as_exact_as(ours, rival, inputs, dout, grad_rounding=rounding)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", [U, B, C])
def test_large_scores_of_ragged_texts_have_finite_gradients(kind: MaskKind, p: float) -> None:
    """A score above another row's log-sum-exp by more than exp takes: rows of padding met it."""
    case = SelfCase(2, 2, (2, 1), (kind, kind), (0, 1), H=2, D=16, p=p)
    x = make_qkv(case, torch.float32) * 30
    found, expected = (_gradient(partial(run_self, case=case, impl=i), x) for i in IMPLS)
    assert_near(found, expected)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [9, 200])
def test_large_scores_of_hidden_images_have_finite_gradients(tokens: int, p: float) -> None:
    """Image 0 is masked as a whole: its scores have no log-sum-exp to be held against."""
    case = CrossCase(3, 3, 3, tokens, masked=True, p=p)
    q, kv = (x * 12 for x in make_q_kv(case, torch.float32))
    for place, leaf in enumerate((q, kv)):
        found, expected = (
            _gradient(partial(_with_leaf, place=place, given=(q, kv), case=case, impl=impl), leaf)
            for impl in IMPLS
        )
        assert_near(found, expected)


def _with_leaf(
    x: Tensor, place: int, given: tuple[Tensor, Tensor], case: CrossCase, impl: str
) -> Tensor:
    return run_cross(*((x, given[1]) if place == 0 else (given[0], x)), case, impl)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Finite, and the definition's but for roundings, which scores of hundreds enlarge."""
    assert bool(expected.isfinite().all())
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sin().sum(), leaf)
    return found
