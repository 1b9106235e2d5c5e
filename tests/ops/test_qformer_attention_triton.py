"""The Triton kernels of Q-Former attention: on a GPU where there is one, else interpreted.

The interpreter has to be asked for before Triton is imported, so `test_through_the_interpreter`
runs this file in a process of its own. What the kernels compile to is in
`test_qformer_attention_aot.py`.
"""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_cases import poisoned_memory, values_and_grads
from torch import Tensor

pytest.importorskip("triton")

from blip2fast.kernels.qformer_attention import config, reference
from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.masks import MaskKind
from blip2fast.ops._glue_checks import INTERPRETED
from blip2fast.ops.attention_layout import AttentionLayout, KVIndex
from blip2fast.ops.philox import philox_state

Function = Callable[..., Tensor]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# the interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
P = 0.3
UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL
runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run anyway")
def test_through_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    # all but this test itself
    assert "1 skipped" in done.stdout, done.stdout[-4000:]


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, keep: Tensor | None, p: float):
    """What PyTorch makes of the definition in the type of the inputs."""
    weights = (q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf).softmax(-1)
    # a row that sees nothing gives 0
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return (weights if keep is None else weights * keep / (1 - p)) @ v


def assert_as_exact_as_pytorch(
    ours: Function, plain: Function, inputs: list[Tensor], dout: Tensor, greatest_lse: float
) -> None:
    """Errors against fp64 are at most twice PyTorch's, plus roundings that the interface asks for.

    One of the result; and, in a gradient, that of the lse: it is kept in fp32, where PyTorch's
    textbook attention keeps the weights.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = values_and_grads(plain, wide, dout)
    got, rival = (values_and_grads(f, inputs, dout) for f in (ours, plain))
    for place, (x, y, z) in enumerate(zip(got, rival, exact, strict=True)):
        assert x.shape == z.shape
        assert x.dtype == y.dtype
        assert x.isfinite().all(), f"result {place} is not finite"
        rounding = torch.finfo(x.dtype).eps / 2
        if place > 0:
            rounding += torch.finfo(torch.float32).eps / 2 * greatest_lse
        error, allowed = (x.double() - z).norm(), 2 * (y.double() - z).norm() + rounding * z.norm()
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"


# self-attention


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
        return random(*shape, seed=0, dtype=dtype).requires_grad_()

    def dout(self) -> Tensor:
        shape = (self.layout.num_rows, self.heads, self.width)
        return random(*shape, seed=1, dtype=torch.float32)


# every kind, an empty text of each kind that may be, two texts that read one block
MIXED = SelfCase(
    3, 5, (4, 0, 7, 9, 1, 0, 0), (UNI, BI, CAUSAL, CAUSAL, BI, UNI, CAUSAL), (0, 1, 2, 2, 0, 0, 1)
)
SMALL_TILES = config.Tiles(16, 16, 32, heads=1, single=False, num_warps=4)
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
        ctx.philox = philox_state(2**40 + 5, 3, DEVICE) if p > 0 else None
        tiles = case.tiles
        out, lse = self_forward(qkv, case.layout, 0.3, p, ctx.philox, tiles)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, lse = ctx.saved_tensors
        dqkv = self_backward(
            dout, qkv, out, lse, ctx.case.layout, 0.3, ctx.p, ctx.philox, ctx.case.tiles
        )
        return dqkv, None, None


def triton_self(case: SelfCase, p: float, qkv: Tensor) -> Tensor:
    return SelfAttention.apply(qkv, case, p)


def plain_self(case: SelfCase, p: float, qkv: Tensor) -> Tensor:
    visible, _ = reference.visible_pairs(case.layout)
    q, k, v = qkv.permute(1, 2, 0, 3)
    keep = None
    if p > 0:
        philox = philox_state(2**40 + 5, 3, DEVICE)
        keep = reference.self_attention_keep(case.layout, case.heads, philox, p)
    return plain_attend(q * 0.3, k, v, visible, keep, p).transpose(0, 1)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SELF_CASES)
def test_self_is_as_exact_as_pytorch(name: str, dtype: torch.dtype, p: float) -> None:
    case = SELF_CASES[name]
    ours, plain = partial(triton_self, case, p), partial(plain_self, case, p)
    qkv = case.qkv(dtype)
    _, lse = reference.qformer_attention(qkv.detach(), case.layout, 0.3)
    assert_as_exact_as_pytorch(ours, plain, [qkv], case.dout(), lse.abs().max().item())


@runs_kernels
def test_self_lse() -> None:
    qkv = MIXED.qkv(torch.float32)
    _, lse = self_forward(qkv, MIXED.layout, 0.3, 0.0, None)
    _, expected = reference.qformer_attention(qkv.double(), MIXED.layout, 0.3)
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
    out, _ = self_forward(qkv, layout, 0.3, P, philox)
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
    bound = 0.3 * torch.finfo(dtype).eps * shared[:, None] * qkv[:, [1, 0]].abs().float()
    assert (dqkv[:, :2].abs() <= bound).all()


@runs_kernels
def test_no_rows() -> None:
    case = SelfCase(0, 4, (0, 0), (UNI, UNI))
    out, dqkv = values_and_grads(
        partial(triton_self, case, 0.0), [case.qkv(torch.float32)], case.dout()
    )
    assert out.shape == (0, 2, 24)
    assert dqkv.shape == (0, 3, 2, 24)


# cross-attention


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
    tiles: tuple[config.CrossTiles, tuple[config.CrossTiles, config.CrossTiles]] | None = None

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
        q = random(
            1 if self.shared else self.num_blocks,
            self.num_queries,
            self.heads,
            self.width,
            seed=0,
            dtype=dtype,
        )
        shape = (self.images, self.tokens, 3, 2, self.heads, self.width)
        merged = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        merged[:, :, 1] = random(*merged[:, :, 1].shape, seed=1, dtype=dtype)
        if self.key_mask is not None:
            merged[~self.key_mask] = torch.nan
        return [q.requires_grad_(), merged[:, :, 1].requires_grad_()]

    def dout(self) -> Tensor:
        shape = (self.num_blocks, self.num_queries, self.heads, self.width)
        return random(*shape, seed=3, dtype=torch.float32)


def cross_tiles(block_m: int, block_n: int, tail: int) -> config.CrossTiles:
    return config.CrossTiles(
        block_m, block_n, 32, heads=1, single=False, num_warps=4, full=True, tail=tail
    )


SMALL_CROSS = (cross_tiles(16, 16, 16), (cross_tiles(16, 16, 16), cross_tiles(16, 16, 16)))
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
        philox = philox_state(2**40 + 5, 3, DEVICE) if p > 0 else None
        ctx.options = (case.index, case.key_mask)
        ctx.dropout = (0.3, p, philox)
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
    return CrossAttention.apply(q, kv, case, p)


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
        keep = reference.cross_attention_keep(*sizes, philox_state(2**40 + 5, 3, DEVICE), p)
    return plain_attend(q.transpose(1, 2) * 0.3, k, v, visible, keep, p).transpose(1, 2)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CROSS_CASES)
def test_cross_is_as_exact_as_pytorch(name: str, dtype: torch.dtype, p: float) -> None:
    case = CROSS_CASES[name]
    ours, plain = partial(triton_cross, case, p), partial(plain_cross, case, p)
    # of 0.3 * q.k of normal numbers, and the logarithm of how many keys there are
    greatest_lse = 1.0 + math.log(case.tokens)
    assert_as_exact_as_pytorch(ours, plain, case.inputs(dtype), case.dout(), greatest_lse)


@runs_kernels
@pytest.mark.parametrize("name", ["mask", "split"])
def test_cross_rows_that_see_nothing(name: str) -> None:
    case = replace(CROSS_CASES[name], reads=(0, 1, 0, 1)[: CROSS_CASES[name].num_blocks])
    q, kv = case.inputs(torch.float32)
    out, lse = cross_forward(q, kv, case.index, case.key_mask, case.num_blocks, 0.3, 0.0, None)
    assert (out[::2] == 0).all()
    assert (lse[::2] == -torch.inf).all()
    real = kv.detach().masked_fill(~case.key_mask[..., None, None, None], 0).double()
    reads = case.index.index
    _, expected = reference.qformer_cross_attention(q.double(), real, reads, case.key_mask, 0.3)
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
    out, _ = cross_forward(q, kv, None, None, 4, 0.3, P, philox)
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


# offsets


def sparse_memory(elements: int) -> Tensor:
    """fp16 memory of which only what is touched exists."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)


@pytest.mark.skipif(not INTERPRETED, reason="needs memory that exists where it is touched only")
def test_offsets_beyond_32_bits() -> None:
    """Row 3 at 3 * 2^30 elements, image 3 likewise: products of int32 that do not fit int32."""
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
    cross = CrossCase(2, 3, 4, 5, (3, 2), width=16, heads=1)
    q, kv = cross.inputs(torch.float16)
    far = sparse_memory(3 * stride + 512).as_strided(kv.shape, (stride, 32, 16, 16, 1))
    far.copy_(kv.detach())
    function = partial(triton_cross, cross, 0.0)
    for got, expected in zip(
        values_and_grads(function, [q, far.requires_grad_()], cross.dout()),
        values_and_grads(function, [q, kv], cross.dout()),
        strict=True,
    ):
        assert torch.equal(got, expected)
