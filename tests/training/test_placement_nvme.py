"""A frozen language model on a disk, by DeepSpeed's ZeRO-3, where its async_io op can be built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config, distance, write_world
from transformers import OPTConfig, OPTForCausalLM

from blip2fast.training.engine import deepspeed_config, start_processes
from blip2fast.training.log import read_metrics
from blip2fast.training.memory_plan import GIB, Memory, plan_memory
from blip2fast.training.trainer import train

DISK = {"offload_param": "nvme", "precision": "bf16"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As elsewhere, the language model with weights of 1 MB: smaller ones never go to the disk."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 2048, "vocab_size": 4096}
    small = OPTConfig.from_pretrained(folder / "opt").to_dict()
    torch.manual_seed(7)
    OPTForCausalLM(OPTConfig(**{**small, **sizes})).save_pretrained(folder / "opt")
    return folder


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every weight written to the disk; skips where that cannot be."""
    start_processes()
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
        AsyncPartitionedParameterSwapper as Swapper,
    )

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io op cannot be built here (libaio-dev)")
    written: list[int] = []
    original: Callable[..., Any] = Swapper.swap_out_and_release

    def noted(self: Any, params: list[Any], *args: Any, **kwargs: Any) -> Any:
        written.extend(p.ds_numel for p in params)
        return original(self, params, *args, **kwargs)

    monkeypatch.setattr(Swapper, "swap_out_and_release", noted)
    return written


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 3},
        {"offload": "zero3"},
        {"offload": "zero3", "gradient_checkpointing": True},
        {"offload": "zero3", "offload_optimizer": "nvme"},
    ],
    ids=str,
)
def test_a_run_trains_as_with_its_model_in_memory(
    world: Path, tmp_path: Path, on_disk: list[int], settings: dict[str, Any]
) -> None:
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    (tmp_path / "disk").mkdir()
    more = {"nvme_path": str(tmp_path / "disk"), **DISK, **settings}
    train(config(world, tmp_path / "nvme", 2, **more), say=lambda _: None)
    assert sorted(on_disk) == [256 * 2048] * 4 + [256 * 4096]
    cpu = {"zero_stage": 3, "offload_param": "cpu", "precision": "bf16"}
    train(config(world, tmp_path / "cpu", 2, **cpu), say=lambda _: None)
    found, expected = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("nvme", "cpu")
    )
    assert len(expected) == 6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert distance(tmp_path / "nvme", tmp_path / "cpu") < 3e-4


def test_a_buffer_holds_a_share_of_the_largest_weight(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path, 2, zero_stage=3, nvme_path=str(tmp_path), **DISK)
    for largest, processes, expected in (
        (50272 * 4096, 1, 50272 * 4096),
        (50272 * 4096, 2, 50272 * 2048),
        (50272 * 4096, 8, 100_000_000),
    ):
        zero = deepspeed_config(run, processes, [10], largest)["zero_optimization"]
        assert zero["offload_param"]["buffer_size"] == expected
        assert zero["stage3_prefetch_bucket_size"] == 0
    plan = plan_memory(run, memory=Memory(GIB, GIB, device_is_host=False))
    host = next(option.host for option in plan.options if option.offload == "zero3")
    assert host == {"language model, read from nvme": 2 * 5 * 100_000_000}
