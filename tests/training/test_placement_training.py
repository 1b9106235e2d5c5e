"""Whole stage-2 runs with the language model in every place: the same losses, the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from small_run import be_one_of_two, config, distance, free_port, write_world

from blip2fast.offload.streaming import BlockStream, stream_of
from blip2fast.training import placement
from blip2fast.training.build import build_run
from blip2fast.training.engine import leave_processes
from blip2fast.training.log import read_metrics
from blip2fast.training.memory_plan import Memory
from blip2fast.training.trainer import train

RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "stream": {"offload": "stream"},
    "stream, three buffers": {"offload": "stream", "stream_buffers": 3},
    "stream, zero 1": {"offload": "stream", "zero_stage": 1},
    "stream, zero 2, recomputed": {
        "offload": "stream",
        "zero_stage": 2,
        "gradient_checkpointing": True,
    },
    "zero3": {"offload": "zero3"},
    "zero3, recomputed": {"offload": "zero3", "gradient_checkpointing": True},
    "auto": {"offload": "auto"},
}
ON_HOST = {"offload_optimizer": "cpu"}
TWO: dict[str, dict[str, Any]] = {
    **{name: RUNS[name] for name in ("none", "stream", "stream, zero 1", "zero3")},
    "zero 1, optimizer on the host": {"zero_stage": 1, **ON_HOST},
    "zero 2, optimizer on the host": {"zero_stage": 2, **ON_HOST},
    "zero 3, optimizer on the host": {"zero_stage": 3, **ON_HOST},
    "zero 3, all on the host": {"zero_stage": 3, "offload_param": "cpu", **ON_HOST},
}
# texts of one length, so that the mean over two processes is that over one
PLAIN: dict[str, Any] = {"model": {"dropout": 0.0}, "data": {"max_txt_len": 3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _quiet(_: str) -> None: ...


def _series(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def _run(world: Path, output: Path, language: str, **settings: Any) -> None:
    accumulation = {"optim": {"accumulation": 2, "max_steps": 4}}
    section = {"language_model": {"path": str(world / language)}}
    train(config(world, output, 2, **accumulation, **section, **settings), say=_quiet)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_every_place_of_the_language_model_trains_alike(
    world: Path, tmp_path: Path, language: str
) -> None:
    """Loss, evaluation (which generates) and trained weights, with two passes a step."""
    for name, settings in RUNS.items():
        _run(world, tmp_path / name, language, **settings)
        for series in ("loss", "eval_loss", "eval_exact"):
            expected = _series(tmp_path / "none", series)
            assert len(expected) == (4 if series == "loss" else 1)
            found = _series(tmp_path / name, series)
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=0, msg=f"{name} {series}")
        assert distance(tmp_path / name, tmp_path / "none") < 3e-4, name


def test_fewer_bits_train_too(world: Path, tmp_path: Path) -> None:
    _run(world, tmp_path / "none", "opt")
    _run(world, tmp_path / "int8", "opt", offload="stream", stream_storage="int8")
    expected, found = (_series(tmp_path / name, "loss") for name in ("none", "int8"))
    assert found != expected
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_a_run_resumes_with_its_language_model_elsewhere(world: Path, tmp_path: Path) -> None:
    """The place is no part of a run's identity: begun resident, continued streamed."""
    _run(world, tmp_path / "whole", "opt", save_every=2, keep_last=9)
    checkpoints = Path("checkpoints") / "step-00000002"
    shutil.copytree(tmp_path / "whole" / checkpoints, tmp_path / "parts" / checkpoints)
    _run(world, tmp_path / "parts", "opt", offload="stream", resume=True)
    expected, found = (_series(tmp_path / name, "loss") for name in ("whole", "parts"))
    assert len(found) == 2
    torch.testing.assert_close(found, expected[2:], rtol=2e-6, atol=0)
    assert "offload: stream" in (tmp_path / "parts" / "config.yaml").read_text()


def test_the_streamed_language_model_is_in_the_parts(world: Path, tmp_path: Path) -> None:
    parts = build_run(config(world, tmp_path, 2, offload="stream"), 0, 1)
    blocks = parts.model.language_model.model.decoder.layers
    assert all(isinstance(stream_of(block), BlockStream) for block in blocks)
    assert [list(block.parameters()) for block in blocks] == [[], []]
    # the trained part starts as it does with the language model loaded by transformers
    plain = build_run(config(world, tmp_path, 2), 0, 1)
    own = plain.model.trainable_state_dict()
    found = parts.model.trainable_state_dict()
    assert all(torch.equal(found[name], value) for name, value in own.items())


def _work(rank: int, port: int, world: Path, outputs: Path) -> None:
    be_one_of_two(rank, port)
    plain = {**PLAIN, "optim": {"batch_size": 2}}
    for name, settings in TWO.items():
        train(config(world, outputs / name, 2, **plain, **settings), say=_quiet)
    # the processes find different memory, and all stop because one has too little
    free = Memory((64 << 30) if rank == 0 else 1000, 64 << 30, device_is_host=False)
    placement.machine_memory = lambda: free
    with pytest.raises(ValueError, match="nothing fits this machine"):
        train(config(world, outputs / "auto", 2, **plain, offload="auto"), say=_quiet)
    leave_processes()


@pytest.mark.slow
def test_two_processes_train_alike(world: Path, tmp_path: Path) -> None:
    mp.spawn(_work, (free_port(), world, tmp_path), nprocs=2)
    expected = _series(tmp_path / "none", "loss")
    assert len(expected) == 6
    train(config(world, tmp_path / "one", 2, **PLAIN), say=_quiet)
    one = _series(tmp_path / "one", "loss")
    torch.testing.assert_close(expected, one, rtol=1e-5, atol=0)
    for name in list(TWO)[1:]:
        torch.testing.assert_close(
            _series(tmp_path / name, "loss"), expected, rtol=2e-6, atol=0, msg=name
        )
        assert distance(tmp_path / name, tmp_path / "none") < 3e-4, name


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_in_bf16_zero3_is_zero_stage_3(world: Path, tmp_path: Path, language: str) -> None:
    """DeepSpeed takes a model that is spread in part for one that is cast as a whole."""
    _run(world, tmp_path / "plain", language, precision="bf16", zero_stage=3)
    _run(world, tmp_path / "ours", language, precision="bf16", offload="zero3")
    found, expected = (_series(tmp_path / name, "loss") for name in ("ours", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
