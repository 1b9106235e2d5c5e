"""Write tables and plots from result files.

    python benchmarks/report.py                # README.md, benchmarks/suites/, docs/roofline_*, ...
    python benchmarks/report.py --check        # are they what the result files say? (in CI)
    python benchmarks/report.py --add RAW...   # first take in pytest-benchmark's JSON files
    python benchmarks/report.py --show RAW...  # of such files, for a terminal; nothing is written

A block between `<!-- NAME: generated ... -->` and `<!-- /NAME -->` is replaced: a name of
`TRAINING` by the table of its newest run, that of a suite by the newest results of each machine,
`overview` by a line for each of these.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import extrapolation_tables
import memory_tables
import model_tables
import scaling_tables
import training_tables
from results import ResultFile, newest, reduce
from summary import rivals_table
from tables import (
    GPU_HEADLINES,
    HEADLINES,
    headlines,
    overview,
    records_table,
    suite_table,
    sweep_table,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SUITES = ROOT / "benchmarks" / "suites"
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(SUITES.glob("*.md")),
    ROOT / "docs" / "ablations.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "demo.md",
    ROOT / "docs" / "kernel_model.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "memory_and_speed.md",
    ROOT / "docs" / "precision.md",
    ROOT / "docs" / "scaling.md",
)
PROVEN = ROOT / "blip2fast" / "ops" / "proven_kernels.json"
BLOCK = re.compile(r"(<!-- (\w+): generated[^>]*-->\n).*?(<!-- /\2 -->)", flags=re.DOTALL)
# block: NAME of the result, whose newest `results/DATE_NAME.json` it is made of, and the table
TRAINING = {
    "demo": ("demo", training_tables.demo_table),
    "demo_gates": ("demo", training_tables.gates_table),
    "demo_onednn": ("demo-onednn", training_tables.gates_table),
    "demo_two_cores": ("demo-two-cores", training_tables.time_of_a_run),
    "digits": ("digits", training_tables.gates_table),
    "ablations": ("ablations", training_tables.ablation_tables),
    "precision": ("precision", training_tables.precision_table),
    "plans": ("plans", memory_tables.plans),
    "large_table": ("large-table", memory_tables.large_table),
    "scaling_counts": ("scaling", scaling_tables.counts),
    "scaling_processes": ("scaling", scaling_tables.processes),
    "scaling_times": ("scaling-times", scaling_tables.times),
    "scaling_glance": ("scaling", extrapolation_tables.glance),
    "scaling_inputs": ("scaling", extrapolation_tables.inputs),
    "scaling_stage1": ("scaling", extrapolation_tables.stage1_hours),
    "scaling_stage2": ("scaling", extrapolation_tables.stage2_hours),
    "scaling_paper": ("scaling", extrapolation_tables.paper),
    "scaling_memory": ("scaling", extrapolation_tables.memory),
    "scaling_network": ("scaling", extrapolation_tables.network),
    "scaling_storage": ("scaling", extrapolation_tables.storage),
    "scaling_limits": ("scaling", extrapolation_tables.limits),
}
MODEL = ("model_h200", "model_loops", "model_cuda", "model_cards", "model_errors", "model_assumed")


def model_text(name: str) -> str:
    """A table of the kernel model, beside the newest sweep and the newest profile of a step."""
    data = json.loads((RESULTS / "kernel_model.json").read_text())
    files = sorted(RESULTS.glob("????-??-??_sweep_*H200.json"))
    sweep = json.loads(files[-1].read_text())["rows"] if files else []
    if name == "model_h200":
        return model_tables.measured_card_table(data, sweep)
    if name == "model_errors":
        return model_tables.sweep_errors_table(data, sweep)
    if name == "model_cuda":
        profile: dict[str, list[float]] = {}
        for file in newest(RESULTS.glob("*.json"), "stage1_step"):
            cell = file.cells.get("shares[vit_g_b256_dropout_cuda]")
            if file.machine == "h200" and cell is not None:
                profile = cell["contenders"]["blip2fast"].get("kernels_us", {})
        return model_tables.cuda_table(data, profile)
    tables = {
        "model_loops": model_tables.instructions_table,
        "model_cards": model_tables.cards_table,
        "model_assumed": model_tables.assumptions_table,
    }
    return tables[name](data)


def newest_run(name: str) -> dict[str, Any] | None:
    """The newest `results/DATE_NAME.json`."""
    found = sorted(RESULTS.glob(f"????-??-??_{name}.json"))
    return json.loads(found[-1].read_text()) if found else None


def block_text(name: str) -> str:
    """What stands in a block."""
    if name in TRAINING:
        result, table = TRAINING[name]
        found = newest_run(result)
        return table(found) if found else "No result yet."
    if name in ("headlines", "gpu_headlines"):
        rows = HEADLINES if name == "headlines" else GPU_HEADLINES
        suites = {
            suite: [
                f
                for f in newest(RESULTS.glob("*.json"), suite)
                if f.on_gpu == (rows is not HEADLINES)
            ]
            for suite, *_ in rows
        }
        return headlines(suites, rows)
    if name == "overview":
        suites = sorted(path.stem for path in SUITES.glob("*.md"))
        return overview([f for suite in suites for f in newest(RESULTS.glob("*.json"), suite)])
    if name == "sweep":
        sweeps = sorted(RESULTS.glob("????-??-??_sweep_*.json"))
        return sweep_table(json.loads(sweeps[-1].read_text())) if sweeps else "No result yet."
    if name == "stage1_steps":
        return memory_tables.stage1_steps(newest(RESULTS.glob("*.json"), "stage1_step"))
    if name in MODEL:
        return model_text(name)
    if name == "proven_kernels":
        return records_table(json.loads(PROVEN.read_text())["records"])
    files = newest(RESULTS.glob("*.json"), name)
    return "\n\n".join(suite_table(file) for file in files) or "No result yet."


def generate(text: str) -> str:
    """The text with every block written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{block_text(found[2])}\n{found[3]}", text)


def by_machine() -> dict[str, list[ResultFile]]:
    """The newest result of every suite of each machine."""
    suites = sorted({found[2] for page in PAGES for found in BLOCK.finditer(page.read_text())})
    found: dict[str, list[ResultFile]] = {}
    for suite in suites:
        for file in newest(RESULTS.glob("*.json"), suite):
            found.setdefault(file.machine, []).append(file)
    return found


def _raw(paths: list[Path]) -> list[ResultFile]:
    return [file for path in paths for file in reduce(json.loads(path.read_text()))]


def check() -> list[str]:
    """What is not as the result files say."""
    import roofline

    stale = [str(p.relative_to(ROOT)) for p in PAGES if generate(p.read_text()) != p.read_text()]
    for machine, files in by_machine().items():
        if not roofline.is_current(machine, files):
            stale.append(str(roofline.plot_path(machine).relative_to(ROOT)))
    times = newest_run("scaling-times")
    if times is not None and not scaling_tables.is_current(times):
        stale.append(str(scaling_tables.PLOT.relative_to(ROOT)))
    return stale


def write() -> None:
    """Write pages and plots."""
    import roofline

    for page in PAGES:
        page.write_text(generate(page.read_text()))
    for machine, files in by_machine().items():
        roofline.draw(machine, files)
    times = newest_run("scaling-times")
    if times is not None:
        scaling_tables.draw(times)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tables and plots from result files.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only say what is not up to date")
    how.add_argument("--add", nargs="+", type=Path, default=[], help="take in these files first")
    how.add_argument("--show", nargs="+", type=Path, default=[], help="print these files briefly")
    given = parser.parse_args()
    if given.show:
        print(rivals_table(_raw(given.show)))
        return 0
    if given.check:
        stale = check()
        if stale:
            names = ", ".join(stale)
            print(f"{names}: not what the result files say: run python benchmarks/report.py")
        return int(bool(stale))
    for file in _raw(given.add):
        print(file.write())
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
