"""The measuring: clocks, agreement before time, floors, shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2fast.kernels.qformer_attention import reference

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import machines
import profiling
import stage1_contenders
from attention_inputs import SelfInputs, cross_work, self_work, visible_pairs
from comparing import Contender, Race, Work, plain
from machines import KNOWN, Ceilings, command
from results import reduce
from shapes import CROSS_SHAPES, SELF_SHAPES, STAGE1_SHAPES, spread_lengths
from timing import PhaseSampler, Sampler, Spread, WallClock, input_sets, peak_bytes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H200 = Ceilings(KNOWN[0].flops_per_s["bfloat16"], KNOWN[0].bytes_per_s, "known")


class FakeTime:
    """A clock that stands still, but for what calls add to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def test_wall_clock_takes_each_call_alone() -> None:
    time = FakeTime()
    laps = WallClock(time).laps([time.takes(1), time.takes(3), time.takes(2)])
    assert laps == [1, 3, 2]


@pytest.mark.parametrize(("per_call", "expected"), [(1, 0.25), (5, 0.05)])
def test_a_sample_is_the_mean_of_one_computation(per_call: int, expected: float) -> None:
    time = FakeTime()
    calls = [time.takes(0.125), time.takes(0.375)]
    sampler = Sampler(WallClock(time), calls, per_call, sample_seconds=5)
    before = time.now
    assert sampler.sample() == {"": pytest.approx(expected)}
    assert time.now - before == pytest.approx(5), "a sample is as long as was asked"


def test_a_long_call_is_made_once_a_sample() -> None:
    time = FakeTime()
    sampler = Sampler(WallClock(time), [time.takes(7)], sample_seconds=1)
    before = time.now
    assert sampler.sample() == {"": 7}
    assert time.now - before == 7


def test_phases_are_timed_apart_and_together() -> None:
    time = FakeTime()
    phases = {"forward": time.takes(1), "backward": time.takes(2), "optimiser": time.takes(0.5)}
    sample = PhaseSampler(WallClock(time), phases).sample()
    assert sample == {"": 3.5, "forward": 1, "backward": 2, "optimiser": 0.5}


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4, 5)
    assert Spread.of([2.0]) == Spread(2, 2, 2, 1)


def test_one_input_set_on_a_cpu() -> None:
    assert input_sets(1, CPU) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_peak_is_what_a_call_held_at_once() -> None:
    size = 64 << 20

    def two_after_each_other() -> None:
        for _ in range(2):
            torch.ones(size, dtype=torch.uint8)

    peak = peak_bytes(two_after_each_other, CPU)
    assert peak is not None
    # Linux counts resident pages in batches: the figure is a few dozen pages off either way
    assert 0.99 * size < peak < 1.25 * size


def run_race(
    providers: dict[str, Callable[[Tensor], Contender]], timed: bool = True
) -> Race[Tensor]:
    def agree(x: Tensor, result: Tensor) -> None:
        if not torch.equal(result, 2 * x):
            raise AssertionError("not twice the input")

    race = Race(lambda seed: torch.tensor([seed + 1.0]), agree, CPU, timed)
    for name, provider in providers.items():
        race.enter(name, provider)
    return race


def raises(error: BaseException) -> Callable[[Tensor], Contender]:
    def call(x: Tensor) -> Tensor:
        raise error

    return plain(call)


def test_only_who_agrees_is_timed() -> None:
    race = run_race(
        {
            "right": plain(lambda x: x + x),
            "wrong": plain(lambda x: 3 * x),
            "refuses": raises(NotImplementedError("needs\n  a GPU")),
            "not there": raises(ImportError("No module named 'xformers'")),
            "breaks": raises(RuntimeError("illegal access")),
            "too large": raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")),
        }
    )
    assert [entry.name for entry in race.running()] == ["right"]
    assert race.failures() == (
        "wrong: wrong: not twice the input\nbreaks: RuntimeError: illegal access"
    )
    race.entries[0].take()
    results = {entry.name: entry.result(None, None) for entry in race.entries}
    assert results["right"]["median_s"] > 0
    assert results["refuses"] == {"does_not_run": "needs a GPU"}
    assert results["not there"] == {"does_not_run": "No module named 'xformers'"}
    assert results["too large"] == {"does_not_run": "out of memory"}
    assert results["wrong"] == {"failed": "wrong: not twice the input"}
    with pytest.raises(ValueError, match="wrong does not run"):
        race.entries[1].take()


def test_the_judged_form_is_looked_at_and_the_other_is_timed() -> None:
    calls: list[str] = []

    def named(name: str, factor: int) -> Callable[[Tensor], Contender]:
        def call(x: Tensor) -> Tensor:
            calls.append(name)
            return factor * x

        return plain(call)

    race = Race(
        lambda seed: torch.ones(1), lambda x, y: torch.testing.assert_close(y, 2 * x), CPU, True
    )
    race.enter("random", named("timed", 5), judged=named("judged", 2))
    assert race.failures() == ""
    assert calls[0] == "judged"
    assert set(calls[1:]) == {"timed"}


def test_without_timing_contenders_are_still_looked_at() -> None:
    race = run_race({"right": plain(lambda x: x + x), "wrong": plain(lambda x: x)}, timed=False)
    assert race.running() == []
    assert "not twice" in race.failures()


def test_rounds_share_the_time() -> None:
    race = run_race({"a": plain(lambda x: x + x), "b": plain(lambda x: 2 * x)})
    # the round that tells how long one takes counts
    assert race.rounds(seconds=0.0, least=5) == 4
    assert race.rounds(seconds=1e9, least=5, most=40) == 39
    assert race.rounds(seconds=0.0, least=3, long_round=0.0) == 1
    assert race.rounds(seconds=0.0, least=3, long_round=60.0) == 2
    assert all(len(entry.samples) == 4 for entry in race.entries)


def test_floor_is_the_longer_of_two_times() -> None:
    rates = Ceilings(flops_per_s=10, bytes_per_s=2, source="")
    assert Work(flops=100, bytes=4).floor(rates) == (10, "compute")
    assert Work(flops=10, bytes=4).floor(rates) == (2, "memory")


@pytest.mark.parametrize(
    ("work", "expected_us"),
    [
        (self_work(SELF_SHAPES["64x64"], 2, train=False), 23),
        (self_work(SELF_SHAPES["64x64"], 2, train=True), 23 + 47),
        (cross_work(CROSS_SHAPES["32x257"], 2, train=False), 53),
        (cross_work(CROSS_SHAPES["32x257"], 2, train=True), 53 + 106),
    ],
)
def test_floors_of_attention_on_an_h200(work: Work, expected_us: float) -> None:
    floor_s, bound = work.floor(H200)
    assert bound == "memory"
    assert 1e6 * floor_s == pytest.approx(expected_us, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "stage1_pass1_b16", "stage1_pass2_b16", "64x64_b16"])
def test_visible_pairs_are_those_of_the_mask(name: str) -> None:
    inputs = SelfInputs(SELF_SHAPES[name], torch.float32, CPU, train=False, seed=0)
    visible, _ = reference.visible_pairs(inputs.layout)
    assert visible_pairs(SELF_SHAPES[name]) == int(visible.sum())


def test_the_work_of_a_step_is_counted_once_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = STAGE1_SHAPES["scenes"]
    found = stage1_contenders.flops_of_a_pair(shape, CPU)
    assert found > 1e7
    monkeypatch.setattr(stage1_contenders, "make_models", None)
    again = replace(shape, batch=8, headline=True)
    assert stage1_contenders.flops_of_a_pair(again, CPU) == found


def test_caption_lengths_keep_their_mean() -> None:
    lengths = spread_lengths(13, mean=12, longest=32)
    assert sum(lengths) == 13 * 12
    assert (min(lengths), max(lengths)) == (6, 18)
    assert spread_lengths(3, mean=32, longest=32) == [32, 32, 32]


def test_known_machines_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    machines.ceilings.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    found = machines.ceilings(torch.device("cuda"), torch.bfloat16)
    machines.ceilings.cache_clear()
    assert found == Ceilings(790e12, 4.3e12, "known for NVIDIA H200")


def test_command_leaves_out_where_results_went() -> None:
    given = ["-q", f"{ROOT}/benchmarks/bench_itc.py", "--benchmark-json", "/tmp/x", "-k", "a b"]
    assert command([*given, "--bench-commit=1"]) == "pytest -q benchmarks/bench_itc.py -k 'a b'"


def test_shares_name_kernels_and_gaps() -> None:
    names = [
        ("sm90_xmma_gemm_bf16", 40.0),
        ("_qformer_attention_fwd_kernel", 20.0),
        ("_itc_sweep_kernel", 10.0),
        ("unknown", 5.0),
    ]
    found = profiling.shares(names, total=100.0)
    expected = {"gemm": 0.4, "gaps": 0.25, "attention": 0.2, "itc": 0.1, "rest": 0.05}
    assert found == pytest.approx(expected)
    top = profiling.longest([*names, ("unknown", 50.0)], most=2)
    assert top == {"unknown": [2, 55.0], "sm90_xmma_gemm_bf16": [1, 40.0]}


@pytest.mark.slow
def test_a_timed_suite_gives_a_result_file(tmp_path: Path) -> None:
    target = tmp_path / "raw.json"
    options = ["-k", "bias_gelu and tiny-fp32", "--full"]
    options += ["--benchmark-only", "--benchmark-max-time=0.01"]
    suite = str(ROOT / "benchmarks" / "bench_glue.py")
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    # a worker of a parallel run says so in its environment, and nothing is timed there
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*pytest_command, suite, *options, f"--benchmark-json={target}"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[1 of 1; 0:" in done.stdout
    assert "glue\n  bias_gelu[tiny-fp32]" in done.stdout
    assert "Name (time in" not in done.stdout, (
        "the plugin's table, whose times are of one contender"
    )
    (file,) = reduce(json.loads(target.read_text()))
    (cell,) = file.cells.values()
    assert cell["contenders"]["blip2fast auto"]["median_s"] > 0
    assert cell["contenders"]["torch"]["of_floor"] > 0
    assert str(ROOT) not in json.dumps(file.runs)
