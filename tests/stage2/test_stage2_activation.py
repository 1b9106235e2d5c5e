"""Another activation in a T5's feed-forward layers than its configuration says, as LAVIS has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, write_world
from stage2_models import batches, images, opt_model, reference_model, stage2_config, t5_config
from torch import nn
from transformers import Blip2ForConditionalGeneration, T5ForConditionalGeneration

from blip2fast.checkpoints.trained import load_trained
from blip2fast.stage2.language_model import use_activation
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import build_run
from blip2fast.training.config_files import load_config
from blip2fast.training.memory_plan import GIB, Memory, plan_memory
from blip2fast.training.trainer import train

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_loss_is_that_of_a_model_configured_so() -> None:
    reference = reference_model("t5", torch.float64)
    own = reference.language_model
    other = T5ForConditionalGeneration(t5_config(dense_act_fn="gelu")).double().eval()
    other.load_state_dict(own.state_dict())
    assert (own.config.dense_act_fn, other.config.dense_act_fn) == ("gelu_new", "gelu")
    batch, _ = batches("t5")
    losses = []
    for language, more in ((own, {}), (other, {}), (own, {"llm_activation": "gelu"})):
        torch.manual_seed(0)
        model = Blip2Stage2(stage2_config(**more), copy.deepcopy(language)).double().eval()
        embeds = torch.randn(3, 5, 24, dtype=torch.float64)
        losses.append(float(model(embeds, **batch).loss.detach()))
    assert losses[2] == losses[1]
    assert abs(losses[0] - losses[1]) > 1e-7


def test_transformers_keeps_it(tmp_path: Path) -> None:
    reference = reference_model("t5", torch.float64)
    model = Blip2Stage2.from_transformers(reference).eval()
    settings = {**vars(model.config), "llm_activation": "gelu"}
    ours = Blip2Stage2(
        type(model.config)(**settings), reference.language_model, model.image_encoder
    )
    ours.load_trainable_state_dict(model.trainable_state_dict())
    ours = ours.double().eval()
    batch, _ = batches("t5")
    want = ours(images=images(torch.float64), **batch).loss
    ours.to_transformers(40).save_pretrained(tmp_path)
    loaded: Any = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.text_config.dense_act_fn == "gelu"
    assert reference.language_model.config.dense_act_fn == "gelu_new"
    again = Blip2Stage2.from_transformers(loaded).eval()
    got = again(images=images(torch.float64), **batch).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="llm_activation 'gelu': OPTForCausalLM is not a T5"):
        use_activation(opt_model(), "gelu")
    with pytest.raises(ValueError, match=r"llm_activation 'gellu': transformers knows .*gelu_new"):
        use_activation(T5ForConditionalGeneration(t5_config()), "gellu")


def _activations(model: Any) -> set[type]:
    layers = [m for m in model.language_model.modules() if hasattr(m, "wo")]
    return {type(layer.act) for layer in layers}


@pytest.mark.parametrize("place", [{}, {"offload": "stream"}, {"zero_stage": 3}], ids=str)
def test_it_reaches_a_run_and_the_model_it_trained(tmp_path: Path, place: dict[str, Any]) -> None:
    world = write_world(tmp_path / "world")
    section = {"path": str(world / "t5"), "activation": "gelu"}
    run = config(world, tmp_path / "out", 2, language_model=section, **place)
    train(run, say=lambda _: None)
    trained = load_trained(run.output_dir)
    (kind,) = _activations(trained)
    assert "GELU" in kind.__name__
    plain = config(world, tmp_path / "plain", 2, language_model={"path": str(world / "t5")})
    assert _activations(build_run(plain, 0, 1).model) == {nn.ReLU}


def test_the_plan_counts_it(tmp_path: Path) -> None:
    """T5's own gelu is made of several functions, each of which keeps its input."""
    world = write_world(tmp_path / "world")
    T5ForConditionalGeneration(t5_config()).save_pretrained(world / "t5")
    kept = []
    for more in ({}, {"activation": "gelu"}):
        section = {"path": str(world / "t5"), **more}
        run = config(world, tmp_path / "out", 2, language_model=section)
        plan = plan_memory(run, memory=Memory(GIB, GIB, device_is_host=False))
        kept.append(plan.options[0].device["activations"])
    assert kept[1] < kept[0]


@pytest.mark.parametrize("recipe", ["vitg_flant5xl", "vitg_flant5xxl", "vitl_flant5xl"])
def test_the_recipes_of_the_paper_have_it(recipe: str) -> None:
    run = load_config(CONFIGS / f"{recipe}_stage2.yaml")
    assert run.language_model is not None
    assert run.language_model.activation == "gelu"
