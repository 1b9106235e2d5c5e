"""Stage 1 in fp16 with a loss scaler: it learns as in fp32; a step that overflows is skipped."""

from __future__ import annotations

import pytest
import torch
from stage1_cases import SMALL, make_batch
from torch import Tensor

from blip2fast.stage1.model import Blip2Stage1

NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))


def a_model() -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(SMALL)


def a_batch() -> dict[str, Tensor]:
    batch = make_batch(SMALL, batch=6)
    return {**batch, "image_embeds": batch["image_embeds"].float()}


def train(model: Blip2Stage1, dtype: torch.dtype, steps: int) -> list[float]:
    """Losses of steps on one batch; the scaler does nothing in fp32."""
    batch, half = a_batch(), dtype == torch.float16
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=half)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype, enabled=half):
            loss = model(**batch, negatives=NEGATIVES).loss
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses


def test_losses_follow_fp32() -> None:
    half, single = (train(a_model(), dtype, 30) for dtype in (torch.float16, torch.float32))
    assert single[-1] < 0.7 * single[0]
    for ours, truth in zip(half, single, strict=True):
        assert ours == pytest.approx(truth, rel=2e-2)


def test_scaled_gradients_are_those_of_fp32() -> None:
    """Small ones too: unscaled, those below 6e-8 would be 0."""
    models, scale = [a_model() for _ in range(2)], 2.0**12
    models[0](**a_batch(), negatives=NEGATIVES).loss.backward()
    with torch.autocast("cpu", torch.float16):
        loss = models[1](**a_batch(), negatives=NEGATIVES).loss
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    for (name, truth), ours in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert ours.grad.dtype == torch.float32, name
        if not name.endswith("key.bias"):
            error = (ours.grad / scale - truth.grad).norm() / truth.grad.norm()
            assert error < 2e-2, f"{name}: {error:.1e}"


def test_a_step_that_overflows_changes_nothing_but_the_scale() -> None:
    model = a_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = model(**a_batch(), negatives=NEGATIVES).loss
    assert loss.isfinite()
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
