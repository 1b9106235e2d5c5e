"""The contrastive loss by CUDA kernels on a GPU: numbers, the same bits again, no waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from glue_cases import assert_as_exact_as
from itc_cases import definition, make_features
from torch import Tensor

from blip2fast import _extension
from blip2fast.kernels.itc import reference
from blip2fast.ops import itc_loss
from blip2fast.ops.philox import philox_state

MISSING = _extension.why_not("itc_sweep")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
DEVICE, IMPL = "cuda", "cuda"
# more images than fill a GPU of 132 multiprocessors once, texts with a rest, several slices of
# width; few queries; one pair more than a tile; the narrowest
SHAPES = [(1100, 32, 256), (300, 5, 136), (129, 31, 64), (70, 1, 16)]
DTYPES = [torch.float16, torch.bfloat16]


def run(shape: tuple[int, int, int], dtype: torch.dtype, budget: int) -> list[Tensor]:
    """All outputs and gradients of one call, features drawn anew from one seed."""
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(*shape, dtype))
    leaves = [x.requires_grad_() for x in (image, text, temp)]
    philox = philox_state(3, device=DEVICE)
    output = itc_loss(*leaves, philox=philox, save_budget_bytes=budget, impl=IMPL)
    return [*(x.detach() for x in output), *torch.autograd.grad(output.loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarities(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against fp64; where two queries are within rounding either may be the best."""
    image, text, _ = (x.detach().to(DEVICE) for x in make_features(*shape, dtype))
    temp = torch.ones((), device=DEVICE)
    call = (image, text, temp, None, None, None, 0, True, False, True, None, IMPL)
    sim, arg = torch.ops.blip2fast.itc_sweep(*call)[4:]
    exact, best = reference.similarity(image.double(), text.double())
    # fp32 sums of up to 256 products below 1, in whatever order the tensor cores take
    torch.testing.assert_close(sim.double(), exact, rtol=0, atol=4e-6)
    chosen = image.double().gather(1, arg.long().unsqueeze(-1).expand(-1, -1, shape[2]))
    there = torch.einsum("ijd,jd->ij", chosen, text.double())
    torch.testing.assert_close(there, exact, rtol=0, atol=4e-6)
    assert float((arg != best).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0, 2**30])
def test_errors_are_those_of_pytorch(dtype: torch.dtype, budget: int) -> None:
    *features, _ = make_features(150, 32, 256, dtype)
    features = [x.detach().to(DEVICE).requires_grad_() for x in features]
    # a temperature that every type holds exactly
    temp = torch.tensor(0.0703125, device=DEVICE)

    def ours(image: Tensor, text: Tensor) -> Tensor:
        output = itc_loss(image, text, temp, impl=IMPL, save_budget_bytes=budget)
        return torch.cat([output.lse_i2t, output.lse_t2i]) + output.loss - output.loss.detach()

    def theirs(image: Tensor, text: Tensor) -> Tensor:
        ids = torch.arange(len(image), device=DEVICE)
        loss, i2t, t2i = definition(image, text, temp.to(image), ids)
        return torch.cat([i2t, t2i]).logsumexp(1).detach() + loss - loss.detach()

    assert_as_exact_as(ours, theirs, features, torch.full((300,), 1 / 300))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_twenty_times(
    shape: tuple[int, int, int], dtype: torch.dtype, budget: int
) -> None:
    """A race would move them."""
    first = run(shape, dtype, budget)
    for _ in range(20):
        for x, y in zip(first, run(shape, dtype, budget), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest(dtype: torch.dtype) -> None:
    """For every pair of queries: they alone are best, and equal."""
    pairs = [(low, high) for low in range(32) for high in range(low + 1, 32)]
    image = torch.full((len(pairs), 32, 16), -0.25, dtype=dtype)
    for i, (low, high) in enumerate(pairs):
        image[i, [low, high]] = 0.5
    text = torch.ones(130, 16, dtype=dtype, device=DEVICE)
    temp = torch.ones((), device=DEVICE)
    call = (image.to(DEVICE), text, temp, None, None, None, 0, True, False, True, None, IMPL)
    sim, arg = torch.ops.blip2fast.itc_sweep(*call)[4:]
    assert bool((sim == 8.0).all())
    low = torch.tensor([low for low, _ in pairs], device=DEVICE)
    assert bool((arg == low[:, None]).all())


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait(request: pytest.FixtureRequest) -> None:
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(64, 8, 64, torch.bfloat16))
    leaves = [x.requires_grad_() for x in (image, text, temp)]
    ids = torch.arange(64, device=DEVICE) // 2
    generator = torch.Generator(DEVICE).manual_seed(1)
    request.getfixturevalue("no_waiting")
    for impl in (IMPL, "auto"):
        output = itc_loss(*leaves, image_ids=ids, generator=generator, impl=impl)
        torch.autograd.grad(output.loss, leaves)
