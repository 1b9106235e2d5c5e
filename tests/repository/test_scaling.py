"""Growth of costs: counts, fits, the arithmetic from there to many GPUs, tables and plots of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cache_index
import extrapolation
import extrapolation_tables
import plans
import report
import scaling
import scaling_tables
import scaling_times
import torch
from fits import Fit
from shapes import STAGE1_SHAPES

from blip2fast.data.feature_cache import FeatureCache

ROOT = Path(__file__).parents[2]
# of `scaling_counts.BASE`
PAIRS, QUERIES, TOKENS, WIDTH, FEATURES, LAYERS = 8, 8, 17, 64, 32, 3
COUNT = """
import json, sys
sys.path[:0] = ["benchmarks", "."]
import scaling_counts as counts
import torch
torch.set_num_threads(1)
found = {"sweeps": {sweep.size: counts.sweep_counts(sweep) for sweep in counts.SWEEPS}}
found["alone"] = counts.step(counts.BASE)["flops"]
found["two"] = counts.processes(2, (1,))
from blip2fast.ops import itc_loss
image, text = torch.randn(6, 4, 8), torch.randn(6, 8)
try:
    with counts.counted_flops():
        itc_loss(image, text, torch.tensor(0.07), negatives="none", impl="reference")
    found["elsewhere"] = ""
except NotImplementedError as error:
    found["elsewhere"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """Counts in a process of their own, whose products PyTorch's own linear computes."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The counts that the page is made of."""
    found = report.newest_run("scaling")
    assert found is not None
    return found


def test_fits_have_the_terms_that_they_are_given() -> None:
    points = {x: 7 + 3 * x + 2 * x * x for x in (1, 4, 9, 20)}
    fit = Fit.of(points, (0, 1, 2))
    assert fit.coefficients == pytest.approx((7, 3, 2))
    assert fit.residual < 1e-12
    assert fit.at(1000) == pytest.approx(2_003_007)
    without_square = Fit.of(points, (0, 1))
    assert without_square.residual > 0.01
    assert without_square.distance(1000, 2_003_007) > 0.5
    with pytest.raises(ValueError, match="3 points for 3 terms"):
        Fit.of({1: 1.0, 2: 2.0, 3: 3.0}, (0, 1, 2))


def test_counted_costs_grow_as_the_mathematics_says(counted: dict[str, Any]) -> None:
    """Each fit meets a point that it did not see, to the last FLOP and byte."""
    assert set(counted["sweeps"]) == set(scaling_tables.MEANINGS)
    for size, sweep in counted["sweeps"].items():
        for name, cost in sweep["costs"].items():
            fit, expected = scaling_tables.fit_of(cost, sweep["held_out"])
            assert fit.residual < 1e-9, (size, name)
            assert round(fit.at(sweep["held_out"])) == expected, (size, name)


def coefficients(counted: dict[str, Any], size: str, cost: str) -> list[int]:
    sweep = counted["sweeps"][size]
    fit, _ = scaling_tables.fit_of(sweep["costs"][cost], sweep["held_out"])
    return [round(x) for x in fit.coefficients]


def test_counted_flops_are_those_of_the_formulas(counted: dict[str, Any]) -> None:
    """Inside the fused operators too, where PyTorch's counter does not look."""
    product = 2 * QUERIES * FEATURES  # of an image with a text; backward gathers
    assert coefficients(counted, "B", "flops")[2] == product
    assert coefficients(counted, "N", "flops") == [product]
    assert coefficients(counted, "N", "saved_bytes")[2] == 4 + 1, "a similarity and its query"
    keys_values = 2 * 2 * PAIRS * WIDTH * 2 * WIDTH * LAYERS
    product_of_attention = 2 * (4 * PAIRS * QUERIES) * WIDTH * LAYERS
    attention = coefficients(counted, "S", "flops")[1] - keys_values
    # 2 products forward, 4 backward, or 5 where it computes the scores again
    assert attention in (6 * product_of_attention, 7 * product_of_attention)
    assert coefficients(counted, "T", "flops")[2] > 0
    assert "itc_sweep': 1}: the products of 0 of them were counted" in counted["elsewhere"]


def test_counted_bytes_of_two_processes_are_those_of_the_formula(counted: dict[str, Any]) -> None:
    for stage, found in counted["two"].items():
        expected = scaling_tables.expected(2, int(stage), found["parameters"])
        for kind, size in scaling_tables.handed(found["sent_bytes"]).items():
            # ids, lengths, padding and flags are left out
            assert 0 <= size - expected[kind] < 300, (stage, kind)
        negatives = extrapolation.negatives_flops(LAYERS, TOKENS, WIDTH, WIDTH)
        contrast = 2 * QUERIES * FEATURES * PAIRS
        assert found["flops"] == counted["alone"] + PAIRS * (negatives + contrast)
    assert list(counted["two"]) == ["1"]


def test_storage_is_that_of_known_sizes() -> None:
    fp32, bf16, int8, pooled, _ = extrapolation.STORED
    assert bf16.terabytes(10**6) == pytest.approx(0.7237, abs=1e-4)
    assert bf16.terabytes() == pytest.approx(93.36, abs=0.01)
    assert fp32.image_bytes == 2 * bf16.image_bytes
    assert int8.image_bytes == bf16.image_bytes // 2 + 4 * 257
    assert pooled.image_bytes == 65 * 1408 * 2
    assert extrapolation.read_bytes_per_s(1000) == pytest.approx(0.7237e9, rel=1e-4)
    assert extrapolation.index_bytes(100, 10) == 8 * (100 + 8 * 10)
    assert extrapolation.images_by_index(900) == pytest.approx(1e9)


def test_stored_features_take_what_a_cache_of_them_takes(tmp_path: Path) -> None:
    features = torch.zeros(1, 257, 1408)
    for stored, dtype in zip(extrapolation.STORED, ("float32", "bfloat16", "int8"), strict=False):
        with FeatureCache.create(tmp_path / dtype, ["a"], 257, 1408, dtype) as writer:
            writer.write(0, features)
        files = (tmp_path / dtype).glob("*.bin")
        assert sum(file.stat().st_size for file in files) == stored.image_bytes


def test_hours_are_steps_times_the_slower_of_host_and_gpu() -> None:
    gpu = replace(extrapolation.GPUS[0], flops_per_s=200e12)
    assert extrapolation.Speed(0.5).step_s(50e12, gpu) == pytest.approx(0.5)
    assert extrapolation.Speed(0.5, host_s=0.7).step_s(50e12, gpu) == 0.7
    assert extrapolation.hours(7200, 0.5) == 1
    assert extrapolation.busy_share(0.1, 0.75) == pytest.approx(0.4)
    stage1 = extrapolation.STAGE1
    assert stage1.samples == 420_000_000
    assert stage1.steps_on(16) == stage1.steps
    assert stage1.steps_on(512) == 7812.5
    assert extrapolation.samples_per_s(stage1, 6) == pytest.approx(810.2, abs=0.1)


def test_contrast_is_the_share_that_it_is_solved_for() -> None:
    N = extrapolation.pairs_at_share(120e9, 0.1)
    rest = extrapolation.pair_flops(120e9, 2, 0)
    share = extrapolation.contrast_flops(1) * N / (rest + extrapolation.contrast_flops(1) * N)
    assert share == pytest.approx(0.1)


def test_a_ring_leaves_a_machine_once_and_an_all_to_all_for_every_gpu() -> None:
    leaving = extrapolation.leaving_a_machine
    assert leaving("gradients", 100, 8) == leaving("negatives", 100, 8) == 0
    assert leaving("gradients", 100, 16) == pytest.approx(2 * 100 * 15 / 16)
    assert leaving("texts", 100, 16) == 1500
    assert leaving("negatives", 100, 16) == pytest.approx(8 * 100 / 2)
    handed = extrapolation.handed_bytes(16, 105, 1000, 1)
    total = sum(leaving(name, size, 16) for name, size in handed.items())
    assert extrapolation.network_s(handed, 16, 1e9) == pytest.approx(total / 1e9)
    alone = extrapolation.handed_bytes(1, 105, 1000, 1)
    assert alone == dict.fromkeys(handed, 0) | {"gradients": 2000}


def test_the_index_of_a_cache_is_weighed_in_a_process_of_its_own() -> None:
    (found,) = cache_index.measure((20_000,)).values()
    assert 60 < found["bytes"] / 20_000 < 1000
    assert found["seconds"] > 0
    assert 0 < found["copied_bytes"] < found["bytes"], "a worker shares what it has not looked up"


def test_plans_take_settings(result: dict[str, Any]) -> None:
    """As the counts plan a recipe by ZeRO stage; AdamW's states alone are divided by stage 1."""
    recipe, cluster = ROOT / "configs" / "vitg_stage1.yaml", plans.Cluster()
    with plans.published_folder() as models:
        planned = plans.plan(recipe, models, cluster, ["zero_stage=0"])
    assert planned == result["plans"]["vitg_stage1, 16, 0"]
    divided = result["plans"]["vitg_stage1, 16, 1"]["options"][0]["device"]["optimiser"]
    assert divided == planned["options"][0]["device"]["optimiser"] // 16


@pytest.fixture(scope="module")
def times() -> dict[str, Any]:
    """Times of tiny sizes, as a result file has them."""
    scenes = replace(STAGE1_SHAPES["scenes"], image_tokens=9)
    sweeps = {
        "N": scaling_times.TimedSweep((8, 12, 16, 24), scaling_times.contrast),
        "B": scaling_times.TimedSweep(
            (4, 6, 8), lambda x: scaling_times.step(replace(scenes, batch=x))
        ),
    }
    run = {"own_core": False, "load_average": 1.0, "threads": 1, "device": "a CPU"}
    run |= {"date": "2026-01-02", "versions": {"torch": "2.13"}, "commit": "0123456789"}
    run |= {"command": "benchmarks/scaling.py times"}
    values = {size: scaling_times.measure(sweep, rounds=2) for size, sweep in sweeps.items()}
    found = {size: {"conditions": run, "values": x} for size, x in values.items()}
    read: dict[str, Any] = json.loads(json.dumps(found))
    return read


def test_timed_sweeps_have_both_contenders_at_every_size(times: dict[str, Any]) -> None:
    assert list(times["N"]["values"]) == ["8", "12", "16", "24"]
    for found in times["B"]["values"].values():
        assert list(found) == [scaling_times.OURS, scaling_times.TEXTBOOK]
        assert all(x["median_s"] > 0 and x["peak_bytes"] >= 0 for x in found.values())
        assert all(x["rounds"] == 2 for x in found.values())


def test_the_table_of_times_shows_where_ours_is_slower(times: dict[str, Any]) -> None:
    found = {"conditions": times["N"]["conditions"], "values": {}}
    for pairs, ours in ((8, 0.003), (16, 0.002), (32, 0.002)):
        each = {"median_s": 125e-6 * pairs, "peak_bytes": 2_000_000, "rounds": 5}
        of_ours = each | {"median_s": ours, "peak_bytes": 1_000_000}
        found["values"][str(pairs)] = {"ours": of_ours, "rival": each}
    rows = scaling_tables.times({"B": found}).splitlines()
    assert rows[4] == "| 8 | 3.00 ms | 1.00 ms | **0.33** | 1.0 MB | 2.0 MB | 2.00 |"
    assert rows[6].startswith("| 32 | 2.00 ms | 4.00 ms | 2.00 |")
    assert "125 µs B (points within 0 %)" in rows[-1]
    assert "a core shared with other work, load 1.0" in rows[-1]


def test_the_plot_is_that_of_the_times(
    times: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scaling.svg"
    monkeypatch.setattr(scaling_tables, "PLOT", path)
    assert not scaling_tables.is_current(times)
    scaling_tables.draw(times, path)
    assert scaling_tables.is_current(times)
    drawn = path.read_text()
    scaling_tables.draw(times, path)
    assert path.read_text() == drawn
    times = json.loads(json.dumps(times))
    times["B"]["values"]["4"]["textbook"]["median_s"] *= 2
    assert not scaling_tables.is_current(times)


def test_a_stale_plot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAGES", ())
    assert report.check() == []
    monkeypatch.setattr(scaling_tables, "digest", lambda result: "another")
    assert report.check() == ["docs/scaling.svg"]


def test_the_page_says_what_the_arithmetic_gives(result: dict[str, Any]) -> None:
    """A few of its numbers, worked out by hand from those that go in."""
    k = extrapolation_tables.known(result)
    pair = k.pair_flops + 4 * 257 * 1408 * 12 * 768 + 6 * 32 * 256 * 1680
    step = 105 * pair / (0.5 * 265e12)
    hours = extrapolation_tables.stage1_hours(result)
    assert f"{1e3 * step:.0f} ms: {250_000 * step / 3600:.1f} h" in hours
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert hours in page
    assert f"{129e6 * k.name_bytes / 1e9:.0f} GB a process" in page


def test_a_size_that_is_not_timed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "times", "X"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "size 'X': expected one of N, B, S" in capsys.readouterr().err
