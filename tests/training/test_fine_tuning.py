"""Fine-tuning: an image encoder that trains, layer decay, learning rates by pattern, LoRA."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import config, weights, write_world
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from blip2fast.checkpoints.trained import read_description, read_parameters
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.inference.model import Blip2
from blip2fast.training.build import build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.log import read_metrics
from blip2fast.training.parameter_groups import parameter_groups
from blip2fast.training.restart import run_identity
from blip2fast.training.trainer import train

SIZE, PATCH = 28, 14
SMALL: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": PATCH,
    # weights of the default's size leave the blocks nearly without effect
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run's world with pictures, and two image encoders: `vit` and `clip`."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    draws = np.random.default_rng(0)
    (folder / "images").mkdir()
    for split, count in (("train", 22), ("eval", 8)):
        for i in range(count):
            pixels = draws.integers(0, 255, (4, 4, 3), np.uint8).repeat(9, 0).repeat(9, 1)
            Image.fromarray(pixels).save(folder / "images" / f"{split}{i}", "PNG")
    torch.manual_seed(3)
    vit = ViTConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    CLIPVisionModel(CLIPVisionConfig(**SMALL, initializer_factor=5.0)).save_pretrained(
        folder / "clip"
    )
    return folder


def _images(world: Path, encoder: str = "vit", **changes: Any) -> dict[str, Any]:
    """The data section of a run on pictures."""
    data = {"features": None, "eval_features": None, "eval_records": None, "augment": False}
    data |= {"images": str(world / "images")}
    return data | {"image_encoder": str(world / encoder)} | changes


def _tuned(world: Path, output: Path, stage: int = 2, **changes: Any) -> RunConfig:
    """A run that trains its image encoder."""
    changes = {"data": _images(world), "image_encoder": {"train": True}} | changes
    return config(world, output, stage, **changes)


def _train(run: RunConfig) -> Path:
    train(run, say=lambda _: None)
    return Path(run.output_dir)


def _encoder_part(run: Path) -> dict[str, Tensor]:
    return {n: v for n, v in weights(run).items() if n.startswith("image_encoder.")}


def test_the_encoder_is_trained_and_found_again(world: Path, tmp_path: Path) -> None:
    """In 16 bits, from fp32 copies, with held-out losses and texts from pictures."""
    held_out = {"eval_images": str(world / "images"), "eval_records": str(world / "eval.jsonl")}
    data = _images(world, **held_out)
    run = _train(_tuned(world, tmp_path / "out", precision="bf16", data=data))
    base = load_image_encoder(str(world / "vit"))
    begun = {f"image_encoder.{name}": value for name, value in base.named_parameters()}
    found = _encoder_part(run)
    assert found.keys() == begun.keys()
    assert all(value.dtype == torch.float32 for value in found.values())
    assert [name for name, value in found.items() if torch.equal(value, begun[name])] == []
    # finer than bf16, which has 8 bits
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())
    assert "eval_exact" in read_metrics(run)[-1]
    blip2 = Blip2.from_pretrained(run)
    own = dict(blip2.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in found.items())
    assert not blip2.model.training
    assert not blip2.model.image_encoder.training
    picture = Image.open(world / "images" / "eval0")
    assert isinstance(blip2.caption(picture, max_new_tokens=3), str)
    moved = tmp_path / "elsewhere"
    shutil.copytree(world / "vit", moved)
    again = Blip2.from_pretrained(run, image_encoder=str(moved))
    assert torch.equal(again.encode(picture).states, blip2.encode(picture).states)
    with pytest.raises(ValueError, match="trained with the image encoder"):
        Blip2.from_pretrained(run, image_encoder=str(world / "clip"))


def _plain_tokens(encoder: ViTModel, pixels: Tensor) -> Tensor:
    """Tokens before the last norm, by transformers' own model."""
    taken = []
    hook = encoder.layernorm.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    encoder(pixels)
    hook.remove()
    return taken[0]


def test_a_step_is_that_of_plain_pytorch(world: Path, tmp_path: Path) -> None:
    """One step of AdamW with its own rates, from gradients through transformers' ViT."""
    scales = {"qformer.*": 0.5, "*.bias": 0.25}
    run = _tuned(
        world,
        tmp_path / "out",
        model={"dropout": 0.0},
        image_encoder={"train": True, "layer_decay": 0.5},
        optim={"max_steps": 1, "warmup_steps": 0, "clip_norm": 0, "lr_scales": scales},
    )
    parts = build_run(run, 0, 1)
    batch = dict(parts.batches[0])
    begun = {n: p.detach().clone() for n, p in parts.model.named_parameters() if p.requires_grad}
    vit = ViTModel.from_pretrained(world / "vit", add_pooling_layer=False)
    model = parts.model
    tokens = _plain_tokens(vit, batch.pop("images"))
    loss = model(image_embeds=tokens, **batch).loss
    loss.backward()
    found = weights(_train(run))
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    of_vit = {f"image_encoder.model.{name}": p.grad for name, p in vit.named_parameters()}
    for name, value in begun.items():
        gradient = of_vit[name] if name in of_vit else model.get_parameter(name).grad
        scale = 0.25 if name.endswith(".bias") else 0.5 if name.startswith("qformer.") else 1
        block = re.search(r"layers\.(\d)\.", name)
        if name in of_vit:
            scale *= 0.5 ** (3 - int(block[1]) if block else 4)
        plain = value.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
        decay = 0.05 if plain and name != "query_tokens" else 0.0
        rate = run.optim.lr * scale
        moved = value - rate * gradient / (gradient.abs() + run.optim.eps) - rate * decay * value
        # where a gradient is rounding only (key biases), its sign is too
        sure = gradient.abs() > 1e-5 * gradient.abs().max()
        if not name.endswith(("key.bias", "k_proj.bias")):
            bound = 2e-4 * rate
            torch.testing.assert_close(found[name][sure], moved[sure], rtol=1e-6, atol=bound)


def test_gradients_reach_the_encoder_through_the_three_losses(world: Path, tmp_path: Path) -> None:
    """Stage 1 reads tokens in fused passes; the derivative along a direction is the difference."""
    parts = build_run(_tuned(world, tmp_path, 1), 0, 1)
    model, batch = parts.model.double().eval(), dict(parts.batches[0])
    # LAVIS's `local` leaves out a part of ITC's gradient
    model.config = replace(model.config, grad_mode="full")
    batch |= {"images": batch["images"].double(), "negatives": (torch.arange(4).roll(1),) * 2}
    encoder = [p for n, p in model.named_parameters() if n.startswith("image_encoder.")]
    model(**batch).loss.backward()
    plain = [p.grad for p in encoder]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(**batch).loss.backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(encoder, plain, strict=True))
    draws = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in encoder]
    slope = sum(float((p.grad * way).sum()) for p, way in zip(encoder, ways, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, way in zip(encoder, ways, strict=True):
                parameter += step * way
            ends.append(float(model(**batch).loss))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
    assert abs(slope) > 1e-3


def test_layer_decay_is_that_of_lavis(world: Path, tmp_path: Path) -> None:
    """LAVIS: lr_scale ** (layers + 1 - id); id 0 for embeddings, i for block i, 1 for the rest."""
    model = build_run(_tuned(world, tmp_path, data=_images(world, "clip")), 0, 1).model
    groups = parameter_groups(model, 0.05, layer_decay=0.9)
    assert len({group["name"] for group in groups}) == len(groups)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert scale.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    layers = 2  # CLIP's last is not used
    for name, found in scale.items():
        block = re.search(r"image_encoder\..*layers\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else 0
        own = name.startswith("image_encoder.")
        assert found == pytest.approx(0.9 ** (layers + 1 - depth) if own else 1), name
        if name.endswith(".bias") or "norm" in name or "class_embedding" in name:
            assert decay[name] == 0, name
    assert decay["image_encoder.model.embeddings.position_embedding.weight"] == 0
    assert decay["image_encoder.model.encoder.layers.1.mlp.fc1.weight"] == 0.05
    assert {"image_encoder.embeddings.decay", "image_encoder.block2.no_decay", "no_decay"} <= {
        group["name"] for group in groups
    }


def test_groups_without_fine_tuning_are_two(world: Path, tmp_path: Path) -> None:
    groups = parameter_groups(build_run(config(world, tmp_path, 2), 0, 1).model, 0.05)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert [group["lr_scale"] for group in groups] == [1, 1]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_resumes_bitwise_and_from_another_zero_stage(
    world: Path, tmp_path: Path, stage: int
) -> None:
    """Checkpointed blocks, adapters with dropout, contrast over passes, a part that is frozen."""
    more: dict[str, Any] = {"optim": {"grad_cache": True, "accumulation": 2}}
    if stage == 2:
        lora = {"r": 2, "dropout": 0.2}
        more = {"language_model": {"lora": lora}, "optim": {"lr_scales": {"query_tokens": 0}}}
    optim = {"max_steps": 3, "warmup_steps": 1} | more.pop("optim")
    more["image_encoder"] = {"train": True, "layer_decay": 0.8, "gradient_checkpointing": True}

    def run(name: str, **changes: Any) -> RunConfig:
        return _tuned(world, tmp_path / name, stage, optim=optim, save_every=2, **(more | changes))

    whole = _train(run("whole"))
    for name, zero in (("again", 0), ("sharded", 2)):
        kept = tmp_path / name / "checkpoints" / "step-00000002"
        shutil.copytree(whole / "checkpoints" / "step-00000002", kept)
        _train(run(name, resume=True, zero_stage=zero))
    expected, found, sharded = map(
        read_parameters, (whole, tmp_path / "again", tmp_path / "sharded")
    )
    assert found.keys() == expected.keys() == sharded.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    for name, value in expected.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)


def test_another_resolution(world: Path, tmp_path: Path) -> None:
    """Positions are interpolated once, then trained; the model keeps the size; sizes may change."""
    run = _tuned(world, tmp_path / "a", optim={"max_steps": 3, "lr": 1e-6, "min_lr": 0})
    run.data.image_size = 42
    first = _train(run)
    assert read_description(first).image_size == 42
    vit = ViTModel.from_pretrained(world / "vit", add_pooling_layer=False)
    pixels = torch.randn(2, 3, 42, 42)
    table = vit.embeddings.interpolate_pos_encoding(torch.empty(1, 10, 12), 42, 42)
    found = weights(first)["image_encoder.model.embeddings.position_embeddings"]
    torch.testing.assert_close(found, table.detach(), rtol=0, atol=1e-5)
    blip2 = Blip2.from_pretrained(first)
    assert blip2.encode(Image.open(world / "images" / "eval0")).states.shape[0] == 1
    assert blip2.model.image_encoder(pixels).shape == (2, 10, 12)
    frozen = load_image_encoder(str(world / "vit"))
    frozen.resize(42)
    assert torch.equal(
        frozen(pixels), load_image_encoder(str(world / "vit"), image_size=42)(pixels)
    )
    assert not frozen.trains
    # smaller pictures next, from what the first run has learned
    second = _tuned(world, tmp_path / "b", init_from=str(first))
    second.data.image_size = 28
    model = build_run(second, 0, 1).model
    assert model.image_encoder(pixels[:, :, :28, :28]).shape == (2, 5, 12)
    second.data.image_size = None
    assert build_run(second, 0, 1).model.image_encoder.image_size == 42


def test_a_tuned_encoder_goes_on_frozen(world: Path, tmp_path: Path) -> None:
    """A run from one that trained its encoder reads with that, whether it trains it or not."""
    first = _train(_tuned(world, tmp_path / "a", 1, optim={"max_steps": 3}))
    data = _images(world)
    second = _train(
        config(
            world,
            tmp_path / "b",
            2,
            data=data,
            init_from=str(first),
            optim={"max_steps": 3, "lr": 0.1},
        )
    )
    begun, found = _encoder_part(first), _encoder_part(second)
    assert begun.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in begun.items())
    name = "image_encoder.model.embeddings.cls_token"
    model = Blip2.from_pretrained(second).model
    assert torch.equal(model.get_parameter(name), begun[name])
    with pytest.raises(ValueError, match=r"init_from .* has an image encoder that was trained"):
        build_run(config(world, tmp_path / "c", 2, init_from=str(first)), 0, 1)


def test_a_streamed_language_model_beside_a_trained_encoder(world: Path, tmp_path: Path) -> None:
    found = [
        weights(_train(_tuned(world, tmp_path / where, optim={"max_steps": 3}, offload=where)))
        for where in ("none", "stream")
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_texts_without_images_leave_no_parameter_without_a_gradient(
    world: Path, tmp_path: Path
) -> None:
    """Processes sum their gradients: one whose texts have no image must have zeros."""
    model = build_run(_tuned(world, tmp_path), 0, 1).model
    ids = torch.tensor([[2, 5, 7]])
    model(images=None, input_ids=ids, image_counts=torch.tensor([0])).loss.backward()
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert names == []


def test_checkpoints_of_earlier_versions_resume(world: Path, tmp_path: Path) -> None:
    """What they do not state is left out of the comparison where it changes nothing."""
    run = config(world, tmp_path, 2)
    parts = build_run(run, 0, 1)
    stated = run_identity(run, parts.batches.plan, parts.contents)
    assert "image_encoder" not in stated
    assert "lr_scales" not in stated["optim"]
    assert "lora" not in stated["language_model"]
    assert stated["data"]["image_size"] == 224
    tuned = _tuned(world, tmp_path)
    parts = build_run(tuned, 0, 1)
    size = parts.description.image_size
    stated = run_identity(tuned, parts.batches.plan, parts.contents, size)
    assert stated["image_encoder"] == {"train": True}
    assert stated["data"]["image_size"] == SIZE


def test_what_an_encoder_cannot_be_trained_with(world: Path, tmp_path: Path) -> None:
    encoder = {"train": True}
    with pytest.raises(ValueError, match=r"data\.features are the tokens of a frozen encoder"):
        config(world, tmp_path, 2, image_encoder=encoder)
    with pytest.raises(ValueError, match=r"image_encoder\.train needs zero_stage 0, 1 or 2"):
        _tuned(world, tmp_path, zero_stage=3)
    with pytest.raises(ValueError, match="layer_decay and gradient_checkpointing need train"):
        config(world, tmp_path, 2, image_encoder={"layer_decay": 0.9})


def test_rates_by_pattern(world: Path, tmp_path: Path) -> None:
    """The last match counts, 0 freezes but is stored, and a pattern without a match is refused."""
    first = _train(config(world, tmp_path / "a", 1, optim={"max_steps": 3}))
    scales = {"qformer.*": 0.0, "qformer.encoder.layer.1.*": 0.1, "temp": 0}
    run = config(
        world,
        tmp_path / "b",
        1,
        init_from=str(first),
        precision="bf16",
        optim={"max_steps": 3, "lr_scales": scales},
    )
    second = _train(run)
    before, after = weights(first), weights(second)
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    frozen = {n for n in before if n.startswith("qformer.") and ".layer.1." not in n}
    assert same == frozen | {"temp"}
    groups = parameter_groups(build_run(run, 0, 1).model, 0.05, {"qformer.*": 0.1})
    names = ["decay", "decay_x0.1", "no_decay", "no_decay_x0.1"]
    assert sorted(group["name"] for group in groups) == names
    run.optim.lr_scales = {"qformer.layers.*": 0.1}
    with pytest.raises(ValueError, match=r"'qformer\.layers\.\*' matches no .*'qformer\.encoder\."):
        build_run(run, 0, 1)
    run.optim.lr_scales = {"*": 0}
    with pytest.raises(ValueError, match="freezes every parameter"):
        build_run(run, 0, 1)
