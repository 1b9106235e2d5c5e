"""Both stages under Hugging Face's `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stage1_cases import SMALL, make_batch
from stage2_models import opt_model, stage2_config, t5_config
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2

pytest.importorskip("accelerate")

Records = list[dict[str, Tensor]]


def stage1() -> tuple[nn.Module, Records]:
    torch.manual_seed(0)
    batch = make_batch(SMALL, 8)
    batch["image_embeds"] = batch["image_embeds"].float()
    # a configuration of its own: the trainer writes into it
    model = Blip2Stage1(Stage1Config.from_dict(SMALL.to_dict()))
    return model, [{name: x[i] for name, x in batch.items()} for i in range(8)]


def stage2() -> tuple[nn.Module, Records]:
    return stage2_with(opt_model())


def stage2_t5() -> tuple[nn.Module, Records]:
    return stage2_with(T5ForConditionalGeneration(t5_config(tie_word_embeddings=True)))


def stage2_with(language_model: Any) -> tuple[nn.Module, Records]:
    torch.manual_seed(0)
    config = stage2_config()
    model = Blip2Stage2(config, language_model)
    tokens = torch.randn(8, 7, config.encoder_hidden_size)
    ids = torch.randint(3, 30, (8, 5))
    return model, [
        {"image_embeds": tokens[i], "input_ids": ids[i], "labels": ids[i]} for i in range(8)
    ]


Make = Callable[[], tuple[nn.Module, Records]]
STAGES: list[Make] = [stage1, stage2]


def trainer(made: tuple[nn.Module, Records], folder: Path, **settings: Any) -> Any:
    model, records = made
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        }
        | settings,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=records, eval_dataset=records
    )


@pytest.mark.parametrize("make", [*STAGES, stage2_t5])
def test_trains_saves_and_goes_on(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It failed at the first attribute that the trainer sets on a frozen configuration."""
    made = make()
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    run = trainer(made, tmp_path, save_strategy="steps", save_steps=1)
    assert run.train().training_loss > 0
    moved = {
        name
        for name, p in made[0].named_parameters()
        if p.requires_grad and not torch.equal(p, before[name])
    }
    assert {"query_tokens", "ln_vision.weight"} <= moved
    assert all(
        torch.equal(p, before[name])
        for name, p in made[0].named_parameters()
        if name.startswith("language_model.")
    )
    other = make()
    for p in other[0].parameters():  # what is trained comes from the checkpoint alone
        if p.requires_grad:
            p.data.add_(1)
    trainer(other, tmp_path, max_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert "missing keys" not in caplog.text
    for (name, ours), theirs in zip(other[0].named_parameters(), made[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("make", STAGES)
def test_recomputes_and_reports(make: Make, tmp_path: Path) -> None:
    run = trainer(make(), tmp_path, gradient_checkpointing=True, report_to="tensorboard")
    assert run.train().training_loss > 0


def test_evaluates_with_a_name_for_the_labels(tmp_path: Path) -> None:
    run = trainer(stage1(), tmp_path, label_names=["input_ids"], prediction_loss_only=True)
    assert run.evaluate()["eval_loss"] > 0
    run = trainer(stage2(), tmp_path, prediction_loss_only=True)
    assert run.evaluate()["eval_loss"] > 0


def test_other_settings_of_recomputation_are_refused() -> None:
    model, _ = stage1()
    with pytest.raises(ValueError, match="every_n_layers=2: every layer is recomputed"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_the_configuration_is_what_trainers_expect() -> None:
    config = Stage1Config.from_dict(SMALL.to_dict())
    assert config.get_text_config() is config
    assert '"num_query_tokens": 5' in config.to_json_string()
