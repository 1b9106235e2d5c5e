"""Stage 1 in 16 bits: the gradients of a step are as near to fp32's as the textbook's are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage1_cases import SMALL, ReferenceCase, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor, nn

from blip2fast.stage1 import contrast
from blip2fast.stage1.lavis import to_lavis_name
from blip2fast.stage1.model import Blip2Stage1

# rounding adds up along the depth
DEEP = replace(SMALL, hidden_size=64, num_hidden_layers=12, initializer_range=0.1)
BATCH = 6
NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))


def gradients(model: nn.Module, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """Of one step, under our names."""
    batch = make_batch(DEEP, BATCH)
    images = batch.pop("image_embeds").to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        loss = model(image_embeds=images, **batch, negatives=NEGATIVES)["loss"]
    model.zero_grad()
    loss.backward()
    names = [name for name, _ in Blip2Stage1(DEEP).named_parameters()]
    of = model.twin if isinstance(model, TextbookStage1) else model.get_parameter
    found = {name: of(name).grad for name in names}
    # what the softmax takes out again has no gradient but rounding
    return {n: g.double() for n, g in found.items() if g is not None and "key.bias" not in n}


def typical_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Median over the parameters of their relative errors."""
    return float(
        torch.stack([(found[n] - truth[n]).norm() / truth[n].norm() for n in truth]).median()
    )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_textbook(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    ours = Blip2Stage1(DEEP)
    textbook = TextbookStage1(ours)
    truth = gradients(textbook, torch.float32, autocast=True)
    if not autocast:
        ours.to(dtype)
        textbook.to(dtype)
    rival, found = (gradients(model, dtype, autocast) for model in (textbook, ours))
    assert found.keys() == rival.keys() == truth.keys()
    rival_error, error = (typical_error(x, truth) for x in (rival, found))
    assert error < 1.2 * rival_error, f"{error:.4f}, the textbook's {rival_error:.4f}"


def test_states_keep_the_type_of_layer_norm() -> None:
    """fp32 under autocast, as PyTorch's LayerNorm gives them; 16 bits where all parameters are."""
    torch.manual_seed(0)
    model = Blip2Stage1(DEEP)
    batch = make_batch(DEEP, BATCH)
    images = batch.pop("image_embeds").float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image_embeds=images, **batch).query_output.dtype == torch.float32
    model.bfloat16()
    assert model(image_embeds=images.bfloat16(), **batch).query_output.dtype == torch.bfloat16


def test_itc_products_are_in_fp16_where_a_gpu_computes_in_16_bits() -> None:
    choices = [
        contrast.product_dtype(dtype, torch.device(device))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for device in ("cuda", "cpu")
    ]
    assert choices == [torch.float16, None, torch.float16, None, None, None]


def test_itc_in_fp16_on_the_reference(
    reference: ReferenceCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else in fp32: what rounding normalised features to fp16 costs a step."""
    monkeypatch.setattr("blip2fast.stage1.model.product_dtype", lambda dtype, device: torch.float16)
    model = Blip2Stage1.from_lavis_state_dict(reference.weight, reference.config).float().eval()
    out = model(**reference.call(torch.float32))
    assert relative_error(out.loss_itc, reference.output["loss_itc"]) < 2e-4
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):
            truth = reference.grad[to_lavis_name(name)]
            assert relative_error(parameter.grad, truth) < 1e-3, name


def trained_losses(dtype: torch.dtype) -> Tensor:
    """ITC's loss over a short run under autocast, dropout off and negatives given."""
    torch.manual_seed(0)
    model = Blip2Stage1(DEEP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(30):
        batch = make_batch(DEEP, BATCH)
        images = batch.pop("image_embeds").float()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(image_embeds=images, **batch, negatives=NEGATIVES)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss_itc.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_a_run_in_bf16_with_itc_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays as near to the run in fp32 as with ITC in fp32, and learns."""
    exact, without = trained_losses(torch.float32), trained_losses(torch.bfloat16)
    monkeypatch.setattr("blip2fast.stage1.model.product_dtype", lambda dtype, device: torch.float16)
    found = trained_losses(torch.bfloat16)
    assert not torch.equal(found, without), "ITC was not in fp16"
    assert float(found[-5:].mean()) < 0.4 * float(found[0])
    error, usual = ((x - exact).abs().mean() / exact.mean() for x in (found, without))
    assert float(error) < 2 * float(usual), f"{float(error):.4f}, {float(usual):.4f}"
