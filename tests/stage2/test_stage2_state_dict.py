"""State dicts of stage 2: what is trained, without the frozen models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stage2_models import opt_model, stage2_config, t5_config
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import T5ForConditionalGeneration

from blip2fast.stage2.model import Blip2Stage2

FROZEN = ("language_model.", "image_encoder.")
MODELS: list[Callable[[], Any]] = [
    opt_model,
    lambda: T5ForConditionalGeneration(t5_config(tie_word_embeddings=True)),
]


class Encoder(nn.Module):
    """An image encoder with a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, stage2_config().encoder_hidden_size)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("places", torch.zeros(3), persistent=False)


def build(language_model: Any = None) -> Blip2Stage2:
    torch.manual_seed(0)
    return Blip2Stage2(stage2_config(), language_model or opt_model(), Encoder())


@pytest.mark.parametrize("make", MODELS)
def test_it_is_the_trained_part(make: Callable[[], Any], tmp_path: Path) -> None:
    model = build(make())
    state = model.state_dict()
    assert state.keys() == model.trainable_state_dict().keys()
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= state.keys()
    assert not any(name.startswith(FROZEN) for name in state)
    # safetensors refuse one tensor under two names
    from safetensors.torch import load_file, save_file

    save_file(state, tmp_path / "model.safetensors")
    other = build(make())
    other.query_tokens.data.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.query_tokens, model.query_tokens)


def test_programs_that_record_a_model_see_all() -> None:
    model = build()
    names = model.state_dict(keep_vars=True).keys()
    assert names >= {name for name, _ in model.named_parameters()}


def test_whole_state_dicts_are_loaded() -> None:
    model, other = build(), build()
    whole = dict(model.state_dict(keep_vars=True))
    whole["image_encoder.patches.weight"] = whole["image_encoder.patches.weight"] + 1
    other.load_state_dict(whole)
    found = other.get_parameter("image_encoder.patches.weight")
    assert torch.equal(found, whole["image_encoder.patches.weight"])


def test_a_part_of_a_frozen_model_is_missed() -> None:
    model = build()
    whole = dict(model.state_dict(keep_vars=True))
    del whole["image_encoder.patches.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*image_encoder\.patches\.weight"):
        model.load_state_dict(whole)
    del whole["image_encoder.patches.bias"], whole["image_encoder.scale"], whole["query_tokens"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "query_tokens"\. $'):
        model.load_state_dict(whole)


def test_inside_another_module() -> None:
    outer, other = nn.ModuleDict({"a": build()}), nn.ModuleDict({"a": build()})
    state = outer.state_dict()
    assert state.keys() == {f"a.{name}" for name in build().trainable_state_dict()}
    other.load_state_dict(state)
    assert copy.deepcopy(outer).state_dict().keys() == state.keys()


def test_what_is_trained_in_a_frozen_model_is_kept() -> None:
    model = build()
    model.get_parameter("image_encoder.patches.bias").requires_grad_(True)
    assert {n for n in model.state_dict() if n.startswith(FROZEN)} == {"image_encoder.patches.bias"}


@pytest.mark.parametrize("trained", [True, False])
def test_adapters_are_kept(trained: bool) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.inject_adapter_in_model(config, model.language_model)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.requires_grad_(trained)
    added = {n for n in model.state_dict() if n.startswith(FROZEN)}
    assert added == {n for n, _ in model.named_parameters() if "lora" in n}
    assert added


def test_flattened_parameters_of_fsdp1(tmp_path: Path) -> None:
    """FSDP1 looks for every parameter that it has flattened, frozen ones too."""
    own = not dist.is_initialized()  # an earlier test of the process may have left one
    if own:
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = build().trainable_state_dict()
        model = FullyShardedDataParallel(
            build(), device_id=torch.device("cpu"), use_orig_params=True
        )
        state = model.state_dict()
        for name, value in plain.items():
            assert torch.equal(state[name], value), name
        model.load_state_dict(state)
    finally:
        if own:
            dist.destroy_process_group()
