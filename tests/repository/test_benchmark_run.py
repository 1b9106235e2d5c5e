"""The plain benchmark command: what it times, its lines, its table, its end in time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import selection
import summary
from progress import Progress, clock_time
from results import ResultFile

ROOT = Path(__file__).parents[2]
RUNS = """
import sys, pytest
for line in {runs!r}:
    print("@@@", flush=True)
    pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", "--benchmark-only", *line])
"""


@pytest.fixture(scope="module")
def runs() -> list[str]:
    """What pytest prints: the plain selection, all, by -k, by name, and without time."""
    everything = ["benchmarks", "--collect-only"]
    named = "benchmarks/bench_itc.py::bench_itc[tiny-fp32-train]"
    commands = [
        everything,
        [*everything, "--full"],
        [*everything, "-k", "itc and n256"],
        [named, "--collect-only"],
        ["benchmarks", "-k", "bias_gelu and r1000", "--time-limit=0"],
    ]
    # a worker of a parallel run says so in its environment, and nothing is timed there
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-c", RUNS.format(runs=commands)],
        cwd=ROOT,
        env=alone | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    _, *printed = done.stdout.split("@@@\n")
    assert len(printed) == len(commands), done.stderr
    return printed


def cells(printed: str) -> list[tuple[str, str]]:
    return [selection.cell_of(line) for line in printed.splitlines() if "::" in line]


def test_the_plain_command_times_what_is_chosen_in_its_order(runs: list[str]) -> None:
    plain, everything, by_expression, by_name, _ = map(cells, runs)
    assert plain == list(selection.chosen(on_gpu=False))
    assert {suite for suite, _ in plain} == {suite for suite, _ in everything}, "of every suite"
    on_gpu = set(selection.chosen(on_gpu=True))
    assert on_gpu <= set(everything), "no name is stale"
    assert set(plain) < set(everything) - on_gpu
    assert by_expression == [("itc", f"itc[n256-fp32-{x}]") for x in ("forward", "train")]
    assert by_name == [("itc", "itc[tiny-fp32-train]")], "what is named runs, chosen or not"
    assert "48 benchmarks, on 2 cores about 7:" in runs[0]
    assert "about" not in runs[1].splitlines()[0], "nobody knows how long all take"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_plain_command_has_time_to_spare(on_gpu: bool) -> None:
    assert sum(selection.chosen(on_gpu).values()) < 0.8 * selection.LIMIT_S


def test_what_would_end_too_late_is_left_out(runs: list[str]) -> None:
    first, second, *_ = [line for line in runs[-1].splitlines() if line.startswith("[")]
    assert re.fullmatch(
        r"\[1 of 2; 0:\d\d gone, about 0:04 left\] "
        r"glue bias_gelu\[r1000-fp32\]: 0\.0 s, skipped",
        first,
    )
    assert second.startswith("[2 of 2; 0:")
    assert "2 skipped" in runs[-1]
    assert "no time left: --time-limit SECONDS gives more" in runs[-1]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_says_which_of_how_many_and_what_is_left() -> None:
    clock = Clock()
    run = Progress([10.0] * 5 + [100.0] * 5, limit=1200.0, before=4.0, clock=clock)
    run.begin()
    assert run.line("itc one") == "[ 1 of 10; 0:04 gone, about 9:10 left] itc one"
    clock.now += 30.0
    run.end()
    run.begin()
    # ten seconds took thirty, with ten more to weigh: twice as slow
    assert run.line("two") == "[ 2 of 10; 0:34 gone, about 18:00 left] two"
    assert run.fits()
    clock.now += 1150.0
    assert not run.fits(), "1184 s gone, and 20 more are needed"
    run.end(ran=False)
    assert run.pace() == 2.0, "one that was left out says nothing"


@pytest.mark.parametrize(
    ("seconds", "text"), [(6.6, "0:07"), (59.7, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def result(**cells: dict[str, Any]) -> ResultFile:
    held = {
        name.replace("__", "["): {"contenders": contenders} for name, contenders in cells.items()
    }
    return ResultFile("itc", "a-machine", "2026-01-02", [], held)


def timed(**seconds: float) -> dict[str, Any]:
    return {name.replace("_", " "): {"median_s": value} for name, value in seconds.items()}


def test_the_table_has_a_row_a_rival_and_marks_losses() -> None:
    won = timed(blip2fast_auto=0.0015, blip2fast_cuda=0.001, LAVIS=0.4, torch=0.003)
    won["blip2fast auto"]["of_floor"] = 0.52
    lost = timed(blip2fast_auto=0.002, blip2fast_cuda=0.001, torch=0.0015)
    alone = timed(ours=23e-6)
    lines = summary.rivals_table([result(won=won, lost=lost, alone=alone)]).splitlines()
    shown = [line.split() for line in lines]
    assert shown[0] == ["ours", "rival", "ratio", "of", "floor"]
    assert shown[1] == ["itc"]
    # what a user gets, not the best of ours
    assert shown[2] == ["won", "1.50", "ms", "auto", "3.00", "ms", "torch", "2.00", "52", "%"]
    assert shown[3] == ["400", "ms", "LAVIS", "266.67"]
    assert shown[4] == ["lost", "2.00", "ms", "auto", "1.50", "ms", "torch", "0.75", "slower"]
    assert shown[5] == ["alone", "23.0", "µs", "ours", "none"], "nothing where the floor is missing"
    assert lines[7:] == ["slower than the best rival in 1 of 2:", "  itc lost: 0.75"]
    (_, *_, said) = summary.rivals_table([result(won=won)]).splitlines()
    assert said == "ours is the quickest in all 1 that have a rival"


def test_the_table_has_what_failed_or_does_not_run() -> None:
    found = timed(blip2fast_cuda=0.002, torch=0.003)
    found["blip2fast triton"] = {"failed": "wrong: 1e9"}
    found["xformers"] = {"does_not_run": "device=cpu"}
    nothing = {"blip2fast": {"does_not_run": "out of memory"}, **timed(torch=0.1)}
    text = summary.rivals_table([result(a=found, b=nothing)])
    assert "    blip2fast triton: failed: wrong: 1e9" in text
    assert "  xformers (1): device=cpu" in text
    assert "  blip2fast (1): out of memory" in text
    row = next(line for line in text.splitlines() if line.startswith("  b"))
    assert row.split() == ["b", "does", "not", "run", "100", "ms", "torch"]


def test_the_table_has_peaks_where_there_is_no_time_and_shares_of_a_profile() -> None:
    peaks = {"blip2fast": {"peak_bytes": 2e9}, "textbook": {"peak_bytes": 4e9}}
    shares = {"blip2fast": {"shares": {"gemm": 0.614, "gaps": 0.386}}}
    lines = summary.rivals_table([result(memory=peaks, shares=shares)]).splitlines()
    assert lines[2].split() == ["memory", "2.00", "GB", "4.00", "GB", "textbook", "2.00"]
    assert lines[3] == "  shares: blip2fast: gemm 61 %, gaps 39 %"
