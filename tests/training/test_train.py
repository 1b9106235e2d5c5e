"""Training in one process: ZeRO stages agree, resuming is exact, bad starts are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, distance, timeless, weights, write_world
from transformers import BertConfig, BertForMaskedLM
from transformers.models.opt.modeling_opt import OPTAttention

from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.trained import load_trained, read_description, save_model
from blip2fast.qformer.layers import QFormerAttention
from blip2fast.qformer.packed import PackedLayer
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import load_config
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Finished runs by their settings, each trained once."""
    done: dict[str, Path] = {}

    def run(stage: int = 1, **changes: Any) -> Path:
        key = json.dumps([stage, changes], sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("run") / "out"
            train(config(world, done[key], stage, **changes), say=_quiet)
        return done[key]

    return run


def _quiet(_: str) -> None: ...


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_train_alike(
    finished: Callable[..., Path], stage: int, zero_stage: int
) -> None:
    reference, spread = finished(stage), finished(stage, zero_stage=zero_stage)
    assert len(_losses(reference)) == 6
    torch.testing.assert_close(_losses(spread), _losses(reference), rtol=2e-6, atol=0)
    assert distance(spread, reference) < 3e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    ],
    ids=lambda settings: str(settings["zero_stage"]),
)
def test_offloading_trains_and_resumes_alike(
    finished: Callable[..., Path], world: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**settings, "save_every": 3, "eval_every": 3}
    reference, offloaded = finished(2, save_every=3, eval_every=3), finished(2, **settings)
    torch.testing.assert_close(_losses(offloaded), _losses(reference), rtol=2e-6, atol=0)
    resumed = _interrupted_copy(offloaded, tmp_path / "resumed", step=3)
    train(config(world, resumed, 2, resume=True, **settings), say=_quiet)
    assert _losses(resumed) == _losses(offloaded)
    assert distance(resumed, offloaded) == 0


def test_bf16_starts_alike_in_every_stage(finished: Callable[..., Path]) -> None:
    """DeepSpeed's bf16 engine of stage 0 counts a step before the first; ours must not."""
    plain = {"model": {"dropout": 0.0}}
    losses = [_losses(finished(2, precision="bf16", zero_stage=z, **plain)) for z in (0, 1, 2)]
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(losses[0], _losses(finished(2, **plain)), rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {"zero_stage": 0}),
        (1, {"zero_stage": 1}),
        (1, {"zero_stage": 2}),
        (1, {"zero_stage": 3}),
        (1, {"zero_stage": 0, "precision": "bf16"}),
        (1, {"zero_stage": 2, "precision": "bf16", "optim": {"accumulation": 2, "batch_size": 2}}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 3}),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(
    finished: Callable[..., Path], world: Path, tmp_path: Path, stage: int, settings: dict[str, Any]
) -> None:
    """To the last bit: losses, evaluations and weights, over an epoch's border."""
    settings = {"save_every": 3, "eval_every": 3, **settings}
    whole = finished(stage, **settings)
    resumed = _interrupted_copy(whole, tmp_path / "resumed", step=3)
    train(config(world, resumed, stage, resume=True, **settings), say=_quiet)
    assert timeless(whole) == timeless(resumed)
    assert distance(resumed, whole) == 0


def _interrupted_copy(whole: Path, copy: Path, step: int) -> Path:
    """The folder as a run that was killed in step 5, while writing a line, left it."""
    shutil.copytree(whole, copy)
    for name in ("manifest.json", "model.safetensors", "model.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    (copy / "metrics.jsonl").write_text("".join(kept) + '{"step": 5, "lo')
    partial = copy / "checkpoints" / "step-00000005.partial"
    partial.mkdir()
    (partial / "model.json").write_text("{")
    assert last_checkpoint(copy / "checkpoints").name == f"step-{step:08d}"
    return copy


def test_an_encoder_decoder_trains_and_resumes_exactly(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    """The random split of prefix and suffix is drawn from the sample's number, not from a state."""
    settings = {"language_model": {"path": str(world / "t5")}, "save_every": 3, "eval_every": 3}
    whole = finished(2, **settings)
    resumed = _interrupted_copy(whole, tmp_path / "resumed", step=3)
    train(config(world, resumed, 2, resume=True, **settings), say=_quiet)
    assert timeless(resumed) == timeless(whole)
    assert distance(resumed, whole) == 0
    spread = finished(2, zero_stage=3, gradient_checkpointing=True, **settings)
    torch.testing.assert_close(_losses(spread), _losses(whole), rtol=2e-6, atol=0)
    longer = {"max_steps": 40, "warmup_steps": 2, "batch_size": 8}
    losses = _losses(finished(2, language_model=settings["language_model"], optim=longer))
    assert losses[-1] < losses[0] - 0.05


def test_a_checkpoint_goes_to_another_zero_stage(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    settings = {"save_every": 3, "eval_every": 3}
    whole = finished(1, zero_stage=0, **settings)
    resumed = _interrupted_copy(whole, tmp_path / "resumed", step=3)
    train(config(world, resumed, 1, resume=True, zero_stage=2, **settings), say=_quiet)
    torch.testing.assert_close(_losses(resumed), _losses(whole), rtol=2e-6, atol=0)


def test_keeps_the_last_checkpoints(finished: Callable[..., Path]) -> None:
    folder = finished(1, save_every=1, keep_last=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000006",
    ]


def test_stage1_starts_from_bert(
    finished: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16}
    vocabulary = len(weights(finished(1))["lm_head.bias"]) - 1  # [DEC] is not BERT's
    bert = BertForMaskedLM(BertConfig(**sizes, vocab_size=vocabulary))
    bert.save_pretrained(folder)
    still = {"lr": 1e-9, "min_lr": 0.0, "max_steps": 1, "warmup_steps": 0}
    run = finished(1, model={"bert": str(folder)}, optim=still)
    name = "encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(weights(run)[f"qformer.{name}"], bert.state_dict()[f"bert.{name}"])


def test_accumulation_takes_the_same_samples(finished: Callable[..., Path]) -> None:
    """Stage 2 has no loss across samples: 2 x 2 samples give the gradient of 4."""
    same_length = {"data": {"max_txt_len": 3}, "model": {"dropout": 0.0}}
    once = finished(2, **same_length)
    twice = finished(2, optim={"batch_size": 2, "accumulation": 2}, **same_length)
    torch.testing.assert_close(_losses(twice), _losses(once), rtol=1e-5, atol=0)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_changes_memory_alone(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """Also in the language model, which is in evaluation mode, where transformers' does nothing."""
    plain = [finished(stage) for stage in (1, 2)]
    calls = {QFormerAttention: 0, PackedLayer: 0, OPTAttention: 0}

    def count(kind: type) -> None:
        name = "run" if kind is PackedLayer else "forward"
        original = getattr(kind, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[type(self)] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)

    count(PackedLayer)
    for stage, reference in zip((1, 2), plain, strict=True):
        calls.update(dict.fromkeys(calls, 0))
        if stage == 2:  # stage 1 would call a Q-Former whose class has another forward
            count(QFormerAttention)
            count(OPTAttention)
        recomputed = finished(
            stage,
            gradient_checkpointing=True,
            zero_stage=zero_stage,
            data={"eval_records": None, "eval_features": None},
        )
        torch.testing.assert_close(_losses(recomputed), _losses(reference), rtol=2e-6, atol=0)
        steps, twice, layers, cross = 6, 2, 2, 1
        # stage 1: a pass for contrast and generation, one for matching
        assert calls[PackedLayer] == (2 * steps * twice * layers if stage == 1 else 0)
        expected = 0 if stage == 1 else steps * twice * (layers + cross)
        assert calls[QFormerAttention] == expected
        assert calls[OPTAttention] == (0 if stage == 1 else steps * twice * layers)


def test_stage1_learns_and_stage2_builds_on_it(finished: Callable[..., Path], world: Path) -> None:
    longer = {"max_steps": 60, "warmup_steps": 5, "batch_size": 8}
    stage1 = finished(1, optim=longer, log_every=10, model={"dropout": 0.0})
    losses = _losses(stage1)
    assert losses[-1] < 0.8 * losses[0]
    stage2 = finished(2, init_from=str(stage1), optim={"max_steps": 2, "warmup_steps": 1})
    start = weights(stage1)["qformer.layernorm.weight"]
    assert (weights(stage2)["qformer.layernorm.weight"] - start).abs().max() < 0.03
    questions = {
        "task": "vqa",
        "records": str(world / "train_questions.jsonl"),
        "eval_records": str(world / "eval_questions.jsonl"),
    }
    tuned = finished(
        2,
        data=questions,
        init_from=str(stage2),
        language_model={"path": str(world / "opt"), "prompt": "what is {}"},
        optim={"max_steps": 2, "warmup_steps": 1},
    )
    assert 0 <= read_metrics(tuned)[-1]["eval_exact"] <= 1


def test_outputs(finished: Callable[..., Path], world: Path) -> None:
    folder = finished(1, save_every=3, eval_every=3, zero_stage=2)
    assert load_config(folder / "config.yaml").zero_stage == 2
    derived = json.loads((folder / "deepspeed.json").read_text())
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["gradient_clipping"] == 1.0
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"loss_itc", "loss_itm", "loss_itg", "lr", "seconds_per_step"} <= lines[0].keys()
    assert {"eval_t2i_r1", "eval_i2t_r5", "eval_accuracy_itm", "eval_loss"} <= lines[-1].keys()
    assert list((folder / "tensorboard").glob("events.*"))
    description = read_description(folder)
    assert (description.stage, description.step, description.image_encoder) == (1, 6, "codes")


def test_load_trained_gives_the_trained_model(finished: Callable[..., Path], world: Path) -> None:
    stage1 = load_trained(finished(1))
    assert isinstance(stage1, Blip2Stage1)
    assert not stage1.training
    assert torch.equal(stage1.temperature(), weights(finished(1))["temp"])
    assert weights(finished(1))["temp"].shape == ()
    stage2 = load_trained(finished(2))
    assert isinstance(stage2, Blip2Stage2)
    for name, value in weights(finished(2)).items():
        assert torch.equal(dict(stage2.named_parameters())[name], value)


def _refused(run: RunConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(run, say=_quiet)


def test_other_sizes_are_refused_with_both(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    start = {"init_from": str(finished(1))}
    wide = config(world, tmp_path / "a", 1, model={"hidden_size": 32}, **start)
    _refused(wide, r"model.hidden_size is 16 there, 32 here")
    many = config(world, tmp_path / "b", 2, model={"num_query_tokens": 4}, **start)
    _refused(many, r"model.num_query_tokens is 3 there, 4 here")


def test_a_cut_or_reshaped_checkpoint_is_refused(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished(1), broken)
    state = weights(broken)
    state["itm_head.weight"] = torch.zeros(2, 17)
    save_model(broken, state, read_description(broken))
    with pytest.raises(ValueError, match=r"itm_head.weight: expected \(2, 16\), got \(2, 17\)"):
        load_trained(broken)
    whole = (finished(1) / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"broken/model.safetensors has .* it is cut short"):
        load_trained(broken)
    _refused(config(world, tmp_path / "c", 1, init_from=str(broken)), "it is cut short")


def test_another_stage_is_refused(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    backwards = config(world, tmp_path / "a", 1, init_from=str(finished(2)))
    _refused(backwards, "holds a stage-2 model, but the configuration says stage: 1")
    copy = tmp_path / "copy"
    shutil.copytree(finished(1, save_every=3, eval_every=3, zero_stage=0), copy)
    _refused(config(world, copy, 2, resume=True), "stage is 1 there, 2 here")


def test_resuming_with_other_settings_is_refused(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished(1, save_every=3, eval_every=3, zero_stage=0), copy)
    _refused(config(world, copy, 1), "holds an earlier run.*resume: true")
    other = config(world, copy, 1, resume=True, seed=5, optim={"batch_size": 8})
    _refused(other, r"samples_per_step is 4 there, 8 here; seed is 0 there, 5 here")


def test_features_of_another_encoder_are_refused(
    finished: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "start"
    shutil.copytree(finished(1), copy)
    other = replace(read_description(copy), image_encoder="another")
    save_model(copy, weights(copy), other)
    run = config(world, tmp_path / "out", 2, init_from=str(copy))
    _refused(run, "trained on tokens of 'another', but the data are of 'codes'")


def test_texts_longer_than_the_position_table_are_refused(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path / "out", 1, data={"max_txt_len": 17})
    _refused(run, "max_txt_len 17 is longer than.*max_position_embeddings 16")


def test_a_batch_larger_than_the_data_is_refused(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path / "out", 1, optim={"batch_size": 23})
    _refused(run, "23 samples a step, but only 22 records")


def test_an_image_without_features_is_refused(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path / "out", 1, data={"records": str(world / "eval.jsonl")})
    _refused(run, r"'eval\d' is not among the 22")
