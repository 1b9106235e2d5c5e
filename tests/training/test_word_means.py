"""Losses over words average over the words of a step, however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from small_run import be_one_of_two, config, free_port, write_world
from torch import Tensor

from blip2fast.data.records import CaptionRecord, SequenceRecord, write_records
from blip2fast.training.build import build_run
from blip2fast.training.engine import leave_processes
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train
from blip2fast.training.word_means import pass_weights, weighted

LENGTHS = (1, 9, 2, 4, 8, 1, 3, 7)  # words of the records' captions
# one pass; two and four of one process; two and four passes of two processes
SPLITS = {"whole": (8, 1), "two": (4, 2), "four": (2, 4)}


def _world(folder: Path) -> Path:
    world = write_world(folder)
    words = ("red", "ring", "blue")
    write_records(
        world / "uneven.jsonl",
        [
            CaptionRecord(f"train{i}", (" ".join(words[(i + n) % 3] for n in range(count)),))
            for i, count in enumerate(LENGTHS)
        ],
    )
    return world


def _settings(world: Path, output: Path, stage: int, split: tuple[int, int], **more: Any) -> Any:
    """A single step of all eight records, without dropout, clipping and evaluation."""
    batch, accumulation = split
    optim = {"max_steps": 1, "warmup_steps": 0, "clip_norm": 0.0} | more.pop("optim", {})
    optim |= {"batch_size": batch, "accumulation": accumulation}
    data = {"records": str(world / "uneven.jsonl"), "eval_records": None, "eval_features": None}
    model = {"dropout": 0.0}
    return config(world, output, stage, optim=optim, data=data, model=model, save_every=1, **more)


def _quiet(_: str) -> None: ...


def _work(rank: int, port: int, folder: Path) -> None:
    be_one_of_two(rank, port)
    world, one, two = folder / "world", (2, 2), (4, 1)
    for stage in (1, 2):
        for zero in range(4):
            train(
                _settings(world, folder / f"{stage}-p{zero}", stage, one, zero_stage=zero),
                say=_quiet,
            )
        train(_settings(world, folder / f"{stage}-once", stage, two), say=_quiet)
    torch.save(_exact(world, folder, one), folder / f"exact{rank}.pt")
    leave_processes()


def _exact(world: Path, folder: Path, split: tuple[int, int], **more: Any) -> dict[int, Any]:
    """The word loss of a step, and its gradient, in fp64, by DeepSpeed's rule: a mean of passes."""
    found = {}
    for stage in (1, 2):
        settings = _settings(world, folder / "unused", stage, split, **more)
        processes = dist.get_world_size()
        parts = build_run(settings, dist.get_rank(), processes)
        model = parts.model.double().train()
        batches = [parts.batches[i] for i in range(split[1])]
        weights: list[Any] = [{}] * split[1]
        if settings.optim.word_mean == "step":
            weights = pass_weights(parts.model, batches, torch.device("cpu"))
        total: Tensor = torch.zeros((), dtype=torch.float64)
        for batch, weight in zip(batches, weights, strict=True):
            batch["image_embeds"] = batch["image_embeds"].double()
            losses = weighted(model(**batch), weight)
            part = losses["loss_itg" if stage == 1 else "loss"]
            (part / split[1]).backward()
            total = total + part.detach() / split[1]
        gradient = torch.cat(
            [
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()).double()
                for p in model.parameters()
                if p.requires_grad
            ]
        )
        if processes == 2:
            for value in (gradient, total):
                dist.all_reduce(value)
                value /= 2
        found[stage] = (total, gradient)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    world = _world(folder / "world")
    for stage in (1, 2):
        for name, split in SPLITS.items():
            for zero in (0, 2, 3) if name == "two" else (0,):
                output = folder / f"{stage}-{name}{zero}"
                train(_settings(world, output, stage, split, zero_stage=zero), say=_quiet)
    mp.spawn(_work, (free_port(), folder), nprocs=2)
    return folder


def _word_loss(run: Path, stage: int) -> float:
    return read_metrics(run)[0]["loss_itg" if stage == 1 else "loss"]


def _gradient(run: Path, stage: int) -> Tensor:
    """Of the word loss: a tenth of it is in AdamW's first moment after a step."""
    moments = load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    # in stage 1 only ITG reads the language-modelling head
    of_words = "exp_avg/lm_head." if stage == 1 else "exp_avg/"
    return torch.cat([v.flatten() for n, v in sorted(moments.items()) if n.startswith(of_words)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["two0", "two2", "two3", "four0", "p0", "p1", "p2", "p3", "once"])
def test_a_split_step_has_the_loss_and_gradient_of_one_batch(
    runs: Path, stage: int, name: str
) -> None:
    whole, split = runs / f"{stage}-whole0", runs / f"{stage}-{name}"
    assert _word_loss(split, stage) == pytest.approx(_word_loss(whole, stage), rel=1e-6)
    expected, found = _gradient(whole, stage), _gradient(split, stage)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def _apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.slow
def test_in_fp64_they_are_equal(runs: Path) -> None:
    world = runs / "world"
    expected = _exact(world, runs, (8, 1))
    two = [torch.load(runs / f"exact{rank}.pt") for rank in (0, 1)]
    for found in (_exact(world, runs, (4, 2)), _exact(world, runs, (2, 4)), *two):
        for stage in (1, 2):
            assert max(_apart(found[stage], expected[stage])) < 1e-10


@pytest.mark.slow
def test_per_pass_is_the_mean_of_the_means(runs: Path) -> None:
    """As LAVIS averages: words of short texts count more."""
    world = runs / "world"
    found = _exact(world, runs, (2, 4), optim={"word_mean": "per_pass"})
    expected = _exact(world, runs, (8, 1))
    for stage in (1, 2):
        loss, gradient = _apart(found[stage], expected[stage])
        assert loss > 1e-3
        assert gradient > 0.05


def test_a_pass_without_a_negative_has_no_part_in_itm(tmp_path: Path) -> None:
    world = _world(tmp_path / "world")
    parts = build_run(_settings(world, tmp_path / "out", 1, (2, 3)), 0, 1)
    batches = [parts.batches[i] for i in range(3)]
    batches[1]["image_ids"] = torch.tensor([5, 5])
    weights = pass_weights(parts.model, batches, torch.device("cpu"))
    assert [weight["loss_itm"] for weight in weights] == [1.5, 0.0, 1.5]
    words = [weight["loss_itg"] for weight in weights]
    assert sum(words) == pytest.approx(3)
    assert len(set(words)) > 1


@pytest.mark.parametrize("stage", [1, 2])
def test_words_are_counted_as_the_loss_counts_them(tmp_path: Path, stage: int) -> None:
    world = _world(tmp_path / "world")
    parts = build_run(_settings(world, tmp_path / "out", stage, (8, 1)), 0, 1)
    batch = parts.batches[0]
    output = parts.model(**batch)
    counted = output.counts["loss_itg" if stage == 1 else "loss"]
    assert parts.model.num_target_words(batch) == int(counted)


@pytest.mark.parametrize("model", ["opt", "t5"])
@pytest.mark.parametrize("task", ["vqa", "sequence"])
def test_words_of_questions_and_sequences_are_counted(
    tmp_path: Path, model: str, task: str
) -> None:
    """Of a sequence without a prompt nothing precedes the first token, which is not predicted."""
    world = _world(tmp_path / "world")
    write_records(
        world / "sequence.jsonl",
        [
            SequenceRecord(("train0",), ("a red ring",), "<image>"),
            SequenceRecord((), ("it is a blue star",)),
            SequenceRecord(("train1", "train2"), ("a cross",), "<image> a disc <image>"),
        ],
    )
    records = {"vqa": "train_questions.jsonl", "sequence": "sequence.jsonl"}[task]
    data = {"records": str(world / records), "task": task, "max_txt_len": 24}
    settings = config(
        world,
        tmp_path / "out",
        2,
        data={**data, "eval_records": None, "eval_features": None},
        language_model={"path": str(world / model)},
        optim={"batch_size": 3},
    )
    parts = build_run(settings, 0, 1)
    batch = parts.batches[0]
    assert parts.model.num_target_words(batch) == int(parts.model(**batch).counts["loss"])
