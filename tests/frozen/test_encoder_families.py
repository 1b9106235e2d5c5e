"""Frozen encoders beside BLIP-2's own: SigLIP, DINOv2 and v3, others of AutoModel, and timm."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.frozen.image_encoders import (
    encoder_image_size,
    load_image_encoder,
    parse_encoder_id,
)
from blip2fast.frozen.images import CLIP_MEAN, CLIP_STD, transform_for

SIZE, PATCH = 28, 14
SMALL: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": PATCH,
}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def siglip_text() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return sizes | {"intermediate_size": 8, "vocab_size": 20}


def siglip2() -> Siglip2VisionModel:
    sizes = {name: value for name, value in SMALL.items() if name != "image_size"}
    return Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=4))


def dino_v3() -> DINOv3ViTModel:
    # rotary positions need heads of a multiple of 4
    sizes = SMALL | {"num_attention_heads": 3}
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4))


def dino_with_registers() -> Dinov2WithRegistersModel:
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))


def dino() -> Dinov2Model:
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return Dinov2Model(Dinov2Config(**sizes))


FAMILIES = {
    "siglip-vision": (lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)), 4, 0),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(vision_config=SMALL, text_config=siglip_text())),
        4,
        0,
    ),
    "siglip2-naflex": (siglip2, 4, 0),
    "dinov2": (dino, 5, 0),
    "dinov2-registers": (dino_with_registers, 5, 4),
    "dinov3": (dino_v3, 5, 4),
    # of AutoModel, and not known by name; two tokens precede the patches
    "deit": (lambda: DeiTModel(DeiTConfig(**SMALL)), 6, 0),
}


def hidden_states(model: Any, images: torch.Tensor, block: int) -> torch.Tensor:
    """What a model's own code gives after a block, before its final norm."""
    model = getattr(model, "vision_model", model)
    more: dict[str, Any] = {"pixel_values": images}
    if isinstance(model, Siglip2VisionModel):
        # row by row; of a patch row by row, the colours of a pixel beside each other
        cut = [
            images[:, :, top : top + PATCH, left : left + PATCH].permute(0, 2, 3, 1).flatten(1)
            for top in (0, PATCH)
            for left in (0, PATCH)
        ]
        more = {"pixel_values": torch.stack(cut, 1), "pixel_attention_mask": torch.ones(2, 4)}
        more["spatial_shapes"] = torch.tensor([[2, 2], [2, 2]])
    return model(**more, output_hidden_states=True).hidden_states[block]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_models_own(tmp_path: Path, family: str) -> None:
    """Before the last norm; the class token, then the patches; registers are dropped."""
    build, count, registers = FAMILIES[family]
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path)
    for layer, block in ((None, 3), (-1, 3), (-2, 2), (1, 1)):
        encoder = load_image_encoder(str(tmp_path), layer)
        assert (encoder.width, encoder.image_size, encoder.num_tokens) == (12, SIZE, count)
        assert parse_encoder_id(encoder.encoder_id) == (str(tmp_path), block, None, "none")
        with torch.no_grad():
            expected = hidden_states(model, IMAGES, block)
        if registers:
            expected = torch.cat([expected[:, :1], expected[:, 1 + registers :]], 1)
        tokens = encoder(IMAGES)
        assert tokens.shape == (2, count, 12)
        torch.testing.assert_close(tokens, expected)
    assert encoder_image_size(str(tmp_path)) == SIZE
    with pytest.raises(ValueError, match=r"layer=-1: .* has blocks 1 to 3"):
        load_image_encoder(str(tmp_path), -5)


def test_other_models_are_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**{**siglip_text(), "num_hidden_layers": 1})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'bert' model; known are .*siglip.*timm:NAME"):
        load_image_encoder(str(tmp_path))
    maps = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=32)
    ConvNextModel(maps).save_pretrained(tmp_path / "maps")
    with pytest.raises(ValueError, match=r"gives a map of shape \(1, 8, .*own_encoder"):
        load_image_encoder(str(tmp_path / "maps"))


def test_its_own_preprocessing(tmp_path: Path) -> None:
    """Size, mean, deviation and resampling; of a processor's file, too."""
    dino().save_pretrained(tmp_path)
    stated = {"crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 50}}
    stated |= {"do_center_crop": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | {"resample": 2}))
    encoder = load_image_encoder(str(tmp_path))
    assert (encoder.image_size, encoder.num_tokens) == (42, 10)
    assert parse_encoder_id(encoder.encoder_id) == (str(tmp_path), 3, 42, "none")
    larger = load_image_encoder(str(tmp_path), image_size=56)
    assert larger(torch.zeros(1, 3, 56, 56)).shape == (1, 17, 12)
    with pytest.raises(ValueError, match=r"image_size 50 is not a multiple of .* 14; 56 is"):
        load_image_encoder(str(tmp_path), image_size=50)
    draws = np.random.default_rng(0)
    image = Image.fromarray(draws.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    small = np.asarray(image.resize((42, 42), Image.Resampling.BILINEAR), np.float32) / 255
    expected = (small - np.float32([0.5, 0.4, 0.3])) / np.float32(0.2)
    found = transform_for(str(tmp_path), 42)(image)
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": stated | {"do_normalize": False}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    plain = transform_for(str(tmp_path), 42)
    assert (plain.mean, plain.std, plain.resample) == ((0.0,) * 3, (1.0,) * 3, 3)
    (tmp_path / "processor_config.json").write_text(json.dumps({"rescale_factor": 1 / 127.5}))
    with pytest.raises(ValueError, match=r"rescales pixels by 0\.0078"):
        transform_for(str(tmp_path), 42)
    (tmp_path / "processor_config.json").unlink()
    assert (transform_for(str(tmp_path), 42).mean, plain.size) == (CLIP_MEAN, 42)
    assert transform_for(str(tmp_path), 42).std == CLIP_STD


def test_features_of_siglip_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path / "siglip")
    (tmp_path / "images").mkdir()
    draws = np.random.default_rng(0)
    for name in "abc":
        pixels = draws.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"picture {name}")
    command = ["features", "--images", str(tmp_path / "images")]
    command += ["--records", str(tmp_path / "images"), "--encoder", str(tmp_path / "siglip")]
    main([*command, "--layer", "-2", "--dtype", "float32", "--out", str(tmp_path / "cache")])
    assert "3 images of 4 tokens x 12" in capsys.readouterr().out
    cache = FeatureCache(tmp_path / "cache")
    assert cache.encoder_id == f"{tmp_path / 'siglip'}, block 2"
    encoder = load_image_encoder(str(tmp_path / "siglip"), -2)
    image = transform_for(str(tmp_path / "siglip"), SIZE)(Image.open(tmp_path / "images" / "b.png"))
    torch.testing.assert_close(cache.read([cache.row("b.png")]), encoder(image[None]))


STAND_IN = '''
"""A stand-in for timm, with the part of its interface that blip2fast uses."""
import json
import torch
from pathlib import Path
from torch import nn


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, tokens):
        return tokens + torch.tanh(self.mix(tokens.mean(1, keepdim=True) + tokens))


class _PatchEmbed(nn.Module):
    def __init__(self, size, patch, width):
        super().__init__()
        self.img_size, self.proj = (size, size), nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).mT


class VisionTransformer(nn.Module):
    def __init__(self, img_size=32, patch_size=16, embed_dim=24, depth=3, reg_tokens=0, **_):
        super().__init__()
        self.num_features, self.num_reg_tokens = embed_dim, reg_tokens
        self.num_prefix_tokens = 1 + reg_tokens
        self.prefix = nn.Parameter(torch.randn(1, 1 + reg_tokens, embed_dim))
        self.patch_embed = _PatchEmbed(img_size, patch_size, embed_dim)
        self.blocks = nn.Sequential(*[_Block(embed_dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)

    def forward_features(self, images):
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], 1)
        return self.norm(self.blocks(tokens))


def create_model(name, pretrained=False, num_classes=0, **more):
    if not name.startswith("local-dir:"):
        if name != "vit_tiny_patch16_224":
            raise RuntimeError(f"Unknown model ({name})")
        if pretrained:
            raise RuntimeError(f"No pretrained weights exist for {name}.")
        return VisionTransformer(**more)
    folder = Path(name.removeprefix("local-dir:"))
    config = json.loads((folder / "config.json").read_text())
    model = VisionTransformer(**config["model_args"])
    model.pretrained_cfg = config["pretrained_cfg"]
    if pretrained:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def get_pretrained_cfg(name):
    return None
'''


@pytest.fixture
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real timm where it is installed, else the stand-in."""
    if find_spec("timm") is None:
        (tmp_path / "packages" / "timm").mkdir(parents=True)
        (tmp_path / "packages" / "timm" / "__init__.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    import timm

    return timm


@pytest.mark.parametrize("registers", [0, 2])
def test_a_model_of_timm(tmp_path: Path, timm: Any, registers: int) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    args = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "reg_tokens": registers}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    stated = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    stated |= {"input_size": [3, 32, 32], "num_classes": 0}
    written = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": args}
    (folder / "config.json").write_text(json.dumps(written | {"pretrained_cfg": stated}))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(images)
    expected = torch.cat([expected[:, :1], expected[:, 1 + registers :]], 1)
    for name in (str(folder), f"timm:{folder}"):
        encoder = load_image_encoder(name)
        assert (encoder.width, encoder.image_size, encoder.num_tokens) == (24, 32, 5)
        with torch.no_grad():
            torch.testing.assert_close(model.norm(encoder(images)), expected)
        transform = transform_for(name, 32)
        assert (transform.mean, transform.std) == ((0.5,) * 3, (0.25,) * 3)
        assert transform.resample == Image.Resampling.BILINEAR
    shallow = load_image_encoder(str(folder), -2)
    assert shallow.encoder_id.endswith("block 2")
    assert not torch.allclose(shallow(images), encoder(images), atol=1e-3)
    assert shallow.identity.config["architecture"] == "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=r"timm cannot load it .*timm.list_models"):
        load_image_encoder("timm:no_such_model")


def test_timm_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2fast._imports.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        load_image_encoder("timm:vit_tiny_patch16_224")
