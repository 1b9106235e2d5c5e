"""Where each benchmark stands under a machine's two ceilings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from results import ResultFile
from tables import fastest

DOCS = Path(__file__).parent.parent / "docs"
MARKERS = "osD^vP*X"


def points(files: Sequence[ResultFile]) -> dict[str, list[dict[str, Any]]]:
    """By dtype, what a plot shows: intensity, our and the best rival's rate, the ceilings."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for name, cell in file.cells.items():
            ours = fastest(cell["contenders"], True)
            if "work" not in cell or ours is None:
                continue
            rival = fastest(cell["contenders"], False)
            found.setdefault(cell["dtype"], []).append(
                {
                    "suite": file.suite,
                    "name": name,
                    "intensity": cell["work"]["flops"] / cell["work"]["bytes"],
                    "ours": cell["contenders"][ours]["flops_per_s"],
                    "rival": rival and cell["contenders"][rival]["flops_per_s"],
                    "ceilings": [cell["ceilings"][k] for k in ("flops_per_s", "bytes_per_s")],
                }
            )
    return found


def plot_path(machine: str) -> Path:
    """Where a machine's plot is kept."""
    return DOCS / f"roofline_{machine}.svg"


def digest(data: dict[str, list[dict[str, Any]]]) -> str:
    """Identifies what a plot shows; written into it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def is_current(machine: str, files: Sequence[ResultFile]) -> bool:
    """Whether a machine's plot shows these results (or there is nothing to show)."""
    data, path = points(files), plot_path(machine)
    return not data or (path.exists() and digest(data) in path.read_text())


def draw(machine: str, files: Sequence[ResultFile]) -> Path | None:
    """Draw a machine's plot, a panel for each dtype; None where there is nothing to show."""
    data = points(files)
    if not data:
        return None
    figure = Figure(figsize=(6.4 * len(data), 4.6), layout="constrained")
    for axis, (dtype, shown) in zip(
        figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True
    ):
        _panel(axis, dtype, shown)
    path = plot_path(machine)
    path.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "blip2fast"}):  # the same data, the same file
        figure.savefig(path, metadata={"Date": None, "Description": digest(data)})
    return path


def _panel(axis: Any, dtype: str, shown: list[dict[str, Any]]) -> None:
    flops, moved = (max(p["ceilings"][i] for p in shown) for i in range(2))
    intensities = [p["intensity"] for p in shown]
    low, high = min(*intensities, flops / moved) / 3, max(*intensities, flops / moved) * 3
    line = [low, flops / moved, high]
    axis.plot(line, [min(flops, moved * x) / 1e12 for x in line], "k", lw=1)
    for marker, suite in zip(MARKERS, dict.fromkeys(p["suite"] for p in shown), strict=False):
        mine = [p for p in shown if p["suite"] == suite]
        for who, colour in (("rival", "C1"), ("ours", "C0")):
            there = [p for p in mine if p[who]]
            axis.plot(
                [p["intensity"] for p in there],
                [p[who] / 1e12 for p in there],
                linestyle="",
                marker=marker,
                color=colour,
                alpha=0.7,
                label=f"{suite}, {'ours' if who == 'ours' else 'best rival'}",
            )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, each input and output moved once",
        ylabel="TFLOP/s",
        title=f"{dtype}: {flops / 1e12:.3g} TFLOP/s, {moved / 1e9:.4g} GB/s",
    )
    axis.legend(fontsize="small")
