"""Language models that torchao or bitsandbytes hold in fewer bits: resident, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, write_world
from torch import nn
from transformers import OPTForCausalLM

from blip2fast import Blip2Stage2, Stage2Config
from blip2fast.frozen.identity import identify_model
from blip2fast.frozen.language_models import load_language_model
from blip2fast.offload import stream_blocks
from blip2fast.offload.loading import load_partitioned, load_streamed
from blip2fast.training.memory_plan import GIB, Memory, plan_memory
from blip2fast.training.preflight import check_machine

FAULT = (
    r"its weights are quantised \(quant_method 'bitsandbytes'\); a run, streaming and ZeRO-3 move"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def said_to_be_quantised(world: Path, tmp_path: Path) -> Path:
    """A folder whose config.json says so; its weights are never come to."""
    folder = tmp_path / "quantised"
    shutil.copytree(world / "opt", folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_what_moves_weights_refuses_such_a_folder(
    world: Path, tmp_path: Path, said_to_be_quantised: Path
) -> None:
    name = str(said_to_be_quantised)
    with pytest.raises(ValueError, match=FAULT):
        load_streamed(name, torch.float32, "cpu")
    with pytest.raises(ValueError, match=FAULT):
        load_partitioned(name, torch.float32, {})
    with pytest.raises(ValueError, match=f"language_model.path '.*': {FAULT}"):
        check_machine(config(world, tmp_path / "out", 2, language_model={"path": name}))


def test_the_plan_says_what_it_counted(
    world: Path, tmp_path: Path, said_to_be_quantised: Path
) -> None:
    run = config(world, tmp_path, 2, language_model={"path": str(said_to_be_quantised)})
    plan = plan_memory(run, memory=Memory(GIB, GIB, device_is_host=False))
    assert f"{said_to_be_quantised} is quantised: counted in fp32, which is more" in str(plan)


def test_a_weight_of_another_class_is_not_streamed(world: Path) -> None:
    class Packed(nn.Parameter):
        pass

    model = OPTForCausalLM.from_pretrained(world / "opt").requires_grad_(False)
    linear = model.model.decoder.layers[1].fc1
    linear.weight = Packed(linear.weight.data, requires_grad=False)
    with pytest.raises(ValueError, match=r"fc1.weight is a .*Packed of .*leave the model on the"):
        stream_blocks(model, "cpu")


def _quantised(world: Path, library: str) -> Any:
    """The small OPT, its linear layers held in fewer bits."""
    pytest.importorskip(library)
    import transformers

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

        how: Any = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return OPTForCausalLM.from_pretrained(
        world / "opt", quantization_config=how, dtype=torch.float32
    )


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_gradients_pass_through(world: Path, library: str) -> None:
    """Close to those of the model as it was, and the quantised weights have none."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "num_query_tokens": 3, "encoder_hidden_size": 12}
    settings = Stage2Config(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    text = torch.arange(10).view(2, 5)
    found = []
    for language in (load_language_model(str(world / "opt"), torch.float32), None):
        torch.manual_seed(0)
        quantised = language is None
        model = Blip2Stage2(settings, _quantised(world, library) if quantised else language)
        loss = model(torch.randn(2, 5, 12), text).loss
        loss.backward()
        assert all(p.grad is None for p in model.language_model.parameters())
        found.append((loss.item(), model.language_projection.weight.grad))
    (plain, expected), (loss, gradient) = found
    assert 0 < abs(loss - plain) < 0.01 * plain
    assert float((gradient - expected).norm()) < 0.05 * float(expected.norm())


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_which_model_it_is_can_be_told(world: Path, library: str) -> None:
    """By what is stored: another one than the model as it was, and the same at every loading."""
    model, again = _quantised(world, library), _quantised(world, library)
    assert identify_model(model).same_weights(identify_model(again))
    assert not identify_model(model).same_weights(
        identify_model(load_language_model(str(world / "opt"), torch.float32))
    )
    with pytest.raises(ValueError, match=f"of {library}.*leave the model on the device"):
        stream_blocks(model.requires_grad_(False), "cpu")
