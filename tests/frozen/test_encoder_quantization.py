"""Image encoders with int8 linear layers: by torchao, or by a stand-in that rounds weights."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import config, write_world
from torch import nn
from transformers import Blip2VisionConfig, Blip2VisionModel, ViTConfig, ViTModel

from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.frozen.image_encoders import (
    FrozenImageEncoder,
    load_image_encoder,
    parse_encoder_id,
)
from blip2fast.training.config_files import parse_config
from blip2fast.training.restart import _leave_out_new_defaults
from blip2fast.training.run_data import train_images

SIZE = 28
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 14,
    "initializer_range": 0.1,
}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

STAND_IN = '''
"""A stand-in for torchao.quantization: weights are rounded to int8, and held as they were."""
import torch
from torch import nn


class Int8DynamicActivationInt8WeightConfig:
    pass


@torch.no_grad()
def quantize_(model, config):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            module.weight = nn.Parameter((module.weight / scale).round() * scale, False)
'''


@pytest.fixture(autouse=True)
def torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real torchao where it is installed, else the stand-in."""
    if find_spec("torchao") is not None:
        yield
    else:
        package = tmp_path / "packages" / "torchao"
        (package / "quantization").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "quantization" / "__init__.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        yield
        for name in ("torchao", "torchao.quantization"):
            sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    Blip2VisionModel(Blip2VisionConfig(**SMALL)).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_tokens_and_identity(folder: str) -> None:
    """Close to those of fp32, and known to be others: by weights, in its name, at every loading."""
    plain, int8 = load_image_encoder(folder), load_image_encoder(folder, quantization="int8")
    assert int8.quantization == "int8"
    expected, tokens = plain(IMAGES), int8(IMAGES)
    assert 0 < (tokens - expected).norm() < 0.05 * expected.norm()
    assert int8.encoder_id == f"{folder}, int8, block 2"
    assert parse_encoder_id(int8.encoder_id) == (folder, 2, None, "int8")
    assert int8.identity.differences(plain.identity) == ["other weights"]
    again = load_image_encoder(folder, quantization="int8")
    assert not int8.identity.differences(again.identity)
    half = load_image_encoder(folder, dtype=torch.bfloat16, quantization="int8")
    assert not int8.identity.differences(half.identity)
    found = half(IMAGES)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).norm() < 0.06 * expected.norm()


def test_layers_outside_the_blocks_stay(folder: str) -> None:
    """The embedding of patches and the residuals are as they were."""
    plain, int8 = load_image_encoder(folder), load_image_encoder(folder, quantization="int8")
    inside = {f"model.encoder.layers.{n}.{layer}.weight" for n in (0, 1) for layer in LAYERS}
    changed = set()
    for name, value in plain.state_dict().items():
        held = int8.state_dict()[name]
        own = held.dequantize() if hasattr(held, "qdata") else held
        if not torch.equal(own, value):
            changed.add(name)
    assert changed == inside


LAYERS = ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")


def test_copies_and_state(folder: str) -> None:
    encoder = load_image_encoder(folder, quantization="int8")
    expected = encoder(IMAGES)
    copied = copy.deepcopy(encoder)
    assert torch.equal(copied(IMAGES), expected)
    copied.load_state_dict(encoder.state_dict())
    assert torch.equal(copied(IMAGES), expected)


def test_it_cannot_be_trained(folder: str) -> None:
    encoder = load_image_encoder(folder, quantization="int8")
    with pytest.raises(ValueError, match="int8 weights cannot be trained; load it without"):
        encoder.unfreeze()
    assert not encoder.trains


def test_a_model_without_blocks_is_refused() -> None:
    model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    model.config.num_hidden_layers = 0
    with pytest.raises(ValueError, match="x: no list of blocks, whose weights int8 is for"):
        FrozenImageEncoder(model, None, "x", quantization="int8")


def test_without_torchao(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2fast._imports.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="torchao to hold an image encoder in int8"):
        load_image_encoder(folder, quantization="int8")


def test_a_cache_says_so(folder: str, tmp_path: Path) -> None:
    """By command; a cache of the same encoder in fp32 is not continued with int8."""
    (tmp_path / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    (tmp_path / "records.jsonl").write_text(json.dumps({"image": "a.png", "caption": "x"}) + "\n")
    out = tmp_path / "features"
    command = ["features", "--images", str(tmp_path / "images"), "--encoder", folder]
    command += ["--records", str(tmp_path / "records.jsonl"), "--out", str(out)]
    main([*command, "--quantization", "int8"])
    cache = FeatureCache(out)
    assert cache.encoder_id == f"{folder}, int8, block 2"
    assert cache.encoder is not None
    int8 = load_image_encoder(folder, quantization="int8")
    assert not cache.encoder.differences(int8.identity)
    assert cache.encoder.differences(load_image_encoder(folder).identity)


def _values(folder: str, **sections: Any) -> dict[str, Any]:
    data = {"records": "r.jsonl", "images": "images", "image_encoder": folder}
    values: dict[str, Any] = {"stage": 1, "output_dir": "out", "data": data}
    values |= {"optim": {"max_steps": 2, "batch_size": 2, "warmup_steps": 0}}
    return values | {"model": {"tokenizer": "words"}} | sections


def test_in_a_run(folder: str, tmp_path: Path) -> None:
    """The loop's encoder; a resumed run must say the same, except about compilation."""
    (tmp_path / "images").mkdir()
    values = _values(folder, image_encoder={"quantization": "int8", "compile": True})
    values["data"]["images"] = str(tmp_path / "images")
    source = train_images(parse_config(values), None)
    assert source.encoder is not None
    assert source.encoder.quantization == "int8"
    assert source.encoder_id == f"{folder}, int8, block 2"
    assert all(b._compiled_call_impl is not None for b in source.encoder.blocks)
    plain = train_images(parse_config(_values(folder) | {"data": values["data"]}), None)
    assert plain.encoder is not None
    assert plain.encoder.quantization == "none"
    assert all(b._compiled_call_impl is None for b in plain.encoder.blocks)


def test_what_contradicts_it(folder: str) -> None:
    with pytest.raises(ValueError, match="compile are for a frozen encoder, and train is true"):
        parse_config(_values(folder, image_encoder={"train": True, "quantization": "int8"}))
    cached = _values(folder, image_encoder={"compile": True})
    cached["data"] = {"records": "r.jsonl", "features": "features"}
    with pytest.raises(ValueError, match=r"for an encoder in the loop, and data\.features is a ca"):
        parse_config(cached)


@pytest.mark.parametrize(("quantization", "left"), [("none", False), ("int8", True)])
def test_a_resumed_run_compares_it(quantization: str, left: bool) -> None:
    """Checkpoints of earlier versions have no such key."""
    same: dict[str, Any] = {"language_model": None, "optim": {"lr_scales": {}}}
    same["image_encoder"] = {"train": False, "quantization": quantization}
    _leave_out_new_defaults(same)
    assert ("image_encoder" in same) == left


def test_an_encoder_that_is_stored_with_the_model_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = write_world(tmp_path / "world")
    run = config(world, tmp_path / "out", 1)
    run.data.features, run.data.images = None, str(tmp_path)
    run.image_encoder.quantization = "int8"
    start: Any = type("Description", (), {"trains_encoder": True})()
    with pytest.raises(ValueError, match=r"leave out image_encoder\.quantization and compile"):
        train_images(run, start)


def test_linear_layers_are_integers(folder: str) -> None:
    """With torchao itself."""
    pytest.importorskip("torchao.quantization.quantize_.workflows")
    encoder = load_image_encoder(folder, quantization="int8")
    linear = [m for m in encoder.blocks.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 8
    assert all(m.weight.qdata.dtype is torch.int8 for m in linear)
