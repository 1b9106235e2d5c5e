"""A trained model goes with the frozen models that it was trained with, and with no others."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import WIDTH, config, weights, write_world
from stage2_models import opt_config, t5_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from blip2fast.checkpoints import trained as checkpointing
from blip2fast.checkpoints.trained import load_trained
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.frozen import language_models
from blip2fast.frozen.identity import (
    FrozenIdentity,
    identify_model,
    note_identity,
    sampled_parts,
)
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.offload import stream_blocks
from blip2fast.offload.loading import load_streamed, source_identity
from blip2fast.training.build import build_run
from blip2fast.training.engine import start_processes
from blip2fast.training.placement import choose_placement
from blip2fast.training.trainer import Trainer, train

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {"optim": {"max_steps": 2, "warmup_steps": 1}}


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As elsewhere, with `other`: the same OPT, trained further."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "opt", folder / "other")
    _train_further(folder / "other")
    return folder


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    train(config(world, folder, 2, save_every=1, **SHORT), say=_quiet)
    return folder


def _train_further(folder: Path) -> None:
    """Change the weights on disk by about a thousandth."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: value + 1e-3 * torch.rand_like(value) for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def _write(folder: Path, kind: str) -> type[Any]:
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "opt":
        model = OPTForCausalLM(opt_config(num_hidden_layers=3))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=20, n_layer=2, n_head=2))
    else:
        model = T5ForConditionalGeneration(t5_config())
    model.save_pretrained(folder, max_shard_size="10KB")
    return AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM


@pytest.mark.parametrize("kind", ["opt", "gpt2", "t5"])
def test_a_model_is_the_same_on_disk_and_in_memory(tmp_path: Path, kind: str) -> None:
    """In every precision, resident, streamed and in 8 bits, and stored in another precision."""
    auto = _write(tmp_path / "a", kind)
    expected = source_identity(str(tmp_path / "a"))
    assert expected is not None
    assert expected.name == str(tmp_path / "a")
    for dtype in DTYPES:
        model = auto.from_pretrained(tmp_path / "a", dtype=dtype)
        assert expected.differences(identify_model(model)) == []
        for storage in ("as_is", "int8"):
            streamed, _ = load_streamed(str(tmp_path / "a"), dtype, "cpu", storage=storage)
            assert expected.differences(identify_model(streamed)) == [], (dtype, storage)
        stream_blocks(model.requires_grad_(False), "cpu", storage="int4")
        assert expected.differences(identify_model(model)) == [], dtype
    auto.from_pretrained(tmp_path / "a", dtype=torch.float16).save_pretrained(tmp_path / "half")
    half = source_identity(str(tmp_path / "half"))
    assert half is not None
    assert expected.differences(half) == []


def test_files_that_transformers_has_to_read_are_told_once_loaded(tmp_path: Path) -> None:
    _write(tmp_path / "a", "opt")
    expected = source_identity(str(tmp_path / "a"))
    model = OPTForCausalLM.from_pretrained(tmp_path / "a")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "bin")
    assert source_identity(str(tmp_path / "bin")) is None
    for storage in ("as_is", "int8"):
        streamed, _ = load_streamed(str(tmp_path / "bin"), torch.bfloat16, "cpu", storage=storage)
        assert expected is not None
        assert expected.differences(identify_model(streamed)) == []


def _scaled(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data *= 1.01


def _adapted(model: PreTrainedModel) -> None:
    """A merged adapter of rank one in one matrix."""
    weight = model.model.decoder.layers[1].self_attn.q_proj.weight
    weight.data += 0.05 * torch.outer(*torch.randn(2, *weight.shape[:1]))


def _reordered(model: PreTrainedModel) -> None:
    layers = model.model.decoder.layers
    first = copy.deepcopy(layers[0].state_dict())
    layers[0].load_state_dict(layers[1].state_dict())
    layers[1].load_state_dict(first)


@pytest.mark.parametrize("change", [_scaled, _adapted, _reordered])
def test_other_weights_are_another_model(change: Callable[[PreTrainedModel], None]) -> None:
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(num_hidden_layers=3))
    before = identify_model(model)
    change(model)
    assert before.differences(identify_model(model)) == ["other weights"]


def test_another_configuration_is_another_model() -> None:
    """Where it changes the function, and not where a version of transformers adds a key."""
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(num_hidden_layers=1))
    before = identify_model(model)
    model.config.activation_function = "gelu"
    model.config.use_cache = False
    model.config.new_in_a_later_version = 3
    expected = ["activation_function is 'relu' there, 'gelu' here"]
    assert before.differences(identify_model(model)) == expected


def test_what_samples_cannot_tell() -> None:
    """Single values between the samples, as the module says: 8 runs of 32, from start to end."""
    parts = sampled_parts(1000)
    assert [len(range(1000)[part]) for part in parts] == [32] * 8
    assert (parts[0].start, parts[-1].stop) == (0, 1000)
    assert sampled_parts(256) == [slice(0, 256)]
    model = nn.Linear(1000, 1, bias=False)
    before = identify_model(model)
    model.weight.data[0, parts[0].stop] += 1
    assert before.differences(identify_model(model)) == []
    model.weight.data[0, parts[1].start] += 1
    assert before.differences(identify_model(model)) == ["other weights"]


def test_a_model_without_its_values_is_not_guessed() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    note_identity(model)
    with pytest.raises(ValueError, match=r"Linear: its weights are partitioned.*load_streamed or"):
        identify_model(model)


def test_a_runs_identity_does_not_depend_on_where_its_language_model_is(
    world: Path, tmp_path: Path
) -> None:
    start_processes()
    settings: list[dict[str, Any]] = [
        {},
        {"precision": "bf16"},
        {"zero_stage": 3},
        {"offload": "zero3"},
        {"offload": "stream", "stream_storage": "int8"},
    ]
    found = [
        build_run(config(world, tmp_path, 2, **each), 0, 1).description.frozen["language_model"]
        for each in settings
    ]
    assert all(identity == found[0] for identity in found)
    assert found[0] == source_identity(str(world / "opt"))


def _both(world: Path, name: str = "other") -> str:
    return rf"'{world / 'opt'}' \(opt, .* weights \w{{12}}\), but '{world / name}' \(opt, .*is ano"


def test_loading_before_another_language_model_is_refused(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = language_models.load_language_model(str(world / "other"), torch.bfloat16)
    message = rf"{finished} was trained with the language model {_both(world)}"
    message += r"ther one: other weights. Give the one.*or pass check=False"
    with pytest.raises(ValueError, match=message):
        load_trained(finished, other)
    same = language_models.load_language_model(str(world / "opt"), torch.bfloat16)
    for model in (
        load_trained(finished),
        load_trained(finished, same),
        load_trained(finished, other, check=False),
    ):
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[n], value) for n, value in weights(finished).items())


def test_a_language_model_that_changed_on_disk_is_refused_before_it_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "language_model"
    shutil.copytree(world / "opt", moved)
    section = {"language_model": {"path": str(moved)}}
    train(config(world, tmp_path / "run", 2, save_every=1, **section, **SHORT), say=_quiet)
    _train_further(moved)

    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(checkpointing, "load_language_model", load)
    with pytest.raises(ValueError, match=r"is another one: other weights. Put back the one it was"):
        load_trained(tmp_path / "run")
    resume = config(world, tmp_path / "run", 2, save_every=1, resume=True, **section, **SHORT)
    with pytest.raises(ValueError, match=r"other weights. Resume with the one .* with init_from"):
        train(resume, say=_quiet)


def test_starting_before_another_language_model_is_refused_or_asked_for(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    """Asked for, the Q-Former is taken and the projection is new."""
    settings = {"init_from": str(finished), "language_model": {"path": str(world / "other")}}
    with pytest.raises(
        ValueError, match=_both(world) + r".*set allow_other_frozen: true for a new"
    ):
        build_run(config(world, tmp_path, 2, **settings), 0, 1)
    start = weights(finished)
    taken = {}
    for path in ("opt", "other"):
        settings["language_model"] = {"path": str(world / path)}
        run = config(world, tmp_path, 2, allow_other_frozen=True, seed=5, **settings)
        state = build_run(run, 0, 1).model.trainable_state_dict()
        taken[path] = {name for name, value in start.items() if torch.equal(state[name], value)}
    assert taken["opt"] == start.keys()
    assert start.keys() - taken["other"] == {
        "language_projection.weight",
        "language_projection.bias",
    }


def test_allowing_others_needs_a_start(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"allow_other_frozen is about init_from, which is not set"
    ):
        config(world, tmp_path, 2, allow_other_frozen=True)


def _encoder(name: str, seed: int = 0) -> FrozenImageEncoder:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "image_size": 28, "patch_size": 14}
    return FrozenImageEncoder(ViTModel(ViTConfig(**sizes), add_pooling_layer=False), 2, name)


def _cache(world: Path, folder: Path, encoder_id: FrozenIdentity | str) -> dict[str, Any]:
    """The training features again, said to be of another encoder."""
    old = FeatureCache(world / "train_features")
    with FeatureCache.create(
        folder, old.keys, old.num_tokens, old.width, encoder_id=encoder_id
    ) as writer:
        writer.write(0, old.read(range(len(old))))
    return {"features": str(folder), "eval_records": None, "eval_features": None}


def test_tokens_of_another_image_encoder_are_refused_or_asked_for(
    world: Path, tmp_path: Path
) -> None:
    """By its weights where the cache knows them: a folder may move, or get other weights."""
    one, moved = _encoder("here/vit"), _encoder("there/vit")
    other = _encoder("here/vit", seed=1)
    data = _cache(world, tmp_path / "one", one.identity)
    assert FeatureCache(tmp_path / "one").encoder == one.identity
    assert FeatureCache(tmp_path / "one").encoder_id == "here/vit, block 2"
    train(config(world, tmp_path / "run", 1, data=data, **SHORT), say=_quiet)
    start = {"init_from": str(tmp_path / "run")}

    def build(name: str, encoder_id: FrozenIdentity | str, **more: Any) -> None:
        cached = _cache(world, tmp_path / name, encoder_id)
        build_run(config(world, tmp_path / "next", 2, data=cached, **start, **more), 0, 1)

    build("moved", moved.to(torch.bfloat16).identity)
    message = r"the image encoder 'here/vit, block 2' \(vit, .*but 'here/vit, block 2' .*other weig"
    with pytest.raises(ValueError, match=message):
        build("other", other.identity)
    build("asked", other.identity, allow_other_frozen=True)
    with pytest.raises(
        ValueError, match=r"on tokens of 'here/vit, block 2', but the data are of 'x'"
    ):
        build("named", "x")


def test_a_run_says_which_frozen_models_it_belongs_to(world: Path, finished: Path) -> None:
    values = json.loads((finished / "model.json").read_text())["frozen"]["language_model"]
    assert values["name"] == str(world / "opt")
    assert values["config"]["activation_function"] == "relu"
    assert set(values["weights"]) == {"fp32", "bf16", "fp16"}
    model = OPTForCausalLM.from_pretrained(world / "opt")
    assert FrozenIdentity(**values).differences(identify_model(model)) == []
    all_values = sum(p.numel() for p in model.parameters())
    assert 0.9 * all_values < values["values"] <= all_values


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16", "zero_stage": 2},
        {"offload": "stream", "gradient_checkpointing": True},
        {"offload": "stream", "stream_storage": "int8"},
        {"language_model": "t5", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_training_leaves_frozen_weights_bit_identical(
    world: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Through training, evaluation, which generates, and a checkpoint; all buffers too."""
    settings = dict(settings)
    language = {"language_model": {"path": str(world / settings.pop("language_model", "opt"))}}
    run = config(world, tmp_path, 2, save_every=2, **language, **SHORT, **settings)
    device = start_processes()
    parts = build_run(run, 0, 1)
    trained = {n: v.clone() for n, v in parts.model.trainable_state_dict().items()}
    before = {n: v.clone() for n, v in parts.model.language_model.state_dict().items()}
    assert len(before) > 20
    Trainer(run, parts, device, _quiet).run()
    after = parts.model.language_model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)), name
    moved = parts.model.trainable_state_dict()
    matrices = [name for name in trained if name.endswith("dense.weight")]
    assert len(matrices) > 4
    assert not any(torch.equal(moved[name].float(), trained[name]) for name in matrices)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"offload": "zero3"}], ids=str)
def test_training_under_zero3_leaves_frozen_weights_bit_identical(
    world: Path, tmp_path: Path, settings: dict[str, Any], precision: str
) -> None:
    """Of one process, whose shares are the whole weights, against the files."""
    run = choose_placement(config(world, tmp_path, 2, precision=precision, **SHORT, **settings))
    device = start_processes()
    parts = build_run(run, 0, 1)
    Trainer(run, parts, device, _quiet).run()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    whole = language_models.load_language_model(str(world / "opt"), dtype)
    expected = dict(whole.named_parameters())
    found: dict[str, Any] = dict(parts.model.language_model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        share = found[name].ds_tensor[: value.numel()]
        assert share.dtype == value.dtype
        assert torch.equal(share.view(value.shape), value), name
