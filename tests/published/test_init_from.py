"""Runs that start from published weights: LAVIS's files and transformers' folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import (
    BLOCKS,
    HIDDEN,
    IMAGE_SIZE,
    INNER,
    KINDS,
    LAYERS,
    MLP,
    PATCH,
    POSITIONS,
    QUERIES,
    SIDE,
    WIDTH,
    WORDS,
    eva_tokens,
    halved,
    keys,
    lavis_state,
    write_lavis,
)
from small_run import config, write_world
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
)

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.published import open_weights
from blip2fast.stage1.lavis import from_lavis
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run, build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.preflight import check_machine
from blip2fast.training.trainer import train

TOKENS = SIDE * SIDE + 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_run`'s, with features of the image encoder of a fine-tuned file of LAVIS."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for kind in KINDS:
        write_lavis(folder, kind)
    for name in ("blip2_caption_opt2.7b", "plain"):
        features(folder, name)
    return folder


def features(folder: Path, name: str) -> None:
    encoder = "unknown" if name == "plain" else load_image_encoder(str(folder / f"{name}.pth"))
    identity = encoder if isinstance(encoder, str) else encoder.identity
    for split, count in (("train", 22), ("eval", 8)):
        names = [f"{split}{i}" for i in range(count)]
        with FeatureCache.create(
            folder / f"{name}_{split}", names, TOKENS, WIDTH, encoder_id=identity
        ) as writer:
            draws = torch.Generator().manual_seed(count)
            writer.write(0, torch.randn(count, TOKENS, WIDTH, generator=draws))


def run(
    world: Path, output: Path, start: Path, stage: int, feature: str = "plain", **changes: Any
) -> RunConfig:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("num_query_tokens", "max_position_embeddings")
    model: dict[str, Any] = dict.fromkeys(sizes)
    if stage == 1:
        model["embed_dim"] = None
    data = {"features": f"{world}/{feature}_train", "eval_features": f"{world}/{feature}_eval"}
    model |= changes.pop("model", {})
    settings = {"model": model, "data": data, "init_from": str(start)}
    return config(world, output, stage, **settings, **changes)


def built(settings: RunConfig) -> Run:
    check_machine(settings)
    return build_run(settings, 0, 1)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("blip2_pretrained", 346),
        ("blip2_finetune_coco", 857),
        ("blip2_pretrained_opt2.7b", 261),
        ("blip2_caption_opt2.7b", 772),
        ("blip2_pretrained_flant5xl", 262),
        ("instruct_blip_flanxl_trimmed", 336),
        ("instruct_blip_vicuna7b_trimmed", 334),
    ],
)
def test_every_name_in_a_file_of_lavis_is_accounted_for(world: Path, kind: str, count: int) -> None:
    """With 39 blocks and 12 layers, as published; nothing of it is merely passed over."""
    assert len(keys(kind, 39, 12)) == count
    weights = open_weights(str(world / f"{kind}.pth"))
    there = [*weights.names.values(), *(n for names in weights.others.values() for n in names)]
    assert sorted(there) == sorted(keys(kind))
    model = Blip2Stage1 if weights.stage == 1 else Blip2Stage2
    assert weights.sizes["num_attention_heads"] == 2
    assert model.__name__ == f"Blip2Stage{weights.stage}"


@pytest.mark.parametrize("kind", ["blip2_pretrained", "blip2_finetune_coco"])
def test_stage1_from_lavis(world: Path, tmp_path: Path, kind: str) -> None:
    parts = built(run(world, tmp_path, world / f"{kind}.pth", 1))
    expected = from_lavis({n: v for n, v in lavis_state(kind).items() if "decoder" not in n})
    found = parts.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].reshape(value.shape), value), name
    assert parts.model.config.num_attention_heads == 2
    lines = parts.start.splitlines()
    assert lines[:3] == [
        f"init_from '{world}/{kind}.pth': a file of LAVIS, stage 1",
        f"  taken: {len(expected)} tensors",
        "  new: none",
    ]
    assert "(tied to another tensor): Qformer.cls.predictions.decoder.weight" in parts.start


@pytest.mark.parametrize(
    ("kind", "language"),
    [("blip2_pretrained_opt2.7b", "opt"), ("blip2_pretrained_flant5xl", "t5")],
)
def test_stage2_from_lavis_keeps_the_projection(
    world: Path, tmp_path: Path, kind: str, language: str
) -> None:
    start = world / f"{kind}.pth"
    path = {"path": str(world / language)}
    parts = built(run(world, tmp_path, start, 2, language_model=path))
    state, found = lavis_state(kind), parts.model.state_dict()
    assert torch.equal(found["language_projection.weight"], state[f"{language}_proj.weight"])
    key = "encoder.layer.2.crossattention.self.key.weight"
    ours = "qformer.encoder.layer.2.crossattention.attention.key.weight"
    assert torch.equal(found[ours], state[f"Qformer.bert.{key}"])
    assert "  new: none" in parts.start
    other = {"opt": "t5", "t5": "opt"}[language]
    wrong = run(world, tmp_path, start, 2, language_model={"path": str(world / other)})
    with pytest.raises(ValueError, match=rf"model_type is '{language}' there, '{other}' here"):
        built(wrong)
    free = run(
        world,
        tmp_path,
        start,
        2,
        language_model={"path": str(world / other)},
        allow_other_frozen=True,
    )
    parts = built(free)
    assert torch.equal(parts.model.state_dict()[ours], state[f"Qformer.bert.{key}"])


def test_stage2_from_stage1_of_lavis_has_a_new_projection(world: Path, tmp_path: Path) -> None:
    parts = built(run(world, tmp_path, world / "blip2_pretrained.pth", 2))
    state = lavis_state("blip2_pretrained")
    assert torch.equal(parts.model.query_tokens, state["query_tokens"])
    assert "  new: language_projection.bias; language_projection.weight" in parts.start
    assert "left out (stage 2 has none of it)" in parts.start


def test_instructions_are_read_as_lavis_trained_them(world: Path, tmp_path: Path) -> None:
    start = world / "instruct_blip_flanxl_trimmed.pth"
    words = {"text_conditioned": True, "tokenizer": str(world / "qformer_tokenizer")}
    path = {"path": str(world / "t5")}
    parts = built(run(world, tmp_path, start, 2, model=words, language_model=path))
    state, found = lavis_state("instruct_blip_flanxl_trimmed"), parts.model.state_dict()
    for ours, theirs in {
        "qformer.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "qformer.embeddings.layernorm.bias": "embeddings.LayerNorm.bias",
        "qformer.encoder.layer.1.output.dense.weight": "encoder.layer.1.output.dense.weight",
    }.items():
        assert torch.equal(found[ours], state[f"Qformer.bert.{theirs}"]), ours
    assert "it was trained with language_model.activation: 'gelu'" in parts.start


def test_the_report_is_in_the_log_of_a_run(world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    optim = {"max_steps": 2, "warmup_steps": 0}
    train(run(world, tmp_path, world / "blip2_pretrained.pth", 1, optim=optim), say=said.append)
    assert any(line.startswith("init_from ") and "taken: 105 tensors" in line for line in said)


def test_another_image_encoder_than_the_fine_tuned_one_is_refused(
    world: Path, tmp_path: Path
) -> None:
    """A fine-tuned file holds its encoder, by which image tokens are judged."""
    start = world / "blip2_caption_opt2.7b.pth"
    assert built(run(world, tmp_path, start, 2, "blip2_caption_opt2.7b")).start
    changed = lavis_state("blip2_caption_opt2.7b")
    changed["visual_encoder.blocks.0.mlp.fc1.weight"] += 1
    torch.save({"model": changed}, tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match=r"was trained with the image encoder .*: other weights"):
        built(run(world, tmp_path, tmp_path / "tuned.pth", 2, "blip2_caption_opt2.7b"))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_the_image_encoder_of_a_file_of_lavis(tmp_path: Path, half: bool) -> None:
    """Tokens by the definition of LAVIS's ViT, before `ln_vision`; also from a file of its own."""
    state = lavis_state("blip2_caption_opt2.7b")
    state = halved(state) if half else state
    torch.save({"model": state}, tmp_path / "whole.pth")
    own = {
        name.removeprefix("visual_encoder."): value
        for name, value in state.items()
        if name.startswith("visual_encoder.")
    }
    torch.save(own, tmp_path / "eva.pth")
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    truth = eva_tokens(state, pixels.double())
    for name in ("whole.pth", "eva.pth"):
        encoder = load_image_encoder(str(tmp_path / name))
        assert (encoder.width, encoder.image_size, encoder.num_tokens) == (WIDTH, 12, TOKENS)
        torch.testing.assert_close(encoder(pixels).double(), truth, rtol=1e-4, atol=1e-4)


def _transformers(kind: type, **qformer: Any) -> Any:
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "vocab_size": WORDS,
        "max_position_embeddings": POSITIONS,
    }
    instruct = kind is InstructBlipForConditionalGeneration
    language = OPTConfig(
        vocab_size=64,
        hidden_size=48,
        word_embed_proj_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=96,
        max_position_embeddings=64,
    )
    whole = (InstructBlipConfig if instruct else Blip2Config)(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 1,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "initializer_range": 0.1,
        },
        qformer_config=sizes | qformer,
        text_config=language.to_dict(),
        num_query_tokens=QUERIES,
    )
    torch.manual_seed(5)
    model = kind(whole)
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    torch.nn.init.normal_(model.query_tokens)
    return model


def _features_of(folder: Path, output: Path) -> None:
    identity = load_image_encoder(str(folder)).identity
    for split, count in (("train", 22), ("eval", 8)):
        names = [f"{split}{i}" for i in range(count)]
        with FeatureCache.create(
            output / f"own_{split}", names, TOKENS, WIDTH, encoder_id=identity
        ) as writer:
            writer.write(0, torch.randn(count, TOKENS, WIDTH))


@pytest.mark.parametrize("kind", [Blip2ForConditionalGeneration, Blip2Model])
def test_stage2_from_transformers(world: Path, tmp_path: Path, kind: type) -> None:
    model = _transformers(kind)
    model.save_pretrained(tmp_path / "published")
    _features_of(tmp_path / "published", tmp_path)
    own = {"features": f"{tmp_path}/own_train", "eval_features": f"{tmp_path}/own_eval"}
    settings = run(world, tmp_path / "out", tmp_path / "published", 2)
    settings.data.features, settings.data.eval_features = own.values()
    parts = built(settings)
    expected = Blip2Stage2.from_transformers(model) if kind is not Blip2Model else None
    found = {n: p for n, p in parts.model.named_parameters() if p.requires_grad}
    assert torch.equal(found["ln_vision.weight"], model.vision_model.post_layernorm.weight)
    assert torch.equal(found["language_projection.bias"], model.language_projection.bias)
    if expected is not None:
        for name, value in expected.trainable_state_dict().items():
            assert torch.equal(found[name], value), name
    assert parts.model.config.ln_vision_eps == 1e-6
    assert "  new: none" in parts.start
    assert f"data.image_encoder may name '{tmp_path}/published'" in parts.start
    # another language model of the same width
    values = json.loads((world / "opt" / "config.json").read_text())
    other = OPTConfig(**{**values, "ffn_dim": 100})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="ffn_dim is 96 there, 100 here"):
        same_kind(tmp_path / "published", other)


def same_kind(start: Path, other: OPTConfig) -> None:
    from blip2fast.frozen.identity import FrozenIdentity
    from blip2fast.published.weights import same_language_model

    hashes = dict.fromkeys(("fp32", "bf16", "fp16"), "0")
    given = FrozenIdentity("other", other.to_dict(), hashes, 1)
    same_language_model(open_weights(str(start)), given, "init_from")


def test_stage1_from_retrieval(world: Path, tmp_path: Path) -> None:
    """The temperature and the generation head are new, or BERT's; all else is theirs."""
    model = _transformers(Blip2ForImageTextRetrieval, use_qformer_text_input=True)
    model.save_pretrained(tmp_path / "published")
    _features_of(tmp_path / "published", tmp_path)
    settings = run(world, tmp_path / "out", tmp_path / "published", 1)
    settings.data.features = f"{tmp_path}/own_train"
    settings.data.eval_features = f"{tmp_path}/own_eval"
    parts = built(settings)
    found, theirs = parts.model.state_dict(), model.state_dict()
    for name, value in found.items():
        if name.startswith(("lm_head.", "temp")):
            continue
        other = name.replace("ln_vision.", "vision_model.post_layernorm.")
        assert torch.equal(value, theirs[other]), name
    assert float(found["temp"]) == pytest.approx(0.07)
    assert "  new: lm_head.bias; lm_head.transform.LayerNorm.bias;" in parts.start
    assert parts.model.config.embed_dim == 256
    # and stage 2 from it
    parts = built(run(world, tmp_path / "out", tmp_path / "published", 2, allow_other_frozen=True))
    assert torch.equal(parts.model.query_tokens, model.query_tokens)


def test_a_run_names_its_frozen_models_by_absolute_paths(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run is used from other working folders than the one it was trained in."""
    monkeypatch.chdir(world)
    words = {"tokenizer": "qformer_tokenizer"}
    parts = built(run(world, tmp_path, Path("blip2_pretrained.pth"), 1, model=words))
    assert parts.description.tokenizer == str(world / "qformer_tokenizer")
    start = Path("blip2_caption_opt2.7b.pth")
    opt = {"path": "opt"}
    parts = built(run(world, tmp_path, start, 2, "blip2_caption_opt2.7b", language_model=opt))
    assert parts.description.language_model == str(world / "opt")
    assert parts.description.image_encoder == f"{world}/blip2_caption_opt2.7b.pth, block 2"
    assert parts.description.revisions == {}


def test_what_cannot_be_a_start_is_one_line(world: Path, tmp_path: Path) -> None:
    stage2 = world / "blip2_pretrained_opt2.7b.pth"
    with pytest.raises(ValueError, match=r"holds a stage-2 model, but the configuration says"):
        built(run(world, tmp_path, stage2, 1))
    (tmp_path / "broken.pth").write_bytes(stage2.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken.pth: not a file of PyTorch weights, or dama"):
        built(run(world, tmp_path, tmp_path / "broken.pth", 2))
    with pytest.raises(ValueError, match=r"no-such.: no model.json.* no \.pth file .*not found"):
        built(run(world, tmp_path, tmp_path / "no-such", 2))
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "else.pth")
    with pytest.raises(ValueError, match=r"else.pth: no BLIP-2 of LAVIS: .* it holds a\."):
        built(run(world, tmp_path, tmp_path / "else.pth", 2))
    with pytest.raises(ValueError, match=r"is a 'opt' model; expected a BLIP-2 or InstructBLIP"):
        built(run(world, tmp_path, world / "opt", 2))
    lost = lavis_state("blip2_pretrained")
    del lost["text_proj.bias"]
    torch.save({"model": lost}, tmp_path / "lost.pth")
    with pytest.raises(ValueError, match=r"text_projection.bias: missing"):
        built(run(world, tmp_path, tmp_path / "lost.pth", 1))
    with pytest.raises(ValueError, match=r"blip2_pretrained.pth holds no image encoder: LAVIS"):
        load_image_encoder(str(world / "blip2_pretrained.pth"))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth: not a file of PyTorch weights"):
        open_weights(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
