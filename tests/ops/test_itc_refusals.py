"""What the contrastive loss refuses, and that PyTorch's compilers take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from itc_cases import make_features
from torch import Tensor

from blip2fast import ITCLoss
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss
from blip2fast.ops.itc.loss import ITCOutput

PHILOX = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.ones(4, 16)}, r"expected \[b, Q, D\], none of them 0, got"),
        ({"image_features": torch.ones(4, 0, 16)}, r"none of them 0, got shape \(4, 0, 16\)"),
        ({"text_features": torch.ones(3, 16)}, r"expected \[b, D\] = \[4, 16\] .* got \(3, 16\)"),
        (
            {"text_features": torch.ones(4, 16).half()},
            "one floating type for both, got torch.float32",
        ),
        ({"image_features": torch.ones(4, 2, 16).int()}, "one floating type for both"),
        ({"temp": torch.ones(2)}, r"temp: expected a floating-point scalar, got .* \(2,\)"),
        ({"image_ids": torch.ones(3)}, r"image_ids: expected 4 integers, got torch.float32 \(3,\)"),
        ({"image_ids": torch.arange(4, device="meta")}, "image_ids: expected on cpu, got meta"),
        ({"philox": PHILOX.to("meta")}, "philox: expected on cpu, got meta"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"grad_mode": "global"}, r"grad_mode: expected one of \['local', 'full'\], got 'global'"),
        ({"negatives": "hard"}, r"negatives: expected one of \['sample', 'none'\], got 'hard'"),
        ({"legacy_epsilon": -1.0}, "legacy_epsilon: expected 0 or more, got -1.0"),
        ({"philox": torch.ones(2)}, r"philox: expected \[2\] int64, .* got torch.float32"),
        ({"philox": PHILOX, "generator": torch.Generator()}, "generator: has no use beside"),
        ({"impl": "chunk"}, "impl: expected 'auto' or one of .*; did you mean 'chunked'"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    call = {
        "image_features": torch.ones(4, 2, 16),
        "text_features": torch.ones(4, 16),
        "temp": torch.tensor(0.07),
    } | change
    with pytest.raises(ValueError, match=message):
        itc_loss(**call)


def test_a_batch_of_one_has_no_negative() -> None:
    image, text, temp = make_features(1, 2, 16)
    with pytest.raises(ValueError, match="use a larger batch"):
        itc_loss(image, text, temp)
    output = itc_loss(image, text, temp, negatives="none")
    assert output.negative_image.tolist() == output.negative_text.tolist() == [-1]
    assert output.without_negative.tolist() == [True]


def test_backends_that_do_not_run_say_why() -> None:
    image, text, temp = make_features(4, 300, 8)
    with pytest.raises(NotImplementedError) as caught:
        itc_loss(image, text, temp, impl="cuda", legacy_epsilon=1e-4)
    message = str(caught.value)
    for part in (
        "cuda: features on cpu: needs a CUDA device",
        "cuda: torch.float64: only float16 and bfloat16",
        "triton: legacy_epsilon 0.0001: only 0",
        "triton: feature width 8: only 16 to 1024",
        "triton: 300 queries: at most 256",
        "chunked: runs it; use impl='chunked'",
        "reference: it is the definition, with every pair in memory",
    ):
        assert part in message


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_without_negative_is_flagged(compiled: bool) -> None:
    """-1 and a flag, not the own positive and no error: a batch of one image is a batch."""
    image, text, temp = make_features(4, 2, 16, torch.float32)

    def run(ids: Tensor) -> ITCOutput:
        return itc_loss(image, text, temp, image_ids=ids)

    if compiled:
        run = torch.compile(run, backend="eager", fullgraph=True)
    output = run(torch.full((4,), 5))
    assert output.loss.isfinite()
    assert output.without_negative.all()
    assert output.negative_image.tolist() == output.negative_text.tolist() == [-1] * 4


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_not_a_number_is_flagged_too(impl: str) -> None:
    image, text, temp = (x.detach() for x in make_features(4, 2, 16, torch.float32))
    image[1] = torch.nan
    output = itc_loss(image, text, temp, impl=impl)
    assert output.loss.isnan()
    assert int(output.negative_text[1]) == -1
    assert bool(output.without_negative[1])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_opcheck(impl: str) -> None:
    image, text, temp = make_features(5, 3, 16, torch.float32)
    ids = torch.tensor([0, 1, 2, 1, 4])
    sweep = torch.ops.blip2fast.itc_sweep.default
    for row_ids, philox, legacy, save in ((ids, PHILOX, True, True), (None, None, False, False)):
        call = (image, text, temp, row_ids, row_ids, philox, 0, True, legacy, save, None, impl)
        torch.library.opcheck(sweep, call)
        torch.library.opcheck(sweep, (*call[:-2], torch.float16, impl))
    swept = sweep(
        *(x.detach() for x in (image, text, temp)), *[None] * 3, 0, True, False, True, None, impl
    )
    weights = torch.randn(3, 5)
    call_grad = (
        image.detach(),
        text.detach(),
        temp.detach(),
        swept[0][0],
        weights,
        swept[1][0],
        weights,
        None,
        None,
        0,
        True,
        swept[4],
        swept[5],
        impl,
    )
    torch.library.opcheck(torch.ops.blip2fast.itc_sweep_grad.default, call_grad)


@pytest.mark.parametrize("grad_mode", ["local", "full"])
def test_compile_with_dynamic_shapes(grad_mode: str) -> None:
    """One graph for every batch size, no break, the same numbers."""
    torch._dynamo.reset()

    def run(image: Tensor, text: Tensor, temp: Tensor) -> ITCOutput:
        return itc_loss(image, text, temp, grad_mode=grad_mode, philox=philox_state(3))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b in (5, 9, 12):
            features = make_features(b, 3, 16, torch.float32)
            got, expected = compiled(*features), run(*features)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
            grads = (torch.autograd.grad(o.loss, features) for o in (got, expected))
            for x, y in zip(*grads, strict=True):
                assert torch.equal(x, y)


def test_export() -> None:
    b = torch.export.Dim("b", min=2)
    image, text, _ = (x.detach() for x in make_features(5, 3, 16, torch.float32))
    program = torch.export.export(
        ITCLoss(), (image, text, torch.arange(5)), dynamic_shapes=({0: b}, {0: b}, {0: b})
    )
    image, text, _ = (x.detach() for x in make_features(8, 3, 16, torch.float32, seed=1))
    got = program.module()(image, text, torch.arange(8))
    expected = ITCLoss()(image, text, torch.arange(8))
    assert torch.equal(got.loss, expected.loss)
    assert bool((got.negative_text != torch.arange(8)).all())


def test_products_in_a_type_that_does_not_round() -> None:
    image, text, temp = make_features(4, 2, 16, torch.float32)
    for features, products in ((image, torch.float64), (image.half(), torch.bfloat16)):
        with pytest.raises(ValueError, match="products: expected None"):
            itc_loss(features, text.to(features), temp, products=products)
