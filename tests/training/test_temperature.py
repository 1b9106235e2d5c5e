"""A learned temperature moves by less than 16 bits can hold: it is kept in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, weights, write_world
from stage1_cases import SMALL, make_batch
from torch import Tensor, nn

from blip2fast.ops.collectives import world_size
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training import run_state, trainer
from blip2fast.training.run_state import RunState
from blip2fast.training.trainer import train

CASTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda model: model.bfloat16(),
    lambda model: model.half(),
    lambda model: model.to(torch.bfloat16),
    lambda model: nn.Sequential(model).to("cpu", torch.bfloat16)[0],
]


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_temperature_in_fp32(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = Blip2Stage1(SMALL)
    before = model.temp.detach().clone()
    parameter = model.temp
    cast(model)
    assert model.temp is parameter
    assert model.temp.dtype == torch.float32
    assert torch.equal(model.temp, before)
    assert model.query_tokens.dtype.itemsize == 2
    assert model.double().temp.dtype == torch.float64


def test_an_all_16_bit_model_learns_its_temperature() -> None:
    """Of steps far below bf16's distance to the next number."""
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).bfloat16().eval()
    optimizer = torch.optim.SGD([model.temp], lr=0.0)
    batch = make_batch(SMALL, 6)
    batch["image_embeds"] = batch["image_embeds"].bfloat16()
    start = model.temp.item()
    for _ in range(3):
        model(**batch).loss_itc.backward()
        assert model.temp.grad is not None
        optimizer.param_groups[0]["lr"] = 1e-5 / float(model.temp.grad.abs())
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < abs(model.temp.item() - start) <= 4e-5


def test_the_loss_is_that_of_the_exact_temperature() -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL).eval()
    batch = make_batch(SMALL, 6)
    batch["image_embeds"] = batch["image_embeds"].float()
    negatives = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
    exact = torch.tensor(0.0701)
    with torch.no_grad():
        model.temp.copy_(exact)
    expected = model(**batch, negatives=negatives)
    expected.loss.backward()
    gradient = model.temp.grad
    model.temp = nn.Parameter(exact.bfloat16().view(1))
    model.exact_temp = exact.view(1)
    out = model(**batch, negatives=negatives)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.sim_i2t, expected.sim_i2t)
    assert model.temp.grad is not None
    assert gradient is not None
    assert torch.equal(model.temp.grad, gradient.bfloat16().view(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("grad_cache", [False, True])
def test_a_run_in_bf16_uses_the_temperature_that_it_saves(
    monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path, zero_stage: int, grad_cache: bool
) -> None:
    """Every step's temperature is the one that the step before left, not its rounding."""
    assert world_size() == 1
    used: list[float] = []
    kept: list[float] = []
    lines: list[str] = []

    def seen(model: Blip2Stage1) -> Tensor:
        value = temperature(model)
        if torch.is_grad_enabled():
            used.append(float(value.detach()))
        return value

    def keep(engine: Any, model: Blip2Stage1) -> None:
        keep_temperature(engine, model)
        kept.append(float(run_state.master_parameters(engine, model)["temp"]))

    temperature, keep_temperature = Blip2Stage1.temperature, trainer.keep_temperature
    monkeypatch.setattr(Blip2Stage1, "temperature", seen)
    for module in (run_state, trainer):
        monkeypatch.setattr(module, "keep_temperature", keep)
    optim = {"lr": 1e-4, "min_lr": 1e-5, "batch_size": 2, "accumulation": 2} | {
        "grad_cache": grad_cache
    }
    settings = config(
        world, tmp_path / "run", 1, precision="bf16", zero_stage=zero_stage, optim=optim
    )
    train(settings, say=lines.append)
    assert used == [value for value in kept[:-1] for _ in range(2)]
    assert len(set(kept)) == len(kept)
    assert max(kept) - min(kept) < 4.8e-4, "all of them the same in bf16, or its neighbour"
    assert float(weights(tmp_path / "run")["temp"]) == kept[-1]
    assert any("bf16; kept in fp32" in line and "temp" in line for line in lines)


def test_under_zero_3_the_evaluated_copy_has_it_too(
    monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path
) -> None:
    found: list[Tensor] = []

    def whole(self: RunState) -> Any:
        model = whole_model(self)
        found.append(model.temp.detach().clone())
        return model

    whole_model = RunState.whole_model
    monkeypatch.setattr(RunState, "whole_model", whole)
    train(config(world, tmp_path / "run", 1, precision="bf16", zero_stage=3), say=lambda _: None)
    assert found[-1].dtype == torch.float32
    assert torch.equal(found[-1].view(()), weights(tmp_path / "run")["temp"].view(()))
