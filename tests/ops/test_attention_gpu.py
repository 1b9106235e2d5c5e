"""The Q-Former's attentions in a CUDA graph: captured without a wait, replayed on other data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import B, C, U
from torch import Tensor

from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.attention_layout import AttentionLayout, KVIndex
from blip2fast.ops.philox import philox_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Attention = Callable[..., Tensor]


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

    held = [x.requires_grad_() for x in drawn(shapes, 0)]
    try:
        both(held)
    except NotImplementedError as missing:
        pytest.skip(str(missing))
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
