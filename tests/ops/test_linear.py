"""Linear layers by oneDNN: values, gradients, what is left to PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from itc_cases import make_features
from stage1_cases import SMALL, make_batch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip2fast import Blip2Stage1, doctor
from blip2fast.ops import itc_loss
from blip2fast.ops import linear as onednn_linear
from blip2fast.ops.linear import linear
from blip2fast.ops.lm_cross_entropy import lm_cross_entropy


@pytest.fixture
def calls(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that oneDNN computes, which are all, however small."""
    monkeypatch.setattr(onednn_linear, "_WORTH_FLOPS", 0)
    return onednn


def leaves(*shape: int, n: int, with_bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, (n, shape[-1]), (n,)]
    made: list[Tensor | None] = [torch.randn(size, generator=generator) for size in sizes]
    return made if with_bias else [*made[:2], None]


def run(function: Any, given: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradient of each leaf, in fp64."""
    own = [None if t is None else t.to(dtype).detach().requires_grad_() for t in given]
    y = function(*own)
    # not one number many times, which an expanded gradient would be
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    there = [t for t in own if t is not None]
    return [x.double() for x in (y.detach(), *torch.autograd.grad(y, there, dy))]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (257, 64), (2, 3, 48), (33, 1)])
@pytest.mark.parametrize("n", [1, 96])
def test_values_and_gradients(
    shape: tuple[int, ...], n: int, with_bias: bool, calls: list[int]
) -> None:
    given = leaves(*shape, n=n, with_bias=with_bias)
    found = run(linear, given, torch.float32)
    assert len(calls) == 3
    for ours, truth in zip(found, run(F.linear, given, torch.float64), strict=True):
        assert ours.shape == truth.shape
        assert (ours - truth).norm() <= 2e-6 * truth.norm()


def test_strides(calls: list[int]) -> None:
    """Transposed rows, every second column, and a gradient that is one number, expanded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 20, generator=generator).T
    weight = torch.randn(7, 96, generator=generator)[:, ::2]
    found = run(linear, [x, weight, None], torch.float32)
    for ours, truth in zip(found, run(F.linear, [x, weight, None], torch.float64), strict=True):
        assert (ours - truth).norm() <= 2e-6 * truth.norm()
    leaf = x.clone().requires_grad_()
    linear(leaf, weight).sum().backward()
    assert leaf.grad is not None
    assert calls
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand_as(leaf))


def test_only_the_gradients_that_are_wanted(calls: list[int]) -> None:
    x, weight, bias = leaves(4, 8, n=3, with_bias=True)
    assert x is not None
    assert weight is not None
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["empty", "fp64", "bf16", "autocast", "disabled", "small"])
def test_what_is_left_to_pytorch(
    how: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "small":
        monkeypatch.setattr(onednn_linear, "_WORTH_FLOPS", 2 * 4 * 8 * 3 + 1)
    x, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(how, torch.float32)
    given = [t.to(dtype) for t in (x[:0] if how == "empty" else x, weight, bias)]
    with (
        torch.autocast("cpu", enabled=how == "autocast"),
        torch.backends.mkldnn.flags(enabled=how != "disabled"),
    ):
        assert torch.equal(linear(*given), F.linear(*given))
    assert not calls


def test_operations_are_counted(calls: list[int]) -> None:
    """As many as PyTorch's own products have, where rows need no padding."""
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            run(function, leaves(2, 64, 48, n=32, with_bias=True), torch.float32)
        counts.append(counter.get_total_flops())
    assert counts == [6 * 128 * 48 * 32] * 2
    assert calls


def test_a_stage1_step_in_fp32_multiplies_by_onednn(calls: list[int]) -> None:
    torch.manual_seed(0)
    batch = make_batch(SMALL, 4)
    model = Blip2Stage1(SMALL)
    model(**batch | {"image_embeds": batch["image_embeds"].float()}).loss.backward()
    assert len(calls) > 3 * SMALL.num_hidden_layers
    calls.clear()
    model.double()(**batch | {"image_embeds": batch["image_embeds"].double()}).loss.backward()
    assert not calls


@pytest.mark.parametrize(
    ("setting", "vendor", "chosen"),
    [
        (None, "AuthenticAMD", True),
        (None, "GenuineIntel", False),
        (None, "", False),
        ("auto", "HygonGenuine", True),
        ("onednn", "GenuineIntel", True),
        ("pytorch", "AuthenticAMD", False),
    ],
)
def test_the_vendor_or_a_setting_chooses(
    setting: str | None, vendor: str, chosen: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Never a measurement: ranks, and a run that resumes, must not choose differently."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: vendor_id\n")
    monkeypatch.setattr(onednn_linear, "_CPUINFO", info if vendor else tmp_path / "none")
    monkeypatch.delenv(onednn_linear.SETTING, raising=False)
    if setting is not None:
        monkeypatch.setenv(onednn_linear.SETTING, setting)
    monkeypatch.setattr(onednn_linear, "cpu_vendor", onednn_linear.cpu_vendor.__wrapped__)
    assert onednn_linear.is_chosen.__wrapped__() is chosen


@pytest.mark.parametrize(("chosen", "name"), [(True, "oneDNN"), (False, "PyTorch")])
def test_the_report_of_a_bug_names_it(
    chosen: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: chosen)
    (line,) = (x for x in doctor._devices() if x.startswith("CPU"))
    assert line.endswith(f"fp32 linear layers by {name}")


@pytest.mark.parametrize(("setting", "count"), [("auto", 0), ("onednn", 3)])
def test_onednn_computes_small_products_where_it_is_asked_for(
    setting: str, count: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_linear, "_WORTH_FLOPS", 5e8)
    monkeypatch.setenv(onednn_linear.SETTING, setting)
    monkeypatch.setattr(onednn_linear, "is_asked_for", onednn_linear.is_asked_for.__wrapped__)
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(calls) == count


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(onednn_linear.SETTING, "mkl")
    with pytest.raises(ValueError, match="BLIP2FAST_LINEAR='mkl': give one of auto, onednn"):
        onednn_linear.is_chosen.__wrapped__()


def test_pytorch_computes_where_it_is_chosen(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: False)
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not calls


def test_second_derivatives(calls: list[int]) -> None:
    """A gradient penalty; PyTorch's products compute gradients that have derivatives."""
    found = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        made = [t for t in leaves(5, 6, n=4, with_bias=True) if t is not None]
        x, weight, bias = (t.to(dtype).detach().requires_grad_() for t in made)
        y = function(x, weight, bias)
        (grad,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([x.grad, weight.grad, bias.grad])
    assert calls
    for ours, truth in zip(*found, strict=True):
        assert ours is not None
        assert truth is not None
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_contrastive_loss_multiplies_by_onednn(onednn: list[int]) -> None:
    image, text, temp = make_features(70, 5, 24)
    given: list[Tensor | None] = [image, text, temp]

    def loss(*features: Tensor) -> Tensor:
        return itc_loss(*features, negatives="none", impl="chunked").loss

    found = run(loss, given, torch.float32)
    # 64 images, then 6
    assert len(onednn) == 2
    for ours, truth in zip(found, run(loss, given, torch.float64), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()
    assert len(onednn) == 2


@pytest.mark.parametrize("chunk_bytes", [None, 4 * 50 * 3])
def test_the_lm_loss_multiplies_by_onednn(calls: list[int], chunk_bytes: int | None) -> None:
    """In one chunk, and in four of at most three rows."""
    labels = torch.tensor([3, -100, 49, 0, 7, 3, 21, 5, 9, 11])
    given = leaves(len(labels), 16, n=50, with_bias=True)

    def loss(*tensors: Tensor) -> Tensor:
        return lm_cross_entropy(*tensors, labels, chunk_bytes=chunk_bytes, impl="chunked")[0]

    found = run(loss, given, torch.float32)
    assert len(calls) == 3 * (1 if chunk_bytes is None else 4)
    for ours, truth in zip(found, run(loss, given, torch.float64), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()
