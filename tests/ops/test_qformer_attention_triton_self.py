"""The Triton kernels of self-attention: on a GPU where there is one, else interpreted.

What the kernels compile to is in `test_qformer_attention_aot.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_triton_cases import LSE_ROUNDING, SCALE, P, philox_of, plain_attend, sparse_memory
from glue_cases import assert_as_exact_as, make_rows, values_and_grads
from torch import Tensor
from triton_cases import DEVICE, DTYPES, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import config, reference
from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, MaskKind
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")
UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@dataclass(frozen=True)
class SelfCase:
    """A layout and a size; `tiles` other than those that the launcher would take."""

    num_blocks: int
    num_queries: int
    lengths: tuple[int, ...] = ()
    kinds: tuple[MaskKind, ...] = ()
    blocks: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 24
    tiles: config.Tiles | None = None

    @property
    def layout(self) -> AttentionLayout:
        return AttentionLayout.build(
            self.num_blocks,
            self.num_queries,
            self.lengths,
            self.kinds,
            self.blocks,
            device=DEVICE,
        )

    def qkv(self, dtype: torch.dtype) -> Tensor:
        shape = (self.layout.num_rows, 3, self.heads, self.width)
        return make_rows(*shape, seed=0, dtype=dtype, device=DEVICE)

    def dout(self) -> Tensor:
        shape = (self.layout.num_rows, self.heads, self.width)
        return make_rows(*shape, seed=1, dtype=torch.float32, device=DEVICE).detach()


# every kind, an empty text of each kind that may be, two texts that read one block
MIXED = SelfCase(
    3, 5, (4, 0, 7, 9, 1, 0, 0), (UNI, BI, CAUSAL, CAUSAL, BI, UNI, CAUSAL), (0, 1, 2, 2, 0, 0, 1)
)
SMALL_TILES = config.Tiles(16, 16, 32, heads=1, single=False, num_warps=4)
JOINED = config.Tiles(64, 64, 32, 1, True, 4, reader_m=16, joined=True)
SELF_CASES = {
    "mixed": MIXED,
    # more than one tile of rows and keys, at little cost
    "mixed_in_loops": replace(MIXED, lengths=(19, 17, 20, 7, 1, 0, 0), tiles=SMALL_TILES),
    "keys_in_one_tile_rows_in_two": replace(
        MIXED,
        lengths=(19, 17, 20, 7, 1, 0, 0),
        tiles=replace(SMALL_TILES, block_n=32, single=True),
    ),
    "bidirectional": SelfCase(2, 32, (12, 31), (BI, BI), width=64),
    "unimodal_and_causal": SelfCase(2, 32, (12, 5, 12, 5), (UNI, UNI, CAUSAL, CAUSAL), (0, 1) * 2),
    "tile_plus_one": SelfCase(2, 32, (33, 1), (BI, BI), heads=1),
    # a block with a text, one that nobody sees, one with several texts, and an empty text
    "joined": SelfCase(
        4,
        5,
        (9, 4, 17, 0, 3, 1, 18),
        (CAUSAL, UNI, CAUSAL, CAUSAL, UNI, CAUSAL, CAUSAL),
        (0, 1, 3, 2, 0, 3, 3),
        tiles=JOINED,
    ),
    "joined_heads_together": SelfCase(
        2,
        32,
        (12, 5, 32, 1),
        (UNI, UNI, CAUSAL, CAUSAL),
        (0, 1) * 2,
        width=32,
        tiles=replace(JOINED, heads=2),
    ),
    # a tile does not hold a block and its text, or another text is BIDIRECTIONAL
    "joined_but_too_long": SelfCase(
        2, 32, (20, 2), (CAUSAL,) * 2, tiles=replace(JOINED, block_m=32)
    ),
    "joined_but_bidirectional": replace(MIXED, tiles=JOINED),
    "three_texts_of_one_block": SelfCase(2, 3, (2, 17, 4), (CAUSAL,) * 3, (1, 1, 1), heads=4),
    "text_alone": SelfCase(0, 7, (4, 3, 17), (UNI,) * 3, heads=3, width=16),
    "queries_alone": SelfCase(3, 3, heads=12, width=16),
    "queries_of_two_tiles": SelfCase(1, 70, heads=1, width=100),
    "no_queries": SelfCase(0, 0, (5, 1), (UNI, UNI), heads=1),
}


class SelfAttention(torch.autograd.Function):
    """The launchers, forward and backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, case: SelfCase, p: float) -> Tensor:
        ctx.case, ctx.p = case, p
        ctx.philox = philox_of(p)
        tiles = case.tiles
        out, lse = self_forward(qkv, case.layout, SCALE, p, ctx.philox, tiles)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, lse = ctx.saved_tensors
        dqkv = self_backward(
            dout, qkv, out, lse, ctx.case.layout, SCALE, ctx.p, ctx.philox, ctx.case.tiles
        )
        return dqkv, None, None


def triton_self(case: SelfCase, p: float, qkv: Tensor) -> Tensor:
    out = SelfAttention.apply(qkv, case, p)
    assert out.dtype == qkv.dtype
    return out


def plain_self(case: SelfCase, p: float, qkv: Tensor) -> Tensor:
    visible, _ = reference.visible_pairs(case.layout)
    q, k, v = qkv.permute(1, 2, 0, 3)
    keep = None
    if p > 0:
        keep = reference.self_attention_keep(case.layout, case.heads, philox_of(p), p)
    return plain_attend(q * SCALE, k, v, visible, keep, p).transpose(0, 1)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SELF_CASES)
def test_self_is_as_exact_as_pytorch(name: str, dtype: torch.dtype, p: float) -> None:
    case = SELF_CASES[name]
    ours, plain = partial(triton_self, case, p), partial(plain_self, case, p)
    qkv = case.qkv(dtype)
    _, lse = reference.qformer_attention(qkv.detach(), case.layout, SCALE)
    rounding = LSE_ROUNDING * lse.abs().max().item()
    assert_as_exact_as(ours, plain, [qkv], case.dout(), grad_rounding=rounding)


@runs_kernels
def test_self_lse() -> None:
    qkv = MIXED.qkv(torch.float32)
    _, lse = self_forward(qkv, MIXED.layout, SCALE, 0.0, None)
    _, expected = reference.qformer_attention(qkv.double(), MIXED.layout, SCALE)
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)


@runs_kernels
def test_self_rows_with_a_stride() -> None:
    """Rows apart, and NaN between them: neither read nor written."""
    qkv = MIXED.qkv(torch.float32).detach()
    R, _, H, D = qkv.shape
    apart = torch.full((R, 3 * H * D + 7), torch.nan, device=DEVICE)
    apart[:, : 3 * H * D] = qkv.flatten(1)
    strided = apart[:, : 3 * H * D].view(R, 3, H, D)
    function = partial(triton_self, MIXED, P)
    for got, expected in zip(
        values_and_grads(function, [strided.requires_grad_()], MIXED.dout()),
        values_and_grads(function, [qkv.requires_grad_()], MIXED.dout()),
        strict=True,
    ):
        assert torch.equal(got, expected)


@runs_kernels
def test_self_twice_is_bitwise_equal() -> None:
    qkv = [MIXED.qkv(torch.float16)]
    function = partial(triton_self, MIXED, P)
    first, second = (values_and_grads(function, qkv, MIXED.dout()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs_kernels
def test_self_drops_exactly_what_the_mask_says() -> None:
    """With equal scores and one-hot values an output is a row of the mask."""
    case = replace(MIXED, width=16)
    layout = case.layout
    visible, place = reference.visible_pairs(layout)
    qkv = torch.zeros(layout.num_rows, 3, 2, 16, device=DEVICE)
    qkv[:, 2] = torch.nn.functional.one_hot(place, 16)[:, None].float()
    philox = philox_state(7, 1, DEVICE)
    out, _ = self_forward(qkv, layout, SCALE, P, philox)
    keep = reference.self_attention_keep(layout, 2, philox, P) & visible
    expected = torch.zeros(2, layout.num_rows, 16, dtype=torch.bool, device=DEVICE)
    expected |= (keep[..., None] & (place[:, None] == torch.arange(16, device=DEVICE))).any(2)
    assert torch.equal(out.transpose(0, 1) > 0, expected)
    assert not torch.equal(keep[0], visible)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_gives_its_value_and_no_gradient_to_scores(dtype: torch.dtype) -> None:
    """dq and dk are 0 but for the rounding of the output, from which their gradient is taken."""
    case = SelfCase(3, 1)
    qkv, dout = case.qkv(dtype), case.dout().to(dtype)
    out, dqkv = values_and_grads(partial(triton_self, case, 0.0), [qkv], dout)
    torch.testing.assert_close(out, qkv[:, 2].detach())
    torch.testing.assert_close(dqkv[:, 2], dout)
    shared = (dout.float() * out.float()).abs().sum(-1, keepdim=True)
    bound = SCALE * torch.finfo(dtype).eps * shared[:, None] * qkv[:, [1, 0]].abs().float()
    assert (dqkv[:, :2].abs() <= bound).all()


@runs_kernels
def test_no_rows() -> None:
    case = SelfCase(0, 4, (0, 0), (UNI, UNI))
    out, dqkv = values_and_grads(
        partial(triton_self, case, 0.0), [case.qkv(torch.float32)], case.dout()
    )
    assert out.shape == (0, 2, 24)
    assert dqkv.shape == (0, 3, 2, 24)


@pytest.mark.skipif(not INTERPRETED, reason="needs memory that exists where it is touched only")
def test_self_offsets_beyond_32_bits() -> None:
    """Row 3 at 3 * 2^30 elements: a product of int32 that does not fit int32."""
    stride = 2**30
    case = SelfCase(1, 4, width=16, heads=1)
    qkv = case.qkv(torch.float16).detach()
    far = sparse_memory(3 * stride + 64).as_strided(qkv.shape, (stride, *qkv.stride()[1:]))
    far.copy_(qkv)
    function = partial(triton_self, case, 0.0)
    for got, expected in zip(
        values_and_grads(function, [far.requires_grad_()], case.dout()),
        values_and_grads(function, [qkv.requires_grad_()], case.dout()),
        strict=True,
    ):
        assert torch.equal(got, expected)
