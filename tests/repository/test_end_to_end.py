"""The suite of whole runs: its clock, that runs are the real ones, and that rivals do the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_end_to_end
import our_runs
import summary
import tables
import textbook_runs
from comparing import Contender, Race
from results import ResultFile
from run_clock import REST, PartClock
from run_files import RunFiles, make_captions, run_config, write_files
from shapes import CACHED_RUNS, CAPTION_SHAPES, PICTURE_RUNS, RunShape
from stage1_contenders import TextbookStage1

from blip2fast.training import trainer
from blip2fast.training.build import build_run
from blip2fast.training.config import RunConfig

CPU = torch.device("cpu")
TRAINING_PARTS = {"data", "forward", "backward", "optimiser", "logging", REST}


class Hand:
    """A clock that is set forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_every_moment_belongs_to_the_innermost_part() -> None:
    hand = Hand()
    clock = PartClock(CPU, hand)
    hand.wait(5)
    with clock.during("before"):
        hand.wait(7)
    with clock.during("step"):
        hand.wait(100)
        clock.start()
        hand.wait(1)
        with clock.during("forward"):
            hand.wait(2)
            clock.wrapped("encoder", hand.wait)(3)
            hand.wait(4)
        hand.wait(0.5)
    hand.wait(0.25)
    clock.stop()
    with clock.during("after"):
        hand.wait(9)
    assert clock.seconds() == {"step": 1.5, "forward": 6, "encoder": 3, REST: 0.25}
    assert clock.whole() == sum(clock.seconds().values()) == 10.75


def test_waiting_and_modules_are_parts_also_where_they_fail() -> None:
    hand = Hand()
    clock = PartClock(CPU, hand)

    def slow() -> Iterator[int]:
        for number in range(2):
            hand.wait(3)
            yield number

    class Fails(nn.Module):
        def forward(self, seconds: float) -> None:
            hand.wait(seconds)
            raise ValueError("broken")

    module = Fails()
    clock.start()
    for _ in clock.waits("data", slow()):
        hand.wait(1)
    with clock.watching({"model": module}):
        with pytest.raises(ValueError, match="broken"):
            module(4)
        hand.wait(0.5)
    with pytest.raises(ValueError, match="broken"):
        module(8)
    clock.stop()
    assert clock.seconds() == {REST: 10.5, "data": 6, "model": 4}
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_on_cuda_events_are_read_after_the_device_has_come_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hand, waited = Hand(), list[bool]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = hand.now

        def elapsed_time(self, later: Event) -> float:
            assert waited, "read before the device was waited for"
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clock = PartClock(torch.device("cuda"))
    clock.start()
    with clock.during("forward"):
        hand.wait(2)
    clock.stop()
    assert not waited
    assert clock.seconds() == {REST: 0, "forward": 2}
    assert clock.whole() == 2


def test_a_contender_that_takes_its_own_time_is_judged_first() -> None:
    calls: list[str] = []

    def times() -> dict[str, float]:
        calls.append("timed")
        return {"": 3.0, "data": 1.0, "rest": 2.0}

    def judged() -> int:
        calls.append("judged")
        return 7

    def agree(_: None, found: int) -> None:
        assert found == 7

    race = Race(lambda seed: None, agree, CPU, timed=True)
    race.enter("run", lambda _: Contender({"": judged}, own_times=times))
    race.entries[0].take()
    assert calls == ["judged", "timed"]
    result = race.entries[0].result(None, None)
    assert result["median_s"] == 3
    assert result["phases_s"] == {"data": 1, "rest": 2}
    assert result["timed_by"] == "its own clock"


def test_captions_have_lengths_as_those_of_coco() -> None:
    captions = make_captions(2000, 500)
    lengths = [len(text.split()) for text in captions]
    assert sum(lengths) / len(lengths) == pytest.approx(10.5, abs=0.2)
    assert min(lengths) >= 6
    assert max(lengths) > 14
    assert {word for text in captions for word in text.split()} <= {f"w{n}" for n in range(500)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFiles]:
    """What the smallest runs read: features, and pictures."""
    shapes = {"cached": CACHED_RUNS["tiny"], "pictures": PICTURE_RUNS["tiny"]}
    return {
        name: write_files(tmp_path_factory.mktemp(name), shape, 24)
        for name, shape in shapes.items()
    }


def config_of(shape: RunShape, files: RunFiles, output: Path, **changes: Any) -> RunConfig:
    config = run_config(shape, files, output, torch.float32, "check")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def check_parts(steps: our_runs.Steps, parts: set[str]) -> None:
    assert set(steps.parts) == parts
    assert all(seconds > 0 for seconds in steps.parts.values())
    assert sum(steps.parts.values()) == pytest.approx(steps.whole, rel=1e-9)
    assert steps.times() == {"": steps.whole, **steps.parts}


def test_a_cached_run_is_a_real_one_whose_parts_add_up(
    files: dict[str, RunFiles], tmp_path: Path
) -> None:
    shape = CACHED_RUNS["tiny"]
    config = config_of(shape, files["cached"], tmp_path / "run")
    found = our_runs.train_steps(config, 4)
    check_parts(found, TRAINING_PARTS)
    assert trainer.Trainer.__name__ == "Trainer", "the run's own is back in its place"
    # the run logged, every second step, and took those that are compared and those that are timed
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    # the losses of two steps, in the middle of which the weights have changed
    losses = found.losses
    assert len(losses) == our_runs.JUDGED == 2
    assert sum(losses) / 2 == pytest.approx(json.loads(lines[0])["loss"], rel=1e-6)
    rival = textbook_runs.TextbookRun(
        shape, files["cached"], config, build_run(config, 0, 1), CPU, torch.float32
    )
    theirs = rival(4)
    check_parts(theirs, TRAINING_PARTS - {"logging"})
    assert losses == pytest.approx(theirs.losses, rel=1e-5)
    assert rival.taken == 6
    other = our_runs.train_steps(config_of(shape, files["cached"], tmp_path / "b", seed=1), 0)
    assert other.parts == {}
    far = abs(other.losses[0] - losses[0]) / losses[0]
    assert far > 10 * bench_end_to_end.FIRST_LOSS[torch.float32], "other weights are noticed"


def test_a_run_on_pictures_has_the_encoder_as_a_part_and_ends_its_workers(
    files: dict[str, RunFiles], tmp_path: Path
) -> None:
    shape = PICTURE_RUNS["tiny"]
    assert shape.workers == 1
    config = config_of(shape, files["pictures"], tmp_path / "run")
    before = set(psutil.Process().children(recursive=True))
    found = our_runs.train_steps(config, 2)
    check_parts(found, TRAINING_PARTS | {"image encoder"})
    assert set(psutil.Process().children(recursive=True)) <= before
    rival = textbook_runs.TextbookRun(
        shape, files["pictures"], config, build_run(config, 0, 1), CPU, torch.float32
    )
    check_parts(rival(2), (TRAINING_PARTS | {"image encoder"}) - {"logging"})


def test_the_parts_of_captioning_a_folder_add_up(tmp_path: Path) -> None:
    both = bench_end_to_end.Captioners(tmp_path, CAPTION_SHAPES["tiny_opt"], 1, CPU)
    found, times = both.our_call()
    expected, their_times = both.their_call()()
    assert found == expected
    assert len(found) == len(both.pictures) == 10
    for each in (times, their_times):
        whole = each.pop("")
        assert set(each) == {"data", "image encoder", "Q-Former", "language model", REST}
        assert sum(each.values()) == pytest.approx(whole, rel=1e-9)
    assert "generate" not in vars(both.ours.model), "the model's own is back in its place"


def test_the_textbook_draws_negatives_by_similarity_and_never_its_own(
    files: dict[str, RunFiles], tmp_path: Path
) -> None:
    config = config_of(CACHED_RUNS["tiny"], files["cached"], tmp_path / "run")
    textbook = TextbookStage1(build_run(config, 0, 1).model)
    texts = nn.functional.normalize(torch.randn(6, 8, generator=torch.manual_seed(0)), dim=-1)
    # each image resembles the text after the next
    images = texts.roll(-2, 0)[:, None].expand(-1, 3, -1)
    drawn = [textbook.drawn_negatives(images, texts) for _ in range(50)]
    numbers = torch.arange(6)
    for of_text, of_image in drawn:
        assert not (of_text == numbers).any()
        assert not (of_image == numbers).any()
    near = torch.stack([of_image == (numbers + 2) % 6 for _, of_image in drawn]).float().mean()
    assert near > 0.9
    back = torch.stack([of_text == (numbers - 2) % 6 for of_text, _ in drawn]).float().mean()
    assert back > 0.9


def whole_run() -> ResultFile:
    """A result of a run: times, rates and shares."""
    ours: dict[str, Any] = {"median_s": 0.5, "q1_s": 0.5, "q3_s": 0.5, "peak_bytes": None}
    ours |= {"pairs_per_s": 16.0, "reading_s": 0.025}
    ours |= {"phases_s": {"data": 0.1, "forward": 0.4}, "shares": {"data": 0.2, "forward": 0.8}}
    cells = {"cached[a]": {"contenders": {"blip2fast": ours, "textbook": {"failed": "wrong"}}}}
    return ResultFile("end_to_end", "m", "2026-01-02", [], cells)


def test_results_of_a_run_have_its_rate_and_its_shares() -> None:
    file = whole_run()
    lines = [line.strip() for line in summary.rivals_table([file]).splitlines()]
    assert "blip2fast: 16 pairs/s; a batch read in 25.0 ms; data 20 %, forward 80 %" in lines
    assert any(line.startswith("cached[a]") and "500 ms" in line for line in lines)
    cells = file.cells
    assert (
        "500 ms): data 100 ms, forward 400 ms: 16 pairs/s, a batch read in 25.0 ms |"
        in tables._time_table(cells)
    )
    assert tables._shares_table(cells).splitlines() == [
        "| share of the time | data | forward |",
        "|---|---:|---:|",
        "| cached[a], blip2fast | 20 % | 80 % |",
    ]
