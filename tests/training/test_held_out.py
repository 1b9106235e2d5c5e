"""Held-out losses count every sample, on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_run import be_one_of_two, config, free_port, write_world

from blip2fast.data.records import CaptionRecord, QuestionRecord
from blip2fast.ops import collectives
from blip2fast.training.build import build_run
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train
from blip2fast.training.validation import _scores, _shards, validate

pytestmark = pytest.mark.slow

# records, batch: a smaller last batch that divides among two, that does not, one left over
CASES = ((8, 6), (7, 4), (5, 4), (3, 8))


def _world(folder: Path) -> Path:
    world = write_world(folder)
    for split in ("eval", "eval_questions"):
        lines = (world / f"{split}.jsonl").read_text().splitlines()
        for count, _ in CASES:
            (world / f"{split}{count}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    return world


def _settings(world: Path, output: Path, stage: int, case: tuple[int, int], **more: Any) -> Any:
    count, batch = case
    records = {"eval_records": str(world / f"eval{count}.jsonl"), "max_txt_len": 12}
    more["eval_scores"] = True
    return config(world, output, stage, eval_batch_size=batch, data=records, **more)


def _evaluate(world: Path, output: Path) -> dict[str, dict[str, float]]:
    found = {}
    for stage in (1, 2):
        for case in CASES:
            settings = _settings(world, output, stage, case)
            parts = build_run(settings, dist.get_rank(), dist.get_world_size())
            found[f"{stage} {case}"] = validate(parts.model, parts, settings, lambda batch: batch)
    questions = {"eval_records": str(world / "eval_questions7.jsonl"), "max_txt_len": 12}
    questions |= {"records": str(world / "train_questions.jsonl"), "task": "vqa"}
    settings = config(world, output, 2, eval_scores=True, data=questions)
    parts = build_run(settings, dist.get_rank(), dist.get_world_size())
    found["vqa"] = validate(parts.model, parts, settings, lambda batch: batch)
    assert collectives.world_size() == dist.get_world_size()
    return found


def _work(rank: int, port: int, folder: Path) -> None:
    be_one_of_two(rank, port)
    world = folder / "world"
    dist.init_process_group("gloo")
    torch.save(_evaluate(world, folder / "run"), folder / f"rank{rank}.pt")
    small = {"optim": {"max_steps": 3, "batch_size": 2}, "zero_stage": 3}
    for stage in (1, 2):
        run = _settings(world, folder / f"zero3-{stage}", stage, (7, 4), **small)
        train(run, say=lambda _: None)
    dist.destroy_process_group()


def _work_alone(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    torch.save(_evaluate(folder / "world", folder / "run"), folder / "one.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    _world(folder / "world")
    mp.spawn(_work, (free_port(), folder), nprocs=2)
    mp.spawn(_work_alone, (folder,), nprocs=1)  # other tests leave their process group behind
    return folder


def test_two_processes_count_what_one_counts(outputs: Path) -> None:
    one = torch.load(outputs / "one.pt")
    for rank in (0, 1):
        two = torch.load(outputs / f"rank{rank}.pt")
        for case, expected in one.items():
            assert two[case] == pytest.approx(expected, rel=1e-5), case


def test_scores_of_benchmarks_are_among_them(outputs: Path) -> None:
    one = torch.load(outputs / "one.pt")
    stage1, stage2 = one["1 (7, 4)"], one["2 (7, 4)"]
    assert {f"rerank_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} < stage1.keys()
    assert {"cider_d", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"} < stage2.keys()
    # of at most 7 images, any of which is among the first 10
    assert stage1["rerank_t2i_r10"] == 1
    assert "vqa_accuracy" in one["vqa"]


def test_scores_of_known_texts() -> None:
    images = [CaptionRecord("a", ("a red ring", "it is red")), CaptionRecord("b", ("a blue disc",))]
    found = _scores(["a red ring", "a blue star"], images, on_questions=False)
    assert found["bleu_1"] == pytest.approx(5 / 6)  # words
    assert found["rouge_l"] == pytest.approx((1 + 2 / 3) / 2)
    several = [
        QuestionRecord("a", "what", "ring", answers=("ring",) * 2 + ("disc",)),
        QuestionRecord("b", "what", "disc", answers=("disc",) * 3),
    ]
    assert _scores(["Ring!", "x"], several, on_questions=True) == {
        # of three people two said so: leaving one of them out 1/3, the third 2/3
        "vqa_accuracy": pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3 / 2)
    }
    single = [QuestionRecord(name, "what", name) for name in ("ring", "disc")]
    assert _scores(["The ring.", "star"], single, on_questions=True) == {"vqa_accuracy": 0.5}


def test_the_best_checkpoint_by_a_score(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    config(world, tmp_path, 2, eval_scores=True, keep_best="cider_d")
    config(world, tmp_path, 1, eval_scores=True, keep_best="rerank_t2i_r1")
    with pytest.raises(ValueError, match=r"no such metric; there are loss, exact$"):
        config(world, tmp_path, 2, keep_best="cider_d")


def test_zero_3_evaluates_a_last_batch_that_does_not_divide(outputs: Path) -> None:
    for stage in (1, 2):
        *_, last = read_metrics(outputs / f"zero3-{stage}")
        assert last["eval_loss"] > 0


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("count", "batch", "least"),
    [(200, 64, 2), (200, 64, 1), (129, 64, 2), (130, 64, 2), (7, 64, 2), (3, 4, 1), (1, 4, 1)],
)
def test_every_sample_counts_once(
    monkeypatch: pytest.MonkeyPatch, world: int, count: int, batch: int, least: int
) -> None:
    weight = torch.zeros(count)
    sizes = set()
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        pieces = list(_shards(count, batch, least))
        sizes.add(tuple(len(rows) for rows, _ in pieces))
        for rows, share in pieces:
            weight[rows] += share
    assert weight.tolist() == [1.0] * count
    assert len(sizes) == 1, "all processes must make the same calls"


def test_one_sample_has_no_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    with pytest.raises(ValueError, match=r"1 held-out sample.* too few: losses need 2 or more"):
        list(_shards(1, 64, least=2))
