"""Frozen image encoders, image files, the cache command, BERT, and an encoder in the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import config, write_world
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from blip2fast.command_line import main
from blip2fast.data.caching import cache_images
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import CaptionRecord, read_captions, write_records
from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
from blip2fast.frozen.images import CLIP_MEAN, CLIP_STD, ImageTransform, read_image, transform_for
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train

SIZE = 28
SMALL: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": 14,
}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def _clip_text() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return sizes | {"intermediate_size": 8, "vocab_size": 20}


def _blip2() -> Blip2ForConditionalGeneration:
    text = OPTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        vocab_size=30,
        word_embed_proj_dim=8,
    )
    qformer = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=_random_blip2_vision().to_dict(),
            qformer_config=qformer | {"intermediate_size": 8, "encoder_hidden_size": 12},
            text_config=text.to_dict(),
            image_token_index=5,
        )
    )


def _random_blip2_vision() -> Blip2VisionConfig:
    # The default, 1e-10, leaves every block without effect.
    return Blip2VisionConfig(**SMALL, initializer_range=0.05)


def _penultimate(model: Any) -> torch.Tensor:
    vision = getattr(model, "vision_model", model)
    return vision(IMAGES, output_hidden_states=True).hidden_states[-2]


def _before_norm(norm: str) -> Callable[[Any], torch.Tensor]:
    def run(model: Any) -> torch.Tensor:
        vision = getattr(model, "vision_model", model)
        taken = []
        handle = getattr(vision, norm).register_forward_pre_hook(
            lambda _, inputs: taken.append(inputs[0])
        )
        vision(IMAGES)
        handle.remove()
        return taken[0]

    return run


@pytest.mark.parametrize(
    ("build", "reference"),
    [
        (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)), _penultimate),
        (
            lambda: CLIPModel(CLIPConfig(vision_config=SMALL, text_config=_clip_text())),
            _penultimate,
        ),
        (lambda: ViTModel(ViTConfig(**SMALL)), _before_norm("layernorm")),
        (lambda: Blip2VisionModel(_random_blip2_vision()), _before_norm("post_layernorm")),
        (_blip2, _before_norm("post_layernorm")),
    ],
    ids=["clip-vision", "clip", "vit", "blip2-vision", "blip2"],
)
def test_tokens_are_the_models_own_before_the_last_norm(
    tmp_path: Path, build: Callable[[], Any], reference: Callable[[Any], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder(str(tmp_path))
    assert (encoder.width, encoder.image_size, encoder.num_tokens) == (12, SIZE, 5)
    with torch.no_grad():
        expected = reference(model)
    tokens = encoder(IMAGES)
    assert tokens.shape == (2, 5, 12)
    torch.testing.assert_close(tokens, expected)
    # Another block gives other tokens, and only the blocks that are needed are kept.
    shallow = load_image_encoder(str(tmp_path), layer=1)
    assert not torch.allclose(shallow(IMAGES), tokens, atol=1e-3)
    assert shallow.encoder_id.endswith("block 1")
    assert sum(p.numel() for p in shallow.parameters()) < sum(
        p.numel() for p in encoder.parameters()
    )
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_masked_autoencoder_sees_every_patch_in_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 8}
    model = ViTMAEForPreTraining(ViTMAEConfig(**SMALL, **decoder, mask_ratio=0.75)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder(str(tmp_path))
    whole = ViTMAEModel(ViTMAEConfig(**SMALL, mask_ratio=0.0)).eval()
    whole.load_state_dict(model.vit.state_dict())
    with torch.no_grad():
        expected = whole(IMAGES, noise=torch.arange(4.0).expand(2, -1)).last_hidden_state
    tokens = encoder(IMAGES)
    torch.testing.assert_close(whole.layernorm(tokens), expected)
    assert torch.equal(encoder(IMAGES), tokens)


def test_bad_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found: give a local folder or a hub name"):
        load_image_encoder(str(tmp_path / "nowhere"))
    OPTConfig().save_pretrained(tmp_path / "opt")
    with pytest.raises(ValueError, match="is a 'opt' model; known are blip-2"):
        load_image_encoder(str(tmp_path / "opt"))
    model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"layer=4: .* has blocks 1 to 3"):
        load_image_encoder(str(tmp_path / "vit"), layer=4)
    with pytest.raises(ValueError, match=r"\(2, 3, 14, 28\), expected \(B, \*\(3, 28, 28\)\)"):
        load_image_encoder(str(tmp_path / "vit"))(IMAGES[:, :, :14])
    state = model.state_dict()
    del state[next(name for name in state if name.endswith("fc1.weight"))]
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of its encoder, such as "):
        load_image_encoder(str(tmp_path / "cut"))


def _picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    draws = np.random.default_rng(seed)
    return Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_evaluation_images_are_the_whole_image_normalised() -> None:
    image = Image.new("RGB", (50, 20), (255, 0, 128))
    tensor = ImageTransform(8)(image)
    assert tensor.shape == (3, 8, 8)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(CLIP_MEAN)) / torch.tensor(
        CLIP_STD
    )
    torch.testing.assert_close(tensor.amax((1, 2)), expected)
    torch.testing.assert_close(tensor.amin((1, 2)), expected)
    picture = _picture(0)
    resized = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC), np.float32) / 255
    back = ImageTransform(8)(picture) * torch.tensor(CLIP_STD)[:, None, None]
    back += torch.tensor(CLIP_MEAN)[:, None, None]
    torch.testing.assert_close(back.permute(1, 2, 0), torch.from_numpy(resized))
    assert ImageTransform(8)(picture.convert("L")).shape == (3, 8, 8)


def test_training_images_vary_with_the_generator_alone() -> None:
    transform = ImageTransform(8, augment=True)
    picture = _picture(0)
    same = [transform(picture, np.random.default_rng(5)) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], transform(picture, np.random.default_rng(6)))
    with pytest.raises(ValueError, match="augment needs a random generator"):
        transform(picture)
    # Left of the picture is black, right is white: flips show, and crops keep half the area.
    split = Image.fromarray(np.repeat(np.uint8([[[0] * 3] * 20 + [[255] * 3] * 20]), 40, 0))
    views = [transform(split, np.random.default_rng(s)) for s in range(200)]
    flipped = sum(float(view[0, :, 0].mean() > view[0, :, -1].mean()) for view in views)
    assert 70 < flipped < 130
    white = torch.stack([(view[0] > 0).float().mean() for view in views])
    assert 0.15 < white.min() < 0.45 < 0.55 < white.max() < 0.85


def test_a_checkpoints_own_mean_is_used(tmp_path: Path) -> None:
    assert transform_for(str(tmp_path), 8).mean == CLIP_MEAN
    text = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}'
    (tmp_path / "preprocessor_config.json").write_text(text)
    transform = transform_for(str(tmp_path), 8, augment=True)
    assert transform == ImageTransform(8, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), True)


def test_bad_image_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.png").write_text("not an image")
    (tmp_path / "secret.png").write_text("outside")
    for key, message in (
        ("none.png", "images/none.png: no such file"),
        ("text.png", "images/text.png: is not a picture"),
        ("../secret.png", "lies outside"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / "images", key)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose images are files, with a small ViT."""
    folder = write_world(tmp_path_factory.mktemp("photos"))
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).save_pretrained(folder / "vit")
    (folder / "images").mkdir()
    for split in ("train", "eval"):
        records = read_captions(folder / f"{split}.jsonl")
        for number, record in enumerate(records):
            _picture(number).save(folder / "images" / f"{record.image}.png")
        named = [CaptionRecord(f"{r.image}.png", r.captions) for r in records]
        write_records(folder / f"{split}.jsonl", named)
    return folder


def _arguments(photos: Path, out: Path) -> list[str]:
    given = {"images": photos / "images", "records": photos / "eval.jsonl"}
    given |= {"encoder": photos / "vit", "out": out}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_the_cache_command_writes_the_encoders_tokens(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "features",
            *_arguments(photos, tmp_path / "cache"),
            "--dtype",
            "float32",
            "--batch-size",
            "3",
        ]
    )
    assert "8 images of 5 tokens x 12, float32, relative error 0" in capsys.readouterr().out
    cache = FeatureCache(tmp_path / "cache")
    assert cache.encoder_id == f"{photos / 'vit'}, block 3"
    encoder = load_image_encoder(str(photos / "vit"))
    for key in cache.keys:
        image = ImageTransform(SIZE)(read_image(photos / "images", key))
        torch.testing.assert_close(cache.read([cache.row(key)]), encoder(image[None]))
    with pytest.raises(SystemExit, match=r"error: .*cache exists; delete it"):
        main(["features", *_arguments(photos, tmp_path / "cache")])
    options = ["--dtype", "float32", "--batch-size", "3", "--workers", "2", "--overwrite"]
    main(["features", *_arguments(photos, tmp_path / "cache"), *options])
    again = FeatureCache(tmp_path / "cache")
    torch.testing.assert_close(again.read(range(8)), cache.read(range(8)), rtol=0, atol=0)


def test_an_interrupted_cache_is_finished_and_not_computed_again(
    photos: Path, tmp_path: Path
) -> None:
    encoder = load_image_encoder(str(photos / "vit"))
    keys = [f"eval{i}.png" for i in range(8)]
    calls = []
    encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))

    def cache(folder: Path, names: list[str]) -> FeatureCache:
        name = str(photos / "vit")
        return cache_images(folder, names, encoder, tmp_path / "c", name=name, batch_size=3)

    broken = tmp_path / "images"
    broken.mkdir()
    for key in keys[:4]:
        (broken / key).write_bytes((photos / "images" / key).read_bytes())
    with pytest.raises(ValueError, match="no such file"):
        cache(broken, keys)
    assert calls == [3]
    whole = cache(photos / "images", keys)
    assert calls == [3, 3, 2]
    assert whole.num_images == 8


def test_training_with_the_encoder_in_the_loop(photos: Path, tmp_path: Path) -> None:
    """Without augmentation it is training from a cache of the same encoder."""
    live = {"features": None, "eval_features": None, "image_size": SIZE}
    live |= {"images": str(photos / "images"), "eval_images": str(photos / "images")}
    live |= {"image_encoder": str(photos / "vit"), "augment": False}
    cached = {}
    encoder = load_image_encoder(str(photos / "vit"))
    for split, key in (("train", "features"), ("eval", "eval_features")):
        keys = [r.image for r in read_captions(photos / f"{split}.jsonl")]
        cached[key] = str(tmp_path / split)
        cache_images(
            photos / "images",
            keys,
            encoder,
            cached[key],
            name=str(photos / "vit"),
            dtype="float32",
        )
    losses = []
    for name, data in (
        ("live", live),
        ("cached", cached),
        ("augmented", {**live, "augment": True}),
    ):
        train(config(photos, tmp_path / name, 1, data=data), say=lambda _: None)
        lines = read_metrics(tmp_path / name)
        assert "eval_t2i_r1" in lines[-1]
        losses.append([line["loss"] for line in lines if "loss" in line])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert losses[2] != losses[0]


def test_an_image_size_between_patches_is_refused(photos: Path, tmp_path: Path) -> None:
    live = {"features": None, "eval_features": None, "eval_records": None, "image_size": 32}
    live |= {"images": str(photos / "images"), "image_encoder": str(photos / "vit")}
    with pytest.raises(
        ValueError, match=r"image_size 32 is not a multiple of .* patch size 14; 28 is"
    ):
        train(config(photos, tmp_path / "out", 1, data=live), say=lambda _: None)


def _stage1(**changes: int) -> Blip2Stage1:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "encoder_hidden_size": 12, "vocab_size": 21, "embed_dim": 4}
    torch.manual_seed(1)
    return Blip2Stage1(Stage1Config(**(sizes | {"bos_token_id": 20} | changes)))


def test_the_encoder_class_is_what_the_model_takes() -> None:
    encoder = FrozenImageEncoder(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), 3, "vit")
    model = _stage1()
    ids = torch.tensor([[2, 5, 3], [2, 7, 3]])
    live = Blip2Stage1(model.config, encoder).eval()
    live.load_state_dict(model.state_dict(), strict=False)
    negatives = (torch.tensor([1, 0]), torch.tensor([1, 0]))
    by_tokens = model.eval()(image_embeds=encoder(IMAGES), input_ids=ids, negatives=negatives)
    by_images = live(images=IMAGES, input_ids=ids, negatives=negatives)
    torch.testing.assert_close(by_images.loss, by_tokens.loss)
