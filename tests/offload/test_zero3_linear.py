"""What the linear layers of a frozen language model keep for the backward pass: no inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, write_world
from torch import Tensor, nn

from blip2fast.training import placement
from blip2fast.training.build import build_run
from blip2fast.training.engine import start_processes
from blip2fast.training.trainer import Trainer

# whose input nothing else keeps: a norm's output (an activation's and attention's are kept by them)
READ_NORMS = {
    "opt": {"q_proj", "k_proj", "v_proj", "fc1", "lm_head"},
    "t5": {"q", "k", "v", "wi", "lm_head"},
}
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "zero3": {"offload": "zero3"},
    "stream": {"offload": "stream"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def linear_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 replaces it for the whole process, and a test before may have had it do so."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def kept_inputs(world: Path, output: Path, language: str, settings: dict[str, Any]) -> set[str]:
    """Names of linear layers whose inputs autograd keeps in a training step, of READ_NORMS."""
    device = start_processes()
    section = {"language_model": {"path": str(world / language)}}
    run = placement.choose_placement(config(world, output, 2, **section, **settings))
    trainer = Trainer(run, build_run(run, 0, 1), device, lambda _: None)
    read: list[tuple[str, Tensor]] = []
    kept: list[Tensor] = []
    for name, module in trainer.model.language_model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in READ_NORMS[language]:
            # after the forward: the head's input is cut by a hook before it
            module.register_forward_hook(
                lambda _, args, __, last=last: read.append((last, args[0].detach()))
            )

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor.detach()

    batch = trainer.to_device(trainer.parts.batches[0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = trainer.engine(**batch)
    assert loss.requires_grad
    assert {name for name, _ in read} == READ_NORMS[language]
    places = {tensor.untyped_storage().data_ptr() for tensor in kept}
    return {name for name, x in read if x.untyped_storage().data_ptr() in places}


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("place", PLACES)
def test_frozen_linears_keep_no_inputs(
    world: Path, tmp_path: Path, place: str, language: str
) -> None:
    assert kept_inputs(world, tmp_path, language, PLACES[place]) == set()


def test_deepspeeds_own_linear_keeps_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(placement, "keep_no_inputs", lambda _: None)
    assert kept_inputs(world, tmp_path, "opt", {"zero_stage": 3}) == READ_NORMS["opt"]
