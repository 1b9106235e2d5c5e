"""AdamW's groups and the learning rate; the DeepSpeed json that follows from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config
from torch import nn

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training.config import OptimSection
from blip2fast.training.engine import adamw, deepspeed_config, learning_rate
from blip2fast.training.parameter_groups import parameter_groups

OPTIM = OptimSection(max_steps=110, batch_size=1, lr=1.0, min_lr=0.2, warmup_steps=10)


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, OPTIM) for step in range(111)]
    rises = [b - a for a, b in itertools.pairwise(rates[:11])]
    assert rates[0] == pytest.approx(rises[0])  # no step without learning
    assert rises == pytest.approx([1 / 11] * 10)
    assert rates[10] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(0.6)  # half way down
    assert rates[35] == pytest.approx(0.2 + 0.8 * (0.5 + 0.5 * 2**-0.5))
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_without_warmup_the_first_rate_is_the_peak() -> None:
    optim = OptimSection(max_steps=4, batch_size=1, lr=1.0, min_lr=0.0, warmup_steps=0)
    assert learning_rate(0, optim) == 1.0
    assert learning_rate(9, optim) == 0.0


def test_decay_is_on_matrices_alone() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Blip2Stage1(
        Stage1Config(
            **sizes,
            intermediate_size=8,
            encoder_hidden_size=8,
            vocab_size=9,
            bos_token_id=8,
            embed_dim=4,
        )
    )
    model.vision_projection.weight.requires_grad_(False)
    decayed, others = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay = {names[id(p)] for p in decayed["params"]}
    without = {names[id(p)] for p in others["params"]}
    assert {"temp", "query_tokens", "ln_vision.weight", "itm_head.bias", "lm_head.bias"} <= without
    assert all(name.endswith((".weight", "query_tokens", "bias", "temp")) for name in without)
    assert {"itm_head.weight", "embeddings.word_embeddings.weight"} <= with_decay
    assert not any("norm" in name.lower() or name.endswith("bias") for name in with_decay)
    assert with_decay | without == set(names.values()) - {"vision_projection.weight"}
    assert not with_decay & without


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.05)


def test_adamw_is_torchs() -> None:
    optimizer = adamw(nn.Linear(3, 3), OPTIM)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.98)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"stage": 0}),
        ({"zero_stage": 2}, {"stage": 2, "reduce_bucket_size": 30}),
        (
            {"zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"},
            {
                "stage": 3,
                "reduce_bucket_size": 30,
                "stage3_param_persistence_threshold": 20,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            },
        ),
        (
            {"zero_stage": 3, "offload_param": "nvme", "nvme_path": "/disk"},
            {
                "stage": 3,
                "reduce_bucket_size": 30,
                "stage3_param_persistence_threshold": 20,
                "stage3_prefetch_bucket_size": 0,
                "offload_param": {
                    "device": "nvme",
                    "nvme_path": "/disk",
                    "buffer_count": 5,
                    "buffer_size": 100_000_000,
                },
            },
        ),
    ],
)
def test_zero_section(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    run = config(Path("w"), Path("o"), 1, **changes)
    assert deepspeed_config(run, 2, [10, 20])["zero_optimization"] == expected


def test_sizes_and_precision_reach_the_json() -> None:
    optim = {"batch_size": 3, "accumulation": 5, "clip_norm": 0.5}
    run = config(Path("w"), Path("o"), 1, optim=optim, precision="bf16", zero_stage=2)
    values = deepspeed_config(run, 2, [10])
    assert values["train_micro_batch_size_per_gpu"] == 3
    assert values["gradient_accumulation_steps"] == 5
    assert values["train_batch_size"] == 30
    assert values["gradient_clipping"] == 0.5
    assert values["bf16"] == {"enabled": True}
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    plain = deepspeed_config(config(Path("w"), Path("o"), 1), 1, [10])
    assert plain["gradient_clipping"] == 0.0  # the gate clips: fp32, ZeRO 0
    assert not {"bf16", "fp16", "data_types"} & plain.keys()
