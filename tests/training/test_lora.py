"""LoRA adapters of the language model: trained, stored as peft's own, loaded, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_run import config, weights, write_world
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from blip2fast.checkpoints.trained import load_trained, read_description, read_parameters
from blip2fast.frozen.language_models import load_language_model
from blip2fast.inference.model import Blip2
from blip2fast.stage2.lora import (
    adapter_names,
    add_lora,
    has_lora,
    merge_lora,
    target_names,
)
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.run_state import RunState
from blip2fast.training.trainer import train

KINDS = {"opt": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _adapted(world: Path, output: Path, kind: str = "opt", **changes: Any) -> RunConfig:
    lora = {"r": 2, "alpha": 8, "dropout": 0.1} | changes.pop("lora", {})
    language = {"path": str(world / kind), "lora": lora}
    optim = {"max_steps": 3, "warmup_steps": 1} | changes.pop("optim", {})
    data = {"eval_records": None, "eval_features": None} | changes.pop("data", {})
    return config(world, output, 2, language_model=language, optim=optim, data=data, **changes)


def _train(run: RunConfig) -> Path:
    train(run, say=lambda _: None)
    return Path(run.output_dir)


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with adapters of each kind, in 16 bits the T5, which has its layers recomputed."""
    folder = tmp_path_factory.mktemp("runs")
    in_16 = {"precision": "bf16", "gradient_checkpointing": True, "zero_stage": 1}
    return {
        "opt": _train(_adapted(world, folder / "opt", "opt")),
        "t5": _train(_adapted(world, folder / "t5", "t5", **in_16)),
    }


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **more).logits
    return logits


IDS = torch.tensor([[2, 5, 7, 3], [4, 4, 9, 8]])


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_folder_of_a_run(world: Path, runs: dict[str, Path], kind: str) -> None:
    run = runs[kind]
    model = load_trained(run)
    assert isinstance(model, Blip2Stage2)
    whole = PeftModel.from_pretrained(KINDS[kind].from_pretrained(world / kind), run).eval()
    plain = KINDS[kind].from_pretrained(world / kind).eval()
    found = _logits(whole, IDS)
    torch.testing.assert_close(_logits(model.language_model, IDS), found, rtol=0, atol=0)
    assert not torch.allclose(found, _logits(plain, IDS), atol=1e-4)
    stated = json.loads((run / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["peft_type"]) == (2, 8, "LORA")
    assert stated["base_model_name_or_path"] == str(world / kind)
    # the adapters are in their own file alone, in fp32
    assert not any("lora" in name for name in weights(run))
    adapters = {n: v for n, v in read_parameters(run).items() if "lora" in n}
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    assert len(adapters) == 2 * sum("lora_A" in name for name in adapters)
    assert all(value.any() for value in adapters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_are_the_same_function(
    world: Path, runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    blip2 = Blip2.from_pretrained(runs[kind])
    embeds = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    before = blip2.caption(image_embeds=embeds, max_new_tokens=4)
    logits = _logits(blip2.model.language_model, IDS)
    blip2.merge_adapters()
    assert not has_lora(blip2.model.language_model)
    merged = _logits(blip2.model.language_model, IDS)
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)
    assert blip2.caption(image_embeds=embeds, max_new_tokens=4) == before
    # it is a plain model of transformers
    blip2.model.language_model.save_pretrained(tmp_path)
    again = KINDS[kind].from_pretrained(tmp_path).eval()
    torch.testing.assert_close(_logits(again, IDS), merged)
    # which a run must not adapt once more
    with pytest.raises(ValueError, match="was trained with the language model"):
        Blip2.from_pretrained(runs[kind], language_model=str(tmp_path))
    with pytest.raises(ValueError, match="no adapters to merge"):
        blip2.merge_adapters()


def test_the_weights_of_the_language_model_do_not_move(world: Path, tmp_path: Path) -> None:
    run = _adapted(world, tmp_path / "out", lora={"target_modules": "all-linear"})
    parts = build_run(run, 0, 1)
    plain = dict(load_language_model(str(world / "opt"), torch.float32).named_parameters())
    train_parts(run, parts)
    model: Any = parts.model
    adapted = {
        name.rpartition(".lora_")[0]
        for name, _ in model.language_model.named_parameters()
        if "lora_" in name
    }
    language = load_language_model(str(world / "opt"), torch.float32)
    assert adapted == set(target_names(language, "all-linear"))
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
            continue
        assert not parameter.requires_grad
        assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), name


def train_parts(run: RunConfig, parts: Any) -> None:
    """Train the given parts, which `train` would build itself."""
    from blip2fast.training.engine import start_processes
    from blip2fast.training.trainer import Trainer

    Trainer(run, parts, start_processes(), lambda _: None).run()


def test_dropout_of_adapters_alone(world: Path, tmp_path: Path) -> None:
    """In training the adapters' own; the frozen model around them has none; nor has evaluation."""
    parts = build_run(_adapted(world, tmp_path / "out", lora={"dropout": 0.5}), 0, 1)
    model: Any = parts.model
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draws)
    batch = parts.batches[0]
    training = [n for n, m in model.language_model.named_modules() if m.training]
    assert training
    assert all(".lora_dropout" in name for name in training)
    model.qformer.eval()
    first, second = (model(**batch).loss.item() for _ in range(2))
    assert first != second
    model.generate(image_embeds=batch["image_embeds"], max_new_tokens=2)
    assert [n for n, m in model.language_model.named_modules() if m.training] == training
    # recomputed layers draw the same again
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(gradients[0][name].any() for name in gradients[0] if "lora" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    model.eval()
    assert not any(m.training for m in model.modules())
    assert model(**batch).loss.item() == model(**batch).loss.item()


def test_a_run_goes_on_with_adapters(world: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    first = runs["opt"]
    start = read_parameters(first)
    model = build_run(_adapted(world, tmp_path, init_from=str(first)), 0, 1).model
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], value) for name, value in start.items())
    with pytest.raises(ValueError, match=r"has LoRA adapters .* train on with the same"):
        build_run(config(world, tmp_path, 2, init_from=str(first)), 0, 1)
    with pytest.raises(ValueError, match="r is 2 there, 4 here"):
        build_run(_adapted(world, tmp_path, init_from=str(first), lora={"r": 4}), 0, 1)


def test_adapters_start_on_a_run_without(world: Path, tmp_path: Path) -> None:
    """New adapters change nothing until they are trained, and do not depend on the precision."""
    first = _train(config(world, tmp_path / "a", 2, optim={"max_steps": 3}))
    plain = load_trained(first)
    run = _adapted(world, tmp_path / "b", init_from=str(first))
    parts = build_run(run, 0, 1)
    batch = parts.batches[0]
    assert parts.model.eval()(**batch).loss.item() == plain(**batch).loss.item()
    # what a memory plan counts is what peft adapts
    named = {n.rpartition(".lora_")[0] for n in adapter_names(dict(parts.model.named_parameters()))}
    language = load_language_model(str(world / "opt"), torch.float32)
    assert named == {f"language_model.{name}" for name in target_names(language, None)}
    state = RunState(run, build_run(run, 0, 1), torch.device("cpu"), lambda _: None)
    names = [group["name"] for group in state.engine.optimizer.param_groups]
    assert names == ["decay", "no_decay"]
    assert read_description(first).adapter is None


def test_what_adapters_cannot_be_had_with(world: Path, tmp_path: Path) -> None:
    for changes, named in (
        ({"offload": "stream"}, "offload 'stream'"),
        ({"offload": "zero3"}, "offload 'zero3'"),
        ({"zero_stage": 3}, "zero_stage 3"),
    ):
        with pytest.raises(ValueError, match=f"language_model.lora with {named}: adapters need"):
            _adapted(world, tmp_path, **changes)
    run = _adapted(world, tmp_path, lora={"target_modules": ["q_prj"]})
    with pytest.raises(ValueError, match=r"'q_prj': no linear layer .* near it are q_proj"):
        build_run(run, 0, 1)
    with pytest.raises(ValueError, match="target_modules is empty"):
        _adapted(world, tmp_path, lora={"target_modules": []})
    model = load_language_model(str(world / "opt"), torch.float32)
    add_lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)


def test_a_run_with_adapters_is_not_streamed(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"has LoRA adapters, .* leave out offload"):
        Blip2.from_pretrained(runs["opt"], offload="stream")
