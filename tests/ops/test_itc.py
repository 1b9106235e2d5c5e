"""The contrastive loss against its definition: values, gradients, numerics, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glue_cases import assert_as_exact_as, saved_tensors
from itc_cases import definition, make_features
from stage1_cases import ReferenceCase
from torch import Tensor

from blip2fast import Blip2Stage1, ITCLoss
from blip2fast.kernels.itc import chunked, reference
from blip2fast.kernels.itc.config import ChunkedConfig
from blip2fast.kernels.itc.interface import Options, Pairs, Weights
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss
from blip2fast.ops.itc.loss import itc_loss_and_grads

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IMPLS = ["reference", "chunked"]
# batch, queries, width: N of 1, 2 and no multiple of a tile; Q from 1 to 256; D from 16 to 1024
SHAPES = [(1, 4, 16), (2, 1, 16), (7, 5, 20), (33, 32, 64), (3, 256, 16), (5, 3, 1024)]
BUDGETS = [0, 2**30]


def make_ids(b: int) -> Tensor:
    """Some ids once, some more often; never one id alone, but in a batch of one."""
    return (torch.arange(b) * 7 + 3) % max(2, b // 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("grad_mode", ["local", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_ids", [False, True])
def test_definition(
    impl: str, budget: int, grad_mode: str, shape: tuple[int, int, int], with_ids: bool
) -> None:
    image, text, temp = make_features(*shape)
    ids = make_ids(shape[0]) if with_ids else None
    loss, i2t, t2i = definition(image, text, temp, ids, grad_mode)
    expected = torch.autograd.grad(loss, (image, text, temp))
    output = itc_loss(
        image,
        text,
        temp,
        image_ids=ids,
        grad_mode=grad_mode,
        negatives="none",
        save_budget_bytes=budget,
        impl=impl,
    )
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(output.lse_i2t, i2t.logsumexp(1).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.lse_t2i, t2i.logsumexp(1).detach(), rtol=1e-12, atol=0)
    for got, wanted in zip(
        torch.autograd.grad(output.loss, (image, text, temp)), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    labels = torch.arange(shape[0]) if ids is None else ids
    for found, logits in ((output.accuracy_i2t, i2t), (output.accuracy_t2i, t2i)):
        right = labels[logits.argmax(1)] == labels
        assert float(found) == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_mode", ["local", "full"])
def test_errors_are_those_of_pytorch(impl: str, dtype: torch.dtype, grad_mode: str) -> None:
    """Log-sum-exps and gradients at most twice as far from fp64 as the formula in this type."""
    *features, temp = make_features(50, 8, 64, dtype)
    # a temperature that every type holds exactly
    temp = torch.full_like(temp, 0.0703125, requires_grad=False)

    def ours(image: Tensor, text: Tensor) -> Tensor:
        output = itc_loss(image, text, temp.to(image), grad_mode=grad_mode, impl=impl)
        # the value is that of the statistics, the gradient that of the loss
        return torch.cat([output.lse_i2t, output.lse_t2i]) + output.loss - output.loss.detach()

    def theirs(image: Tensor, text: Tensor) -> Tensor:
        loss, i2t, t2i = definition(image, text, temp.to(image), grad_mode=grad_mode)
        return torch.cat([i2t, t2i]).logsumexp(1).detach() + loss - loss.detach()

    assert_as_exact_as(ours, theirs, features, torch.full((100,), 1 / 100))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temp", [0.001, 0.07, 10.0])
def test_temperatures(impl: str, dtype: torch.dtype, temp: float) -> None:
    """From 0.001 to 10: statistics are fp32, so the error is that of fp32 sums of the terms."""
    image, text, scale = make_features(40, 4, 32, dtype, temp=temp)
    output = itc_loss(image, text, scale, impl=impl)
    d_image, d_text, d_temp = torch.autograd.grad(output.loss, (image, text, scale))
    wide = [x.detach().double().requires_grad_() for x in (image, text, scale)]
    loss, i2t, t2i = definition(*wide)
    exact = torch.autograd.grad(loss, (*wide, i2t, t2i))
    largest = float(i2t.detach().abs().max())
    eps = torch.finfo(torch.float32).eps
    # products of 32 terms, one division, one sum of exponentials
    assert abs(float(output.loss.detach()) - float(loss.detach())) <= 8 * eps * max(
        largest, math.log(40)
    )
    terms = sum(
        float((dx * x.detach()).abs().sum()) for dx, x in ((exact[3], i2t), (exact[4], t2i))
    )
    assert abs(float(d_temp) - float(exact[2])) <= 40 * eps * max(1, largest) * terms / temp
    for got, wanted in ((d_image, exact[0]), (d_text, exact[1])):
        assert got.isfinite().all()
        allowed = torch.finfo(dtype).eps * wanted.norm() + 8 * eps * largest * wanted.norm()
        assert (got.double() - wanted).norm() <= allowed


def test_lavis(reference: ReferenceCase) -> None:
    """LAVIS's own float64 loss and temperature gradient, with and without image ids."""
    model = Blip2Stage1.from_lavis_state_dict(reference.weight, reference.config)
    model.double().eval()
    call: dict[str, Any] = reference.call(torch.float64)
    output = model(**call)
    for impl in IMPLS:
        loss = itc_loss(
            output.image_features.detach(),
            output.text_features.detach(),
            model.temp,
            image_ids=call["image_ids"],
            impl=impl,
        ).loss
        torch.testing.assert_close(loss, reference.output["loss_itc"], rtol=1e-10, atol=0)
        (d_temp,) = torch.autograd.grad(loss, model.temp)
        # stored in fp32
        found = d_temp.float().view(())
        torch.testing.assert_close(found, reference.grad["temp"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("images", [1, 3, 100])
@pytest.mark.parametrize("texts", [1, 4, 100])
def test_tiles_do_not_matter(images: int, texts: int) -> None:
    """Tiles that do not divide the batch; gathered sums and one-hot products alike."""
    M, N, Q, first = 11, 13, 5, 2
    image, text, temp = (x.detach() for x in make_features(N, Q, 16))
    image = image[:M]
    generator = torch.Generator().manual_seed(1)
    ids = make_ids(N + first)
    for pairs in (Pairs(first, None, None), Pairs(first, ids[first : first + M], ids[:N])):
        options = Options(philox_state(3, 1), legacy=True, save=True)
        config = ChunkedConfig(images=images, tile_bytes=images * Q * texts * 8)
        whole = reference.sweep(image, text, temp, pairs, options)
        tiled = chunked.sweep(image, text, temp, pairs, options, config)
        for name, x, y in zip(whole._fields, tiled, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14, msg=name)
        sides = [
            Weights(lse, torch.randn(3, len(lse), generator=generator, dtype=torch.float64))
            for lse in (whole.rows[0], whole.columns[0])
        ]
        for saved in ((whole.sim, whole.arg), (whole.sim[:0, :0], whole.arg[:0, :0])):
            for local in (False, True):
                call = (image, text, temp, pairs, (sides[0], sides[1]), local, saved)
                expected = reference.sweep_grad(*call)
                for add_up in (chunked._gather_and_add, chunked._one_hot_products):
                    got = chunked.sweep_grad(*call, config, add_up)
                    for x, y in zip(got, expected, strict=True):
                        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_ties_go_to_the_first_query(impl: str, budget: int) -> None:
    image, text, temp = make_features(6, 2, 16)
    doubled = torch.cat([image, image], dim=1).detach().requires_grad_()
    output = itc_loss(doubled, text, temp, impl=impl, save_budget_bytes=budget)
    (got,) = torch.autograd.grad(output.loss, doubled)
    single = definition(image, text, temp)[0]
    (expected,) = torch.autograd.grad(single, image)
    torch.testing.assert_close(output.loss, single, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[:, :2], expected, rtol=1e-9, atol=1e-12)
    assert bool((got[:, 2:] == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_identical_features(impl: str) -> None:
    """Every row uniform: the loss is log N, and the best column the first."""
    b = 9
    image, text = torch.full((b, 3, 16), 0.25), torch.full((b, 16), 0.25)
    output = itc_loss(image, text, torch.tensor(0.07), impl=impl, philox=philox_state(1))
    assert float(output.loss) == pytest.approx(math.log(b), rel=1e-6)
    assert float(output.accuracy_i2t) == pytest.approx(1 / b)
    assert float(output.accuracy_t2i) == pytest.approx(1 / b)
    own = torch.arange(b)
    for negative in (output.negative_image, output.negative_text):
        assert bool(((negative >= 0) & (negative < b) & (negative != own)).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_the_same_bits_twice(impl: str) -> None:
    image, text, temp = make_features(12, 4, 16, torch.float32)
    strided = image.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    assert strided.stride(-1) != 1
    call: dict[str, Any] = {"impl": impl, "philox": philox_state(2)}
    runs = []
    for x in (image, strided, strided):
        output = itc_loss(x, text, temp, **call)
        runs.append((*output, *torch.autograd.grad(output.loss, (x, text, temp))))
    for first, other, again in zip(*runs, strict=True):
        torch.testing.assert_close(first, other)
        assert torch.equal(other, again)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    """A matmul inside of the op would otherwise run in bf16."""
    image, text, temp = make_features(12, 4, 16, torch.float32)
    call: dict[str, Any] = {"impl": impl, "philox": philox_state(2), "save_budget_bytes": 0}
    plain = itc_loss(image, text, temp, **call).loss
    expected = torch.autograd.grad(plain, (image, text, temp))
    with torch.autocast("cpu", torch.bfloat16):
        loss = itc_loss(image, text, temp, **call).loss
        got = torch.autograd.grad(loss, (image, text, temp))
    assert torch.equal(loss, plain)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_what_is_kept_for_the_backward_pass() -> None:
    """5 bytes a pair where they fit, nothing of the size of all pairs where not."""
    b, Q, D = 64, 2, 16
    image, text, temp = make_features(b, Q, D, torch.float32)

    def pairs_kept(budget: int) -> set[torch.dtype]:
        kept = saved_tensors(lambda: itc_loss(image, text, temp, save_budget_bytes=budget).loss)
        return {x.dtype for x in kept if x.shape == (b, b)}

    assert pairs_kept(5 * b * b) == {torch.float32, torch.uint8}
    assert pairs_kept(5 * b * b - 1) == set()


def test_two_phases_are_one() -> None:
    """Encoders replayed in chunks under the gradient of their features: the same weights' grads."""
    torch.manual_seed(0)
    pixels, words = torch.randn(10, 3, 8).double(), torch.randn(10, 8).double()
    encoder, head = torch.nn.Linear(8, 16).double(), ITCLoss().double()
    image, text = (F.normalize(encoder(x), dim=-1) for x in (pixels, words))
    head(image, text, negatives="none").loss.backward()
    expected = [encoder.weight.grad, encoder.bias.grad, head.temp.grad]
    encoder.zero_grad()

    with torch.no_grad():
        features = [F.normalize(encoder(x), dim=-1) for x in (pixels, words)]
        output, d_image, d_text, d_temp = itc_loss_and_grads(*features, head.temp)
    assert not output.loss.requires_grad
    for part in torch.arange(10).split(4):
        for x, gradient in ((pixels, d_image), (words, d_text)):
            F.normalize(encoder(x[part]), dim=-1).backward(gradient[part])
    got = [encoder.weight.grad, encoder.bias.grad, d_temp]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_module_learns_its_temperature() -> None:
    module = ITCLoss(label_smoothing=0.0, grad_mode="full")
    assert dict(module.state_dict()) == {"temp": torch.tensor(0.07)}
    assert "label_smoothing=0.0, grad_mode='full'" in repr(module)
    image, text, _ = make_features(5, 3, 16, torch.float32)
    loss = module(image, text).loss
    expected = definition(image, text, module.temp, None, "full", 0.0)[0]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert module.temp.grad is not None
    assert float(module.temp.grad) != 0
    with pytest.raises(ValueError, match="initial_temp: expected above 0, got 0"):
        ITCLoss(initial_temp=0.0)


@pytest.mark.parametrize("upstream", [1.0, 1e-7, 1e6])
@pytest.mark.parametrize("budget", BUDGETS)
def test_products_in_fp16(upstream: float, budget: int) -> None:
    """Errors are those of rounding the features, however small or large the loss's gradient is.

    Without a scale a pair's gradient, about upstream / N^2, is lost in fp16, or overflows.
    """
    leaves = make_features(64, 8, 32, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = itc_loss(*wide, negatives="none", impl="reference").loss
    expected = torch.autograd.grad(upstream * exact, wide)
    output = itc_loss(
        *leaves, negatives="none", products=torch.float16, save_budget_bytes=budget, impl="chunked"
    )
    assert output.loss.dtype == torch.float32
    assert abs(float((output.loss - exact).detach())) < 1e-3 * float(exact.detach())
    grads = torch.autograd.grad(upstream * output.loss, leaves)
    for leaf, got, wanted in zip(leaves, grads, expected, strict=True):
        assert got.dtype == leaf.dtype
        # similarities 2^-11 off are 2^-11 / 0.07 off in the exponent
        assert float((got - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_16_bit_features_do_not_underflow(impl: str) -> None:
    image, text, temp = make_features(32, 4, 16, torch.float16)
    wide = [x.detach().double().requires_grad_() for x in (image, text, temp)]
    (expected,) = torch.autograd.grad(
        1e-7 * itc_loss(*wide, negatives="none", impl="reference").loss, wide[2]
    )
    loss = itc_loss(image, text, temp, negatives="none", impl=impl).loss
    (got,) = torch.autograd.grad(1e-7 * loss, temp)
    torch.testing.assert_close(got.double(), expected, rtol=0.01, atol=0)
