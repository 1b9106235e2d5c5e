"""Result files, the tables and plots made of them, and the check that these are up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ablations
import demo_seeds
import fingerprint
import memory_tables
import plans
import report
import roofline
import tables
import training_tables
from results import ResultFile, merge, newest, reduce, slug

from blip2fast.demo.table import FLOORS


def raw(name: str, date: str, times: dict[str, float], device: str = "AMD EPYC") -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it."""
    contenders: dict[str, Any] = {
        who: {
            "median_s": time,
            "q1_s": time,
            "q3_s": time,
            "rounds": 5,
            "peak_bytes": 2_000_000,
            "timed_by": "wall clock",
            "flops_per_s": 1e9 / time,
            "bytes_per_s": 1e6 / time,
            "of_floor": 1e-3 / time,
        }
        for who, time in times.items()
    }
    contenders["xformers"] = {"does_not_run": "device=cpu"}
    conditions = {"device": device, "processor": "AMD EPYC", "cores": 2, "threads": 2, "cuda": None}
    conditions |= {"python": "3.12", "versions": {"torch": "2.13"}, "commit": "0123456789"}
    conditions |= {"command": "pytest x", "date": date, "dtype": "bfloat16"}
    info = {
        "conditions": conditions,
        "contenders": contenders,
        "work": {"flops": 1e9, "bytes": 1e6, "floor_s": 1e-3, "bound": "compute"},
        "ceilings": {"flops_per_s": 1e12, "bytes_per_s": 1e10, "source": "measured"},
    }
    full = f"benchmarks/bench_itc.py::bench_{name}"
    return {"name": f"bench_{name}", "fullname": full, "extra_info": info, "stats": {}}


def result(*benchmarks: dict[str, Any]) -> ResultFile:
    (file,) = reduce({"benchmarks": list(benchmarks)})
    return file


def test_reduced_results_keep_conditions_and_contenders() -> None:
    file = result(raw("itc[a]", "2026-01-02", {"blip2fast cuda": 0.002, "torch": 0.004}))
    assert file.path.name == "2026-01-02_itc_amd-epyc.json"
    assert file.runs[0]["commit"] == "0123456789"
    assert "dtype" not in file.runs[0]
    assert file.cells["itc[a]"]["dtype"] == "bfloat16"
    assert set(file.cells["itc[a]"]["contenders"]) == {"blip2fast cuda", "torch", "xformers"}
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    unrelated = {"name": "x", "fullname": "benchmarks/bench_x.py::x", "extra_info": {}}
    assert reduce({"benchmarks": [unrelated]}) == []


def test_a_later_run_of_a_day_replaces_its_cells_alone(tmp_path: Path) -> None:
    times = {"blip2fast cuda": 0.002, "torch": 0.004}
    old = result(raw("itc[a]", "2026-01-02", times), raw("itc[b]", "2026-01-02", times))
    again = raw("itc[b]", "2026-01-02", {"blip2fast cuda": 0.003})
    again["extra_info"]["conditions"]["commit"] = "fedcba"
    path = old.write(tmp_path)
    assert result(again).write(tmp_path) == path
    held = ResultFile.read(path)
    assert [held.runs[held.cells[n]["run"]]["commit"] for n in ("itc[a]", "itc[b]")] == [
        "0123456789",
        "fedcba",
    ]
    assert held.cells["itc[b]"]["contenders"]["blip2fast cuda"]["median_s"] == 0.003
    assert len(merge(result(again), result(again)).runs) == 1


def test_tables_take_the_newest_of_each_machine(tmp_path: Path) -> None:
    for date in ("2026-01-02", "2025-12-31"):
        result(raw("itc[a]", date, {"blip2fast cuda": 1.0})).write(tmp_path)
    other = raw("itc[a]", "2025-01-01", {"blip2fast cuda": 1.0}, device="NVIDIA H200")
    other["extra_info"]["conditions"]["cuda"] = "13.0"
    result(other).write(tmp_path)
    (tmp_path / "2027-01-01_demo.json").write_text("{}")
    found = [(file.machine, file.date) for file in newest(tmp_path.glob("*"), "itc")]
    assert found == [("h200", "2025-01-01"), ("amd-epyc", "2026-01-02")]
    with pytest.raises(ValueError, match="DATE_SUITE_MACHINE"):
        ResultFile.read(tmp_path / "2027-01-01_demo.json")


def test_tables_show_where_ours_is_slower_and_who_does_not_run() -> None:
    ours = {"blip2fast auto": 0.0015, "blip2fast cuda": 0.002, "blip2fast reference": 0.0001}
    text = tables.suite_table(
        result(
            raw("itc[won]", "2026-01-02", ours | {"torch": 0.004, "LAVIS": 0.4}),
            raw("itc[lost]", "2026-01-02", ours | {"torch": 0.001}),
        )
    )
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "itc[" in line[:20]}
    assert "cuda 2.00 ms" in lines["itc[won]"], "neither auto nor the reference is the best of ours"
    assert "| 2.00 | 2.67 |" in lines["itc[won]"], "against the best rival, and auto against it"
    assert "50 %" in lines["itc[won]"]
    assert "LAVIS 400 ms" in lines["itc[won]"]
    assert "Slower than the best rival in 1 of 2: `itc[lost]` 0.50." in text
    assert "xformers (2 rows): device=cpu" in text
    assert "commit 01234567" in text


def test_a_page_begins_with_what_is_read_at_a_glance() -> None:
    file = result(
        raw("itc[won]", "2026-01-02", {"blip2fast cuda": 0.002, "torch": 0.004}),
        raw("itc[lost]", "2026-01-02", {"blip2fast cuda": 0.002, "torch": 0.001}),
        raw("itc[alone]", "2026-01-02", {"blip2fast cuda": 0.002}),
        raw("itc[none]", "2026-01-02", {"torch": 0.001}),
    )
    lines = tables.suite_table(file).splitlines()
    assert lines[0] == "**AMD EPYC, 2026-01-02**"
    assert lines[4:8] == [
        "| itc[won] | 2.00 ms | 4.00 ms | 2.00 | 50 % |",
        "| itc[lost] | 2.00 ms | 1.00 ms | **0.50** | 50 % |",
        "| itc[alone] | 2.00 ms | does not run |  | 50 % |",
        "| itc[none] | does not run | 1.00 ms |  |  |",
    ]
    row = tables.overview([file]).splitlines()[-1]
    suite, machine = "[itc](suites/itc.md)", "AMD EPYC, 2026-01-02"
    assert row == f"| {suite} | {machine} | 2 | 1 | 0.50 | 1.25 | 2.00 |"
    assert tables.overview([]) == "No result yet."


def test_every_suite_has_a_page_that_the_readme_links() -> None:
    folder = Path(report.__file__).parent
    suites = {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")}
    assert {path.stem for path in report.SUITES.glob("*.md")} == suites
    readme = (folder / "README.md").read_text()
    for suite in suites:
        assert f"[`bench_{suite}.py`](suites/{suite}.md)" in readme
        page = (report.SUITES / f"{suite}.md").read_text()
        assert f"<!-- {suite}: generated" in page
        assert report.SUITES / f"{suite}.md" in report.PAGES


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34, "12.3 s"), (0.001, "1.00 ms"), (23.4e-6, "23.4 µs"), (5e-8, "0.0500 µs")],
)
def test_seconds_have_three_digits(value: float, text: str) -> None:
    assert tables.seconds(value) == text


def test_check_finds_a_stale_page_and_a_stale_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# x\n<!-- itc: generated by report.py -->\nold\n<!-- /itc -->\nend\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", (page,))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(roofline, "DOCS", tmp_path / "docs")
    result(raw("itc[a]", "2026-01-02", {"blip2fast cuda": 0.002})).write(tmp_path)
    plot = "docs/roofline_amd-epyc.svg"
    assert report.check() == ["README.md", plot]
    report.write()
    assert report.check() == []
    assert page.read_text().startswith("# x\n")
    assert page.read_text().endswith("<!-- /itc -->\nend\n")
    result(raw("itc[a]", "2026-01-02", {"blip2fast cuda": 0.001})).write(tmp_path)
    assert report.check() == ["README.md", plot]


def test_a_rate_stands_beside_its_time() -> None:
    captions = raw("caption[a]", "2026-01-02", {"blip2fast": 2.0, "transformers": 4.0})
    captions["extra_info"]["contenders"]["blip2fast"]["images_per_s"] = 4.0
    table = tables.suite_table(result(captions))
    assert "blip2fast 2.00 s (2.00 s to 2.00 s): 4 images/s" in table
    assert table.count("images/s") == 1


def test_ablations_are_means_with_standard_errors_and_paired_differences() -> None:
    def seed(offset: float) -> dict[str, Any]:
        stage2 = {"caption_exact": 0.5 + offset, "vqa_read": 0.75, "loss": 0.25}
        stage1 = dict.fromkeys(("t2i_r1", "i2t_r1", "rerank_t2i_r1", "rerank_i2t_r1"), 0.5)
        alone = stage2 | {"caption_exact": 0.25 + offset}
        return {
            "steps": 30,
            "after_stage1": stage2,
            "alone_equal_steps": alone,
            "alone_equal_compute": stage2,
            "stage1": stage1,
            "itc_itm": stage1 | {"t2i_r1": 0.5 + offset},
            "itc_itm_itg": stage1 | {"t2i_r1": 0.5},
        }

    conditions = {
        "schedule": {"stage1": 11, "stage2": 12, "finetune": 3},
        "held_out_scenes": 1000,
        "batch": 64,
        "versions": {"torch": "2.13"},
        "commit": "0123456789",
    }
    text = training_tables.ablation_tables(
        {
            "conditions": conditions,
            "seeds": [
                seed(0.0),
                seed(0.02),
                {k: v for k, v in seed(0.01).items() if k not in ablations.STAGE2_RUNS},
            ],
        }
    )
    # two values 0 and 2 %: mean 1, standard error 1
    assert "(12 steps) | 51.0 ± 1.0 | 75.0 ± 0.0 | 0.250 ± 0.000 |" in text
    assert "| *difference, equal steps* | 25.0 ± 0.0 | 0.0 ± 0.0 | 0.000 ± 0.000 |" in text
    assert "| *difference by ITG* | -1.0 ± 0.6 |" in text
    assert text.startswith("| 2 seeds |")
    assert "| 3 seeds |" in text


def test_precision_differences_are_in_standard_errors() -> None:
    def runs(*values: float) -> list[dict[str, float]]:
        return [{"loss": value, "eval_t2i_r1": 0.5 + value / 10} for value in values]

    conditions = {"steps": 9, "batch": 64, "device": "x", "torch": "2", "commit": "0123"}
    text = training_tables.precision_table(
        {
            "conditions": conditions,
            "runs": {"fp32": runs(1.0, 3.0), "bf16": runs(2.0, 4.0)},
        }
    )
    # means 2 and 3, each with a standard error of 1: 1 / sqrt(2)
    assert "| loss | 2.000 ± 1.000 | 3.000 ± 1.000 | +0.7 |" in text
    assert "| eval_t2i_r1 | 70.0 ± 10.0 | 80.0 ± 10.0 | +0.7 |" in text


def test_headlines_name_both_and_leave_out_what_was_not_run() -> None:
    times = {"blip2fast auto": 0.5, "torch matmul, amax": 1.0, "torch": 0.1}
    file = result(raw("itc[n1680_cpu-fp32-train]", "2026-01-02", times))
    lines = tables.headlines({"itc": [file]}).splitlines()
    assert len(lines) == 3
    assert "500 ms | 2 MB | torch matmul, amax | 1.00 s | 2 MB | 2.00 |" in lines[2]


FINGERPRINT = {
    "vendor": "AuthenticAMD",
    "family": "26",
    "model": "2",
    "stepping": "1",
    "flags": ["avx512f", "fma"],
    "caches": {"L1d": "48K"},
    "peaks_gflop_per_s": {"fp32 mkl": 90.04},
}


def test_a_processor_is_told_from_others_of_its_name(tmp_path: Path) -> None:
    cell = "itc[n1680_cpu-fp32-train]"
    before = raw(cell, "2026-01-02", {"blip2fast auto": 0.5, "torch matmul, amax": 1.0})
    after = raw(cell, "2026-01-01", {"blip2fast auto": 0.5, "torch matmul, amax": 2.0})
    after["extra_info"]["conditions"]["fingerprint"] = FINGERPRINT
    for benchmark in (before, after):
        result(benchmark).write(tmp_path)
    files = newest(tmp_path.glob("*"), "itc")
    assert [file.machine for file in files] == ["amd-epyc", "amd-epyc-26-2-1"]
    unknown, known = (tables.suite_table(file) for file in files)
    assert "* processor's fingerprint not recorded" in unknown
    assert (
        "* AuthenticAMD family 26, model 2, stepping 1; L1d 48K; flags avx512f fma; "
        "products in GFLOP/s: fp32 mkl 90" in known
    )
    row = tables.headlines({"itc": files}).splitlines()[2]
    assert row.endswith("| 1.00 s | 2 MB | 2.00 to 4.00 in 2 runs |")


def test_a_fingerprint_is_read_from_linux(tmp_path: Path) -> None:
    text = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
        "model name\t: Xeon\nstepping\t: 8\nflags\t\t: fpu fma sse4_2 amx_bf16 avx512f\n\n"
        "processor\t: 1\nvendor_id\t: other\n"
    )
    assert fingerprint.processor_fields(text) == {
        "vendor": "GenuineIntel",
        "family": "6",
        "model": "143",
        "stepping": "8",
        "flags": ["amx_bf16", "avx512f", "fma", "sse4_2"],
    }
    for index, told in enumerate([("1", "Data", "48K"), ("2", "Unified", "2048K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), told, strict=True):
            (folder / name).write_text(f"{value}\n")
    assert fingerprint.caches(tmp_path) == {"L1d": "48K", "L2": "2048K"}


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SIDE", 64)
    found = fingerprint.peaks()
    assert {name[:4] for name in found} == {"fp32", "bf16"}
    assert all(rate > 0 for rate in found.values())


def test_headlines_leave_out_what_has_no_time() -> None:
    file = result(raw("itc[n1680-bf16-train]", "2026-01-02", {"blip2fast auto": 0.5}))
    assert len(tables.headlines({"itc": [file]}, tables.GPU_HEADLINES).splitlines()) == 2


def test_a_sweep_shows_the_quickest_of_those_that_agree() -> None:
    row = {"case": "gelu", "dropout": 0.0, "floor_s": 1e-4, "agrees": True}
    rows = [
        row | {"configuration": "default", "median_s": 2e-4, "of_floor": 0.5},
        row | {"configuration": "wide", "median_s": 1.25e-4, "of_floor": 0.8},
        row | {"configuration": "wrong", "median_s": 1e-4, "of_floor": 1.0, "agrees": False},
    ]
    run = {"device": "A card", "date": "2026-01-02", "versions": {"torch": "2"}, "commit": "abc"}
    lines = tables.sweep_table({"rows": rows, "conditions": run}).splitlines()
    assert lines[2] == "| gelu | 0 | 100 µs | 125 µs | 80 % | 200 µs | wide |"
    assert lines[-1] == "A card, 2026-01-02; torch 2; commit abc."


def test_records_name_kind_and_rival() -> None:
    record = {"op": "bias_gelu", "backend": "triton", "kind": "dtype=bf16", "ours_us": 200.0}
    record |= {"rival": "pytorch", "rival_us": 330.0, "card": "A card", "torch": "2", "triton": "3"}
    lines = tables.records_table([record]).splitlines()
    assert lines[2] == "| bias_gelu, triton | dtype=bf16 | 200 µs | pytorch | 330 µs |"
    assert lines[-1] == "A card, torch 2, triton 3."
    assert tables.records_table([]) == "None yet."


def demo_run(seed: int, exact: float, **changes: object) -> dict[str, Any]:
    """A summary of the demo, as far as result files need it."""
    table = {name: {"model": 0.99, "chance": 0.3, "shuffled": 0.3} for name in FLOORS}
    table["caption/exact"] = {"model": exact, "chance": 0.0, "blind": 0.0, "shuffled": 0.01}
    return {
        "source": "shapes",
        "table": {"loss/itc": {"model": 1 + seed, "chance": 4.0}, **table},
        "settings": {"source": "shapes", "seed": seed, "held_out_scenes": 1000},
        "machine": {
            "versions": dict.fromkeys(("torch", "transformers", "deepspeed"), "1"),
            "processor": "X",
            "cores": 2,
            "gpu": None,
            "commit": "0123456789",
        },
        "attention": {},
        "captions": [],
        "phases": {},
        "from_nothing": {"seconds": 400.0 + seed, "cpu_seconds": 700.0},
        **changes,
    }


def test_the_demo_table_has_mean_and_range_over_the_seeds() -> None:
    result = demo_seeds.combine([demo_run(0, 0.9), demo_run(1, 0.8), demo_run(2, 0.64)])
    text = training_tables.demo_table(result)
    assert "| exact | 78.0 (64.0 to 90.0) | 0.0 | 0.0 | 1.0 | ≥ 65 |" in text
    assert "| contrastive (ITC) | 2.000 (1.000 to 3.000) | 4.000 |" in text
    assert "Seeds 0, 1, 2: means, and ranges in brackets." in text
    assert "400 to 402 s (700 s of CPU time) on 2 cores of X" in text
    assert "Gates not met: seed 2: caption/exact: 64.0% reached, at least 65% wanted." in text


def test_the_demo_table_of_one_seed_has_no_range_and_met_gates_are_not_listed() -> None:
    result = demo_seeds.combine([demo_run(3, 0.9)])
    text = training_tables.demo_table(result)
    assert "| exact | 90.0 | 0.0 | 0.0 | 1.0 | ≥ 65 |" in text
    assert "Seed 3. 1000 held-out scenes; a run took 403 s" in text
    assert "not met" not in text


def test_the_short_table_of_the_demo_has_the_gated_rows() -> None:
    runs = [demo_run(0, 0.9), demo_run(1, 0.64)]
    for run in runs:
        run["machine"]["linear"] = "onednn"
    result = demo_seeds.combine(runs)
    text = training_tables.gates_table(result)
    row = "Captions by the language model: exact | 77.0 (64.0 to 90.0) | 1.0 |"
    assert f"| {row} ≥ 65 |" in text
    assert "2 cores of X, BLIP2FAST_LINEAR=onednn;" in text
    assert "Gates not met: seed 1: caption/exact" in text
    assert len(text.splitlines()) == 2 + len(FLOORS) + 2
    assert f"| {row}\n" in training_tables.gates_table(result | {"source": "digits"})


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"source": "shapes", "seed": 1, "held_out_scenes": 40}},
        {"machine": demo_run(0, 0.9)["machine"] | {"commit": "another"}},
    ],
)
def test_runs_of_other_settings_or_commits_are_not_combined(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="seed 1 ran with other settings"):
        demo_seeds.combine([demo_run(0, 0.9), demo_run(1, 0.9, **changes)])


def test_a_seed_that_ran_at_this_commit_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = demo_run(0, 0.9)["machine"]
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> None:
        started.append(command)
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(demo_run(4, 0.7, machine=machine)))

    monkeypatch.setattr(demo_seeds, "machine", lambda: machine)
    monkeypatch.setattr(demo_seeds.subprocess, "run", start)
    for _ in range(2):
        assert demo_seeds.run_demo("shapes", 4, tmp_path / "four")["settings"]["seed"] == 4
    (command,) = started
    assert command[1:7] == ["-m", "blip2fast.demo", "--source", "shapes", "--seed", "4"]
    machine["commit"] = "newer"
    assert demo_seeds.run_demo("shapes", 4, tmp_path / "four")["machine"] == machine
    assert len(started) == 2
    monkeypatch.setattr(demo_seeds.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="seed 5: the demo left no summary"):
        demo_seeds.run_demo("shapes", 5, tmp_path / "five")


def test_steps_by_batch_have_rates_and_peaks_a_pair() -> None:
    step = raw("step[vit_g_b8-bf16]", "2026-01-02", {"blip2fast": 2.0, "textbook": 4.0})
    lines = memory_tables.stage1_steps([result(step)]).splitlines()
    assert lines[2].startswith("| **AMD EPYC, 2026-01-02** |")
    assert lines[3:] == [
        "| vit_g_b8-bf16 | 2.00 s | 4 | 2.0 MB | 0.2 MB | 4.00 s | 2 | 2.0 MB |",
    ]


def test_tables_of_plans_show_places_and_what_does_not_fit() -> None:
    def option(name: str, gib: float, fits: bool) -> dict[str, Any]:
        device = {"language model": int(gib * 2**30), "logits": 2**29}
        return {"name": name, "device": device, "host": 2**30, "fits": fits}

    options = [
        option("none", 90, False),
        option("none, gradient_checkpointing", 4, True),
        option("stream", 1, True),
    ]
    plan = {
        "batch_size": 8,
        "precision": "bf16",
        "parameters": {"language model": 1234, "trained": 567},
        "options": options,
        "chosen": "none, gradient_checkpointing",
    }
    conditions = {"versions": {"torch": "2.13"}, "commit": "0123456789"}
    cluster = {"processes": 2, "machines": 1, "device_gib": 80, "host_gib": 100}
    text = memory_tables.plans(
        {"conditions": {**conditions, "cluster": cluster}, "plans": {"recipe": plan}}
    )
    first = "| recipe | 1,234 |  | 567 | 8 | 90.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.50 | 90.50 |"
    assert f"{first} none, recomputed |" in text
    assert "| recipe | (90.50 / 1.00) | 1.50 / 1.00 |" in text
    assert "| recipe, recomputed | 4.50 / 1.00 |  |" in text


def test_a_large_table_has_its_time_by_part_and_its_largest_worker() -> None:
    def held(size: int) -> dict[str, int]:
        return {"uss": size * 10**6, "pss": size * 2 * 10**6, "rss": size * 3 * 10**6}

    conditions = {"device": "x", "cores": 2, "memory_bytes": 24e9, "load_average": 1.25}
    conditions |= {"date": "2026-01-02", "python": "3.12", "versions": {"torch": "2.13"}}
    conditions |= {"commit": "0123456789", "command": "benchmarks/large_table.py 5000 /tmp"}
    forked = {"first_batch_s": 1.0, "main": held(7), "workers": [held(11), held(12)]}
    text = memory_tables.large_table(
        {
            "rows": 5000,
            "bytes": 4.25e9,
            "seconds": {"imports": 2.0, "opening": 0.25},
            "load": {"workers": 2, "batches": 400, "batch_size": 256},
            "before": held(3),
            "memory": {
                "fork": forked,
                "spawn": forked | {"main": held(8)},
                "no workers": forked | {"workers": []},
            },
            "conditions": conditions,
        }
    )
    assert text.startswith("**5,000 records, 4.2 GB: the first batch after 2.25 s**")
    assert "in memory: imports 2.00 s, opening 250 ms." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| when all is imported, before the records | 3 | 6 | 9 |",
        "| main process, workers forked | 7 | 14 | 21 |",
        "| a worker, forked | 12 | 24 | 36 |",
        "| main process, workers spawned | 8 | 16 | 24 |",
        "| a worker, spawned | 12 | 24 | 36 |",
        "| main process without workers | 7 | 14 | 21 |",
    ]
    assert "24 GB of memory, load average 1.2 at the start, 2026-01-02" in text


def test_plans_in_the_results_are_those_of_today() -> None:
    """`python benchmarks/plans.py` makes the file; two recipes are planned again here."""
    file = sorted(plans.RESULTS.glob("*_plans.json"))[-1]
    kept = json.loads(file.read_text())
    assert kept["plans"].keys() == plans.recipes().keys()
    cluster = plans.Cluster(**kept["conditions"]["cluster"])
    some = {name: plans.recipes()[name] for name in ("vitg_stage1", "vitg_opt6.7b_stage2")}
    for name, plan in plans.plan_all(some, cluster).items():
        assert plan == kept["plans"][name]
