"""Write tables and plots from result files.

    python benchmarks/report.py                # README.md, benchmarks/README.md, docs/roofline_*
    python benchmarks/report.py --check        # are they what the result files say? (in CI)
    python benchmarks/report.py --add RAW...   # first take in pytest-benchmark's JSON files
    python benchmarks/report.py --show RAW...  # a short table of such files, nothing written

A block between `<!-- NAME: generated ... -->` and `<!-- /NAME -->` is replaced: `demo` by the table
of the newest demo, the name of a suite by the newest results of each machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from results import ResultFile, newest, reduce
from tables import short_table, suite_table

from blip2fast.demo.table import COLUMNS, FLOORS, ROW_NAMES, SECTIONS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(r"(<!-- (\w+): generated[^>]*-->\n).*?(<!-- /\2 -->)", flags=re.DOTALL)


def demo_table(summary: dict[str, Any]) -> str:
    """The demo's table in markdown; losses as they are, everything else in percent."""
    rows = summary["table"]
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    lines = [
        "| | " + " | ".join(COLUMNS[c] for c in columns) + " | gate |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    section = ""
    for name, row in rows.items():
        kind, _, part = name.partition("/")
        if kind != section:
            section = kind
            lines.append(f"| **{SECTIONS.get(kind, kind)}** |" + " |" * (len(columns) + 1))
        scale, digits = (1, 3) if kind == "loss" else (100, 1)
        cells = [f"{scale * row[c]:.{digits}f}" if c in row else "" for c in columns]
        gate = f"≥ {100 * FLOORS[name]:.0f}" if name in FLOORS else ""
        lines.append(f"| {ROW_NAMES.get(part, part)} | " + " | ".join(cells) + f" | {gate} |")
    return "\n".join([*lines, "", conditions(summary)])


def conditions(summary: dict[str, Any]) -> str:
    """Where and how the numbers were taken."""
    machine = summary["machine"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "deepspeed")
    )
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
    return (
        f"Seed {summary['settings']['seed']}, {summary['settings']['held_out_scenes']} held-out "
        f"scenes, {summary['from_nothing']['seconds']:.0f} s on {where}; {versions}; commit "
        f"{machine['commit'][:8]}. Losses as they are, the rest in percent."
    )


def digits_sentence(summary: dict[str, Any]) -> str:
    """What the gated rows of the default source are on handwriting, in one paragraph."""
    rows = summary["table"]
    reached = "; ".join(
        f"{_phrase(name)} {100 * rows[name]['model']:.1f} "
        f"({100 * rows[name]['shuffled']:.1f} with images shuffled)"
        for name in FLOORS
    )
    return (
        "With `--source digits` (handwriting; the held-out scenes are written by other people than "
        f"the training scenes), in percent: {reached}. {conditions(summary)}"
    )


def _phrase(name: str) -> str:
    section, _, part = name.partition("/")
    return f"{SECTIONS[section]}, {ROW_NAMES[part]}"


def block_text(name: str) -> str:
    """What stands in a block."""
    if name == "demo":
        return demo_table(json.loads(max(RESULTS.glob("*_demo.json")).read_text()))
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
    return stale


def write() -> None:
    """Write pages and plots."""
    import roofline

    for page in PAGES:
        page.write_text(generate(page.read_text()))
    for machine, files in by_machine().items():
        roofline.draw(machine, files)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tables and plots from result files.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only say what is not up to date")
    how.add_argument("--add", nargs="+", type=Path, default=[], help="take in these files first")
    how.add_argument("--show", nargs="+", type=Path, default=[], help="print these files briefly")
    given = parser.parse_args()
    if given.show:
        print(short_table(_raw(given.show)))
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
