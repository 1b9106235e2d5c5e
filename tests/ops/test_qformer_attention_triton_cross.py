"""The Triton kernels of cross-attention: on a GPU where there is one, else interpreted.

What the kernels compile to is in `test_qformer_attention_aot.py`.
"""

from __future__ import annotations

import math
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
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.layout import KVIndex
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@dataclass(frozen=True)
class CrossCase:
    """Sizes and who reads what; `tiles` (forward; backward) other than the launchers' own."""

    num_blocks: int
    num_queries: int
    images: int
    tokens: int
    reads: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 24
    mask: bool = False
    shared: bool = False
    tiles: tuple[config.CrossTiles, tuple[config.CrossTiles, ...]] | None = None

    @property
    def index(self) -> KVIndex | None:
        if self.reads is None:
            return None
        return KVIndex.build(torch.tensor(self.reads, device=DEVICE), self.images)

    @property
    def key_mask(self) -> Tensor | None:
        if not self.mask:
            return None
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(self.images, self.tokens, generator=generator) > 0.4
        mask[0] = False
        return mask.to(DEVICE)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q; keys and values as one layer's slice, the other layers and masked tokens NaN."""
        blocks = 1 if self.shared else self.num_blocks
        q_shape = (blocks, self.num_queries, self.heads, self.width)
        q = make_rows(*q_shape, seed=0, dtype=dtype, device=DEVICE)
        shape = (self.images, self.tokens, 3, 2, self.heads, self.width)
        merged = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        layer = make_rows(*merged[:, :, 1].shape, seed=1, dtype=dtype, device=DEVICE)
        merged[:, :, 1] = layer.detach()
        if self.key_mask is not None:
            merged[~self.key_mask] = torch.nan
        return [q, merged[:, :, 1].requires_grad_()]

    def dout(self) -> Tensor:
        shape = (self.num_blocks, self.num_queries, self.heads, self.width)
        return make_rows(*shape, seed=3, dtype=torch.float32, device=DEVICE).detach()


def cross_tiles(block_m: int, block_n: int, tail: int, uses: int = 0) -> config.CrossTiles:
    return config.CrossTiles(
        block_m, block_n, 32, heads=1, single=False, num_warps=4, full=True, tail=tail, uses=uses
    )


SMALL = cross_tiles(16, 16, 16)
SMALL_CROSS = (SMALL, (SMALL, SMALL))


def uses_cross(
    *uses: int, tail: int = 16
) -> tuple[config.CrossTiles, tuple[config.CrossTiles, ...]]:
    """Owners of images with at most so many uses, then chunks."""
    owners = [SMALL if each == 0 else cross_tiles(16, 16, tail, each) for each in uses]
    return SMALL, (*owners, SMALL)


def last_cross(uses: int) -> tuple[config.CrossTiles, tuple[config.CrossTiles, ...]]:
    """All images by the kernel that holds so many uses' dq in registers."""
    return SMALL, (cross_tiles(16, 16, 16, uses),)


CROSS_CASES = {
    "window": CrossCase(5, 3, 5, 15, heads=4),
    "shared_queries": CrossCase(3, 5, 3, 70, shared=True),
    "one_block": CrossCase(1, 5, 1, 17),
    "blip2": CrossCase(2, 32, 2, 257, heads=1, width=64),
    "uses_1_3_9": CrossCase(13, 5, 4, 17, (1, 2, 0, 1, 2, 2, 2, 2, 1, 2, 2, 2, 2)),
    # the rows of one image fit no tile, an image is not read, keys are masked, image 0 wholly
    "beyond_a_tile": CrossCase(
        9, 15, 3, 37, (1, 1, 1, 0, 0, 1, 1, 1, 1), mask=True, tiles=SMALL_CROSS
    ),
    "uses_in_registers": CrossCase(
        11, 5, 5, 37, (1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4), tiles=uses_cross(4)
    ),
    "more_uses_than_in_registers": CrossCase(
        14, 15, 4, 19, (0, 2, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0), mask=True, tiles=uses_cross(3)
    ),
    "fewer_uses_in_registers": CrossCase(
        15, 15, 5, 19, (4, 2, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, 4, 0, 0), mask=True, tiles=last_cross(3)
    ),
    "uses_one_by_one": CrossCase(
        8, 5, 4, 35, (0, 0, 0, 2, 2, 3, 3, 3), shared=True, tiles=last_cross(1)
    ),
    "uses_in_registers_or_tiles": CrossCase(
        9, 16, 4, 32, (0, 0, 1, 2, 2, 2, 3, 3, 3), tiles=uses_cross(2, 0, tail=0)
    ),
    "shared_queries_in_registers": CrossCase(
        6, 5, 2, 33, (1, 1, 1, 1, 0, 0), shared=True, tiles=uses_cross(4)
    ),
    "one_use_in_registers": CrossCase(3, 5, 3, 37, mask=True, tiles=uses_cross(1)),
    "too_many_queries_for_registers": CrossCase(3, 17, 3, 37, tiles=uses_cross(1)),
    "mask": CrossCase(4, 3, 2, 33, (1, 0, 1, 1), mask=True),
    "shared_and_read_often": CrossCase(6, 15, 2, 70, (1, 1, 1, 1, 1, 0), shared=True, heads=1),
    "split": CrossCase(2, 3, 2, 531, (1, 1), heads=1, mask=True),
    "queries_of_two_tiles": CrossCase(1, 70, 1, 65, heads=1, width=16),
}


class CrossAttention(torch.autograd.Function):
    """The launchers, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, case: CrossCase, p: float) -> Tensor:
        ctx.case = case
        philox = philox_of(p)
        ctx.options = (case.index, case.key_mask)
        ctx.dropout = (SCALE, p, philox)
        tiles = None if case.tiles is None else case.tiles[0]
        out, lse = cross_forward(q, kv, *ctx.options, case.num_blocks, *ctx.dropout, tiles)
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tiles = None if ctx.case.tiles is None else ctx.case.tiles[1]
        saved = ctx.saved_tensors
        return *cross_backward(dout, *saved, *ctx.options, *ctx.dropout, tiles), None, None


def triton_cross(case: CrossCase, p: float, q: Tensor, kv: Tensor) -> Tensor:
    out = CrossAttention.apply(q, kv, case, p)
    assert out.dtype == q.dtype
    return out


def plain_cross(case: CrossCase, p: float, q: Tensor, kv: Tensor) -> Tensor:
    image = torch.arange(case.images, device=DEVICE)
    image = image if case.index is None else case.index.index.long()
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    if case.key_mask is not None:
        visible = case.key_mask[image][:, None, None]
        kv = kv.masked_fill(~case.key_mask[..., None, None, None], 0)
    k, v = kv[image].permute(2, 0, 3, 1, 4)
    keep = None
    if p > 0:
        sizes = (case.num_blocks, case.num_queries, case.heads, case.tokens)
        keep = reference.cross_attention_keep(*sizes, philox_of(p), p)
    return plain_attend(q.transpose(1, 2) * SCALE, k, v, visible, keep, p).transpose(1, 2)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CROSS_CASES)
def test_cross_is_as_exact_as_pytorch(name: str, dtype: torch.dtype, p: float) -> None:
    case = CROSS_CASES[name]
    ours, plain = partial(triton_cross, case, p), partial(plain_cross, case, p)
    # of SCALE * q.k of normal numbers, and the logarithm of how many keys there are
    greatest_lse = 1.0 + math.log(case.tokens)
    rounding = LSE_ROUNDING * greatest_lse
    inputs, dout = case.inputs(dtype), case.dout()
    assert_as_exact_as(ours, plain, inputs, dout, grad_rounding=rounding)


@runs_kernels
@pytest.mark.parametrize("name", ["mask", "split"])
def test_cross_rows_that_see_nothing(name: str) -> None:
    case = replace(CROSS_CASES[name], reads=(0, 1, 0, 1)[: CROSS_CASES[name].num_blocks])
    q, kv = case.inputs(torch.float32)
    out, lse = cross_forward(q, kv, case.index, case.key_mask, case.num_blocks, SCALE, 0.0, None)
    assert (out[::2] == 0).all()
    assert (lse[::2] == -torch.inf).all()
    real = kv.detach().masked_fill(~case.key_mask[..., None, None, None], 0).double()
    reads = case.index.index
    _, expected = reference.qformer_cross_attention(q.double(), real, reads, case.key_mask, SCALE)
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)
    dq, dkv = values_and_grads(partial(triton_cross, case, P), [q, kv], case.dout())[1:]
    assert (dq[::2] == 0).all()
    assert (dkv[0] == 0).all()


@runs_kernels
def test_cross_image_that_nobody_reads_gets_0() -> None:
    case = replace(CROSS_CASES["mask"], mask=False, reads=(1, 1, 1, 1))
    *_, dkv = values_and_grads(
        partial(triton_cross, case, 0.0), case.inputs(torch.float16), case.dout()
    )
    assert (dkv[0] == 0).all()
    assert (dkv[1] != 0).any()


@runs_kernels
def test_keys_are_split_where_rows_are_few() -> None:
    """The case above that is named so does split them, forward and backward."""
    case = CROSS_CASES["split"]
    q, kv = case.inputs(torch.float16)
    for tiles in (
        config.cross_forward_tiles(q, kv, 2),
        config.cross_backward_tiles(q, kv, 2)[0],
    ):
        parts, tiles_of_split = config.splits(3, -(-531 // tiles.block_n), tiles.full)
        assert parts > 1
        assert parts * tiles_of_split * tiles.block_n >= 531
    assert config.splits(config.PROGRAMS, 1000, True)[0] == 1


@runs_kernels
def test_cross_queries_with_strides() -> None:
    case = CROSS_CASES["uses_1_3_9"]
    q, kv = case.inputs(torch.float32)
    apart = torch.full((13, 5, 4, 2, 24), torch.nan, device=DEVICE)
    apart[:, :, 1] = q.detach()
    function = partial(triton_cross, case, P)
    for got, expected in zip(
        values_and_grads(function, [apart[:, :, 1].requires_grad_(), kv], case.dout()),
        values_and_grads(function, [q, kv], case.dout()),
        strict=True,
    ):
        assert torch.equal(got, expected)


@runs_kernels
def test_cross_twice_is_bitwise_equal() -> None:
    case = CROSS_CASES["beyond_a_tile"]
    inputs, function = case.inputs(torch.float16), partial(triton_cross, case, P)
    first, second = (values_and_grads(function, inputs, case.dout()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs_kernels
def test_cross_drops_exactly_what_the_mask_says() -> None:
    q = torch.zeros(4, 3, 2, 32, device=DEVICE)
    kv = torch.zeros(4, 21, 2, 2, 32, device=DEVICE)
    kv[:, :, 1] = torch.eye(21, 32, device=DEVICE)[:, None]
    philox = philox_state(7, 1, DEVICE)
    out, _ = cross_forward(q, kv, None, None, 4, SCALE, P, philox)
    keep = reference.cross_attention_keep(4, 3, 2, 21, philox, P)
    assert torch.equal(out[..., :21].transpose(1, 2) > 0, keep)
    assert not keep.all()


@runs_kernels
def test_cross_without_blocks_or_tokens() -> None:
    nothing = CrossCase(0, 3, 2, 5, ())
    out, dq, dkv = values_and_grads(
        partial(triton_cross, nothing, 0.0), nothing.inputs(torch.float32), nothing.dout()
    )
    assert out.shape == dq.shape == (0, 3, 2, 24)
    assert (dkv == 0).all()
    blind = CrossCase(2, 3, 2, 0)
    out, dq, dkv = values_and_grads(
        partial(triton_cross, blind, 0.0), blind.inputs(torch.float32), blind.dout()
    )
    assert (out == 0).all()
    assert (dq == 0).all()
    assert dkv.shape == (2, 0, 2, 2, 24)


@pytest.mark.skipif(not INTERPRETED, reason="needs memory that exists where it is touched only")
def test_cross_offsets_beyond_32_bits() -> None:
    """Image 3 at 3 * 2^30 elements: a product of int32 that does not fit int32."""
    stride = 2**30
    case = CrossCase(2, 3, 4, 5, (3, 2), width=16, heads=1)
    q, kv = case.inputs(torch.float16)
    far = sparse_memory(3 * stride + 512).as_strided(kv.shape, (stride, 32, 16, 16, 1))
    far.copy_(kv.detach())
    function = partial(triton_cross, case, 0.0)
    for got, expected in zip(
        values_and_grads(function, [q, far.requires_grad_()], case.dout()),
        values_and_grads(function, [q, kv], case.dout()),
        strict=True,
    ):
        assert torch.equal(got, expected)
