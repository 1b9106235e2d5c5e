"""The ITC kernels in Triton: on a GPU where there is one, else through the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from glue_cases import assert_as_exact_as
from itc_cases import definition, make_features
from torch import Tensor
from triton_cases import DEVICE, DTYPES, GPU, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")
from blip2fast.kernels.itc import backward, forward, reference
from blip2fast.kernels.itc.config import TritonConfig, backward_config, forward_config
from blip2fast.kernels.itc.interface import Options, Pairs, Weights
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
GPU_SHAPES = [(300, 32, 256), (65, 256, 64), (50, 3, 1024), (130, 1, 16)]


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__, for_a_gpu=len(GPU_SHAPES) * len(DTYPES))


def small(Q: int, D: int, images: int = 2, **changes: int) -> TritonConfig:
    """Tiles that small inputs fill several of, with a rest."""
    block_q = 1 << (Q - 1).bit_length()
    width = 1 << (D - 1).bit_length()
    config = TritonConfig(16, max(images, 16 // block_q), block_q, width, width, 4, 2)
    return replace(config, **changes)


# M, N, first row, Q, D, tiles: rectangles, one of each, a width in parts, padded queries and widths
CASES = [
    (5, 20, 3, 8, 16, small(8, 16)),
    (17, 18, 1, 5, 20, small(5, 20, images=4)),
    (1, 1, 0, 3, 16, small(3, 16)),
    (2, 2, 0, 1, 16, small(1, 16)),
    (3, 18, 15, 32, 48, small(32, 48, images=1, block_d=16, out_d=16)),
    # the most queries, and the widest
    (3, 18, 0, 256, 16, small(256, 16, images=1)),
    (3, 18, 0, 2, 1024, small(2, 1024, block_d=128, out_d=256)),
]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("with_ids", [False, True])
def test_sweep(case: int, dtype: torch.dtype, with_ids: bool) -> None:
    """Statistics, saved similarity and negatives against the definition in fp64."""
    M, N, first, Q, D, config = CASES[case]
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(max(M, N), Q, D, dtype))
    image, text = image[:M], text[:N]
    ids = (torch.arange(N, device=DEVICE) * 7 + 3) % max(2, N // 2)
    pairs = Pairs(first, ids[first : first + M], ids) if with_ids else Pairs(first, None, None)
    options = Options(philox_state(5, 2, DEVICE), save=True)
    got = forward.sweep(image, text, temp, pairs, options, config)
    exact = reference.sweep(image.double(), text.double(), temp.double(), pairs, options)
    for name, x, y in zip(got._fields, got, exact, strict=True):
        # sums of up to 18 x of up to 15, products of D terms
        close = {"rtol": 2e-6, "atol": 2e-5} if x.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            x.double(), y.double(), **close, msg=lambda m, n=name: f"{n}: {m}"
        )
    unsaved = forward.sweep(image, text, temp, pairs, Options(None), config)
    assert torch.equal(unsaved.rows[:5], got.rows[:5])
    assert torch.equal(unsaved.columns[:5], got.columns[:5])
    assert unsaved.sim.numel() == unsaved.arg.numel() == 0
    for values, index in (
        (unsaved.rows, unsaved.row_index),
        (unsaved.columns, unsaved.column_index),
    ):
        assert bool((values[5] == -torch.inf).all())
        assert bool((index[1] == -1).all())


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("local", [False, True])
def test_gradients(case: int, dtype: torch.dtype, local: bool) -> None:
    """Saved or computed again the same; against fp64 within one rounding of the weights."""
    M, N, first, Q, D, config = CASES[case]
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(max(M, N), Q, D, dtype))
    image, text = image[:M], text[:N]
    ids = (torch.arange(N, device=DEVICE) * 7 + 3) % max(2, N // 2)
    pairs = Pairs(first, ids[first : first + M], ids) if M % 2 else Pairs(first, None, None)
    swept = reference.sweep(image, text, temp, pairs, Options(None, save=True))
    generator = torch.Generator().manual_seed(1)
    # positive: a sum that cancels would show the rounding of its terms
    sides = [
        Weights(values[0], torch.rand(3, values.shape[1], generator=generator).to(DEVICE))
        for values in (swept.rows, swept.columns)
    ]
    empty = swept.sim[:0, :0], swept.arg[:0, :0]
    call = (image, text, temp, pairs, (sides[0], sides[1]), local)
    saved = backward.sweep_grad(*call, (swept.sim, swept.arg), config)
    again = backward.sweep_grad(*call, empty, config)
    wide = [Weights(side.lse.double(), side.weight.double()) for side in sides]
    features = [x.double() for x in (image, text, temp)]
    exact = reference.sweep_grad(*features, pairs, (wide[0], wide[1]), local, empty)
    eps = torch.finfo(dtype).eps if dtype == torch.float16 else 20 * torch.finfo(dtype).eps
    for x, y, z in zip(saved, again, exact, strict=True):
        assert x.dtype == y.dtype
        assert (x.double() - z).norm() <= 2 * eps * z.norm()
        assert (y.double() - z).norm() <= 2 * eps * z.norm()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0, 2**20])
def test_errors_are_those_of_pytorch(dtype: torch.dtype, budget: int) -> None:
    """Through the public function, with the tiles it chooses."""
    *features, _ = make_features(10, 4, 16, dtype)
    features = [x.detach().to(DEVICE).requires_grad_() for x in features]
    temp = torch.tensor(0.0703125, device=DEVICE)

    def ours(image: Tensor, text: Tensor) -> Tensor:
        output = itc_loss(image, text, temp, impl="triton", save_budget_bytes=budget)
        return torch.cat([output.lse_i2t, output.lse_t2i]) + output.loss - output.loss.detach()

    def theirs(image: Tensor, text: Tensor) -> Tensor:
        loss, i2t, t2i = definition(image, text, temp.to(image))
        return torch.cat([i2t, t2i]).logsumexp(1).detach() + loss - loss.detach()

    assert_as_exact_as(ours, theirs, features, torch.full((20,), 1 / 20))


@runs_kernels
@pytest.mark.parametrize("temp", [0.001, 10.0])
def test_temperatures(temp: float) -> None:
    image, text, scale = (
        x.detach().to(DEVICE).requires_grad_() for x in make_features(9, 3, 16, torch.float16)
    )
    scale = torch.tensor(temp, device=DEVICE, requires_grad=True)
    outputs = [
        itc_loss(image, text, scale, impl=i, philox=philox_state(1, device=DEVICE))
        for i in ("triton", "chunked")
    ]
    grads = [torch.autograd.grad(o.loss, (image, text, scale)) for o in outputs]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[0].negative_text, outputs[1].negative_text)
    for x, y in zip(*grads, strict=True):
        assert x.isfinite().all()
        assert (x.double() - y.double()).norm() <= 2e-3 * y.double().norm()


@runs_kernels
def test_ties_and_identical_features() -> None:
    """The first query, the first column, and negatives that are no positives."""
    image, text = (torch.full(s, 0.25, device=DEVICE) for s in ((20, 3, 16), (20, 16)))
    temp = torch.tensor(0.07, device=DEVICE)
    pairs, philox = Pairs(0, None, None), philox_state(1, device=DEVICE)
    swept = forward.sweep(image, text, temp, pairs, Options(philox, save=True), small(3, 16))
    assert not swept.arg.any()
    for index in (swept.row_index, swept.column_index):
        assert not index[0].any()
        assert bool((index[1] != torch.arange(20, device=DEVICE)).all())
        assert bool(((index[1] >= 0) & (index[1] < 20)).all())
    alike = Pairs(0, *[torch.zeros(20, dtype=torch.int64, device=DEVICE)] * 2)
    swept = forward.sweep(image, text, temp, alike, Options(philox), small(3, 16))
    assert bool((swept.row_index[1] == -1).all())
    assert bool((swept.column_index[1] == -1).all())


@runs_kernels
def test_offsets_beyond_two_to_the_31() -> None:
    """Images 2^31 elements apart: pages in between are never touched, so never there."""
    Q, D, step = 2, 16, 2**31 + 48
    memory = torch.empty(0, dtype=torch.float16, device=DEVICE).untyped_storage()
    memory.resize_(2 * (step + Q * D))
    image = torch.empty(0, dtype=torch.float16, device=DEVICE)
    image = image.set_(memory, 0, (2, Q, D), (step, D, 1))
    source, text, temp = make_features(2, Q, D, torch.float16)
    image.copy_(source.detach())
    text, temp = text.detach().to(DEVICE), temp.detach().to(DEVICE)
    call = (text, temp, Pairs(0, None, None))
    got = forward.sweep(image, *call, Options(None, save=True), small(Q, D))
    near = forward.sweep(image.contiguous(), *call, Options(None, save=True), small(Q, D))
    assert torch.equal(got.sim, near.sim)
    weights = torch.ones(3, 2, device=DEVICE)
    sides = Weights(got.rows[0], weights), Weights(got.columns[0], weights)
    grads: list[Any] = [
        backward.sweep_grad(x, *call, sides, False, (got.sim, got.arg), small(Q, D))
        for x in (image, image.contiguous())
    ]
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


@runs_kernels
@pytest.mark.skipif(not GPU, reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_chosen_tiles_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    image, text, temp = (x.detach().cuda().requires_grad_() for x in make_features(*shape, dtype))
    call: dict[str, Any] = {"philox": philox_state(3, device="cuda")}
    results = []
    for impl in ("triton", "triton", "chunked"):
        output = itc_loss(image, text, temp, impl=impl, **call)
        results.append((*output, *torch.autograd.grad(output.loss, (image, text, temp))))
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, other, rtol=1e-2, atol=1e-4)


def test_tiles_cover_what_the_backend_takes() -> None:
    """Every shape gets powers of two that the tensor cores accept, and programs without a rest."""
    for Q in (1, 2, 5, 32, 33, 256):
        for D in (16, 20, 256, 257, 1024):
            for itemsize in (2, 4):
                for capability in (80, 90, 100):
                    f = forward_config(Q, D, itemsize, capability)
                    b = backward_config(Q, D, itemsize, capability)
                    for config in (f, b):
                        assert config.block_q >= Q > config.block_q // 2
                        assert config.block_i * config.block_q >= 16
                        assert config.block_t >= 16
                        assert config.block_d >= 16
                    assert b.out_d >= 16
    config = forward_config(32, 256, 2, 90)
    for M, N in ((1, 1), (4, 4), (1680, 1680), (105, 1680), (65536, 65536)):
        count, per_share = forward.shares(M, N, config)
        blocks = -(-M // config.block_i)
        assert (count - 1) * per_share < blocks <= count * per_share
