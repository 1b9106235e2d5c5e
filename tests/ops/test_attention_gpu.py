"""The Q-Former's attentions on a GPU: the definition's numbers, and captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    SELF_CASES,
    B,
    C,
    U,
    assert_exact,
    make_qkv,
    narrow_self,
    philox_of,
    value_and_grads,
)
from cross_attention_cases import CASES, Inputs, Results, check_cross_attention
from torch import Tensor

from blip2fast import _extension
from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Attention = Callable[..., Tensor]
DTYPES = [torch.bfloat16, torch.float16]
# of one key the gradient of a score is 0, and under dropout the output's rounding all that is left
CROSS = [(name, p) for name in CASES for p in (0.0, 0.1) if p == 0 or CASES[name].S > 1]


def skip_unless_built(impl: str) -> None:
    """Only what was not built or installed is skipped; what is there and refuses fails."""
    why_not = _extension.why_not("qformer_cross_attention_fwd") if impl == "cuda" else ""
    if impl == "triton" and not HAS_TRITON:
        why_not = "triton is not installed"
    if why_not:
        pytest.skip(why_not)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "p"), CROSS)
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_cross_attention_is_the_definition(
    impl: str, name: str, p: float, dtype: torch.dtype
) -> None:
    skip_unless_built(impl)

    def run(given: Inputs) -> Results:
        q, kv, index, mask, philox, d_out = given.tensors
        leaves = [x.detach().requires_grad_() for x in (q, kv)]
        out, lse = qformer_cross_attention(
            *leaves, index, key_mask=mask, dropout_p=p, philox=philox, impl=impl, return_lse=True
        )
        return Results(out.detach(), lse, *torch.autograd.grad(out, leaves, d_out))

    # tensor cores cut off what they add up, about 2^-22 of sums of up to 50
    case = replace(CASES[name], p=p, dtype=dtype)
    check_cross_attention(run, case, "cuda", lse_error=3e-5, cancelled=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", SELF_CASES)
def test_self_attention_is_the_definition(name: str, p: float, dtype: torch.dtype) -> None:
    skip_unless_built("triton")
    case = SELF_CASES[name]
    layout, philox, qkv = case.layout(), philox_of(p), make_qkv(case, dtype)
    options = {"dropout_p": p, "philox": None if philox is None else philox.cuda()}
    on_device = AttentionLayout.build(
        case.num_blocks, case.num_queries, case.lengths, case.kinds, case.blocks, device="cuda"
    )

    def ours(qkv: Tensor) -> Tensor:
        return qformer_attention(qkv, on_device, impl="triton", **options)

    def truth(qkv: Tensor) -> Tensor:
        return reference.qformer_attention(qkv, layout, case.D**-0.5, p, philox)[0]

    found = value_and_grads(ours, [qkv.cuda()])
    rival = value_and_grads(lambda qkv: narrow_self(qkv, layout, p, philox), [qkv])
    exact = value_and_grads(truth, [qkv.double()])
    # one gradient of the output for all: that of fp64, rounded
    assert_exact([x.cpu() for x in found], rival, exact)


def self_call(impl: str, p: float) -> tuple[Attention, list[tuple[int, ...]]]:
    """An attention of mixed texts, and the shapes of its inputs."""
    layout = AttentionLayout.build(3, 32, (7, 12, 5), (B, C, U), (0, 1, 2), device="cuda")
    philox = philox_state(5, 1, "cuda")

    def call(qkv: Tensor) -> Tensor:
        return qformer_attention(qkv, layout, dropout_p=p, philox=philox, impl=impl)

    return call, [(layout.num_rows, 3, 12, 64)]


def cross_call(impl: str, p: float) -> tuple[Attention, list[tuple[int, ...]]]:
    """Four blocks on three images, of which one is read twice and one token is hidden."""
    index = KVIndex.build(torch.tensor([1, 0, 1, 2], device="cuda"), 3)
    mask = torch.ones(3, 257, dtype=torch.bool, device="cuda")
    mask[0, 5] = False
    philox = philox_state(5, 2, "cuda")

    def call(q: Tensor, kv: Tensor) -> Tensor:
        return qformer_cross_attention(
            q, kv, index, key_mask=mask, dropout_p=p, philox=philox, impl=impl
        )

    return call, [(4, 32, 12, 64), (3, 257, 2, 12, 64)]


def drawn(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in shapes
    ]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "impl"),
    [
        (self_call, "auto"),
        (self_call, "triton"),
        (cross_call, "auto"),
        (cross_call, "triton"),
        (cross_call, "cuda"),
    ],
)
def test_a_graph_of_forward_and_backward_is_the_calls(
    make: Callable[[str, float], tuple[Attention, list[tuple[int, ...]]]], impl: str, p: float
) -> None:
    call, shapes = make(impl, p)

    def both(leaves: list[Tensor]) -> list[Tensor]:
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    skip_unless_built(impl)
    held = [x.requires_grad_() for x in drawn(shapes, 0)]
    both(held)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(held)
    for seed in (1, 2):
        others = drawn(shapes, seed)
        with torch.no_grad():
            for x, other in zip(held, others, strict=True):
                x.copy_(other)
        graph.replay()
        expected = both([x.requires_grad_() for x in others])
        for found, eager in zip(captured, expected, strict=True):
            assert torch.equal(found, eager)
