"""Any token buffer, any images and blocks: shapes, kinds and index patterns for property tests."""

from __future__ import annotations

from attention_cases import CrossCase, SelfCase
from hypothesis import strategies as st

from blip2fast.kernels.qformer_attention.layout import MaskKind


@st.composite
def self_cases(draw: st.DrawFn) -> SelfCase:
    N, Q = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    kinds = draw(st.lists(st.sampled_from(MaskKind if N else [MaskKind.UNIMODAL]), max_size=6))
    lengths = draw(st.lists(st.integers(0, 9), min_size=len(kinds), max_size=len(kinds)))
    free = list(range(N))
    blocks = []
    for i, kind in enumerate(kinds):
        if kind is MaskKind.BIDIRECTIONAL and not free:
            kinds[i] = kind = MaskKind.MULTIMODAL_CAUSAL
        choices = free if kind is MaskKind.BIDIRECTIONAL else list(range(N)) or [0]
        blocks.append(draw(st.sampled_from(choices)))
        if kind is MaskKind.BIDIRECTIONAL:
            free.remove(blocks[-1])
    p = draw(st.sampled_from([0.0, 0.4]))
    H, D = draw(st.integers(1, 3)), draw(st.sampled_from([16, 24]))
    return SelfCase(N, Q, tuple(lengths), tuple(kinds), tuple(blocks), H, D, p)


@st.composite
def cross_cases(draw: st.DrawFn) -> CrossCase:
    images, Q, S = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(0, 9))
    index = draw(st.none() | st.lists(st.integers(0, images - 1), max_size=9).map(tuple))
    N = images if index is None else len(index)
    p = draw(st.sampled_from([0.0, 0.4]))
    masked, shared = draw(st.booleans()), draw(st.booleans())
    return CrossCase(N, Q, images, S, index, 2, 16, masked, shared, draw(st.integers(1, 2)), p)
