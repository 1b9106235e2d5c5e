"""Write the README's tables from result files: `python benchmarks/report.py` (`--check` in CI).

A block between `<!-- NAME: generated ... -->` and `<!-- /NAME -->` is replaced by what the newest
`benchmarks/results/*_NAME.json` says.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2fast.demo.table import COLUMNS, FLOORS, ROW_NAMES, SECTIONS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo_table,
    "demo_digits": digits_sentence,
}


def generate(text: str) -> str:
    """The text with every block written anew."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        newest = max(RESULTS.glob(f"*_{name}.json"))
        return match[1] + TABLES[name](json.loads(newest.read_text())) + "\n" + match[3]

    return BLOCK.sub(block, text)


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = generate(old)
    if "--check" in sys.argv[1:]:
        if old != new:
            print("README.md is not what its result files say: run python benchmarks/report.py")
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
