"""The contrastive loss by CUDA kernels on a GPU: numbers, the same bits again, no waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from glue_cases import assert_as_exact_as
from itc_cases import GRADIENT_SIZES, check_gradient_of_size, definition, make_features
from torch import Tensor

from blip2fast import _extension
from blip2fast.kernels.itc import reference
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss

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


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", GRADIENT_SIZES)
def test_gradients_keep_their_bits_whatever_their_size(name: str, local: bool) -> None:
    check_gradient_of_size(torch.ops.blip2fast_C, name, local, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_seen(dtype: torch.dtype) -> None:
    """One query, an image, a text: where, and the lowest query that is one."""
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(140, 32, 64, dtype))
    image[1, [9, 22]] = torch.nan
    image[3] = torch.nan
    text[130] = torch.nan
    philox = philox_state(3, device=DEVICE)
    call = (image, text, temp, None, None, philox, 0, True, False, True, None)
    rows, columns, row_index, column_index, sim, arg = torch.ops.blip2fast.itc_sweep(*call, IMPL)
    wrong = torch.einsum("iqd,jd->ijq", image.double(), text.double()).isnan()
    nan = wrong.any(2)
    lowest = torch.where(wrong, torch.arange(32, device=DEVICE), 32).amin(2)
    assert bool((sim.isnan() == nan).all())
    assert bool((arg[nan] == lowest[nan]).all())
    drawn = nan & ~torch.eye(140, dtype=torch.bool, device=DEVICE)  # from others than positives
    for values, index, dim in ((rows, row_index, 1), (columns, column_index, 0)):
        assert bool((values[0].isnan() == nan.any(dim)).all())
        assert bool(((index[1] < 0) == drawn.any(dim)).all())


def test_features_of_any_strides() -> None:
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(70, 5, 64, torch.float16))
    ids = torch.arange(140, device=DEVICE).view(70, 2) // 6
    image_apart = image.transpose(1, 2).contiguous().transpose(1, 2)
    text_late = torch.empty(text.numel() + 1, dtype=text.dtype, device=DEVICE)[1:].view(text.shape)
    text_late.copy_(text)
    results = []
    for given in ((image, text, ids[:, 0].contiguous()), (image_apart, text_late, ids[:, 0])):
        leaves = [x.detach().requires_grad_() for x in given[:2]]
        philox = philox_state(3, device=DEVICE)
        output = itc_loss(*leaves, temp, image_ids=given[2], philox=philox, impl=IMPL)
        results.append([*output, *torch.autograd.grad(output.loss, leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_pointer_of_the_host_is_refused() -> None:
    """It would be read on the device, and no later call of the process would succeed."""
    image, text, temp = (x.detach().to(DEVICE) for x in make_features(8, 2, 16, torch.float16))
    philox = philox_state(3)
    with pytest.raises(ValueError, match="philox: expected on cuda"):
        itc_loss(image, text, temp, philox=philox, impl=IMPL)
    with pytest.raises(RuntimeError, match="philox: expected on the device of the data"):
        torch.ops.blip2fast_C.itc_sweep(image, text, temp, None, None, philox, 0, True)
    torch.cuda.synchronize()


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
