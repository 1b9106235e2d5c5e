"""The demo's plots: loss curves, metrics with their controls, attention maps, captions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blip2fast.demo.attention import Attention
from blip2fast.demo.table import COLUMNS, ROW_NAMES, Rows
from blip2fast.scenes import SceneSplit, is_exact

# Entropy of one match in three pairs: the ITM loss until retrieval works.
ITM_PLATEAU = math.log(3) - 2 / 3 * math.log(2)


def loss_curves(runs: dict[str, Path], target: Path) -> None:
    """Plot the training losses of every run over its steps.

    Args:
        runs: run name -> its `metrics.jsonl`.
    """
    figure = Figure(figsize=(4.5 * len(runs), 3.4), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, (name, path) in zip(axes, runs.items(), strict=True):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = sorted({key for line in lines for key in line if key.startswith("loss")})
        for key in [n for n in names if n != "loss"] or names:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), label=key.removeprefix("loss_"))
        if "loss_itm" in names:
            axis.axhline(ITM_PLATEAU, color="grey", lw=0.8, ls=":")
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(target, dpi=120)


def metric_bars(rows: Rows, target: Path) -> None:
    """Bars for retrieval, matching, captions and VQA: the trained model next to its controls."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    overall = [
        name
        for name in rows
        if name.startswith(("retrieval/", "itm/accuracy", "caption/")) or name.endswith("/all")
    ]
    types = [name for name in rows if name.startswith("vqa_") and not name.endswith("/all")]
    for axis, names in ((top, overall), (bottom, types)):
        _grouped_bars(axis, rows, names)
    top.legend(ncols=len(COLUMNS), loc="upper center", bbox_to_anchor=(0.5, 1.18))
    figure.savefig(target, dpi=110)


def _grouped_bars(axis: Axes, rows: Rows, names: Sequence[str]) -> None:
    width = 0.8 / len(COLUMNS)
    for index, (column, heading) in enumerate(COLUMNS.items()):
        places = [i for i, name in enumerate(names) if column in rows[name]]
        heights = [100 * rows[names[i]][column] for i in places]
        axis.bar([i + index * width for i in places], heights, width, label=heading)
    axis.set_xticks([i + 0.4 for i in range(len(names))], [_label(n) for n in names], fontsize=7)
    axis.set(ylabel="%", ylim=(0, 100))


def _label(name: str) -> str:
    kind, _, part = name.partition("/")
    return f"{kind.replace('_', ' ')}\n{ROW_NAMES.get(part, part)}"


def attention_sheet(split: SceneSplit, attention: Attention, target: Path, count: int = 6) -> None:
    """Images with the attention maps of the ITM pass, for each of their two objects."""
    figure = Figure(figsize=(2 * count, 4.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    side = split.images.shape[-1]
    for n in range(min(2 * count, len(attention.scene))):
        axis = axes[n % 2, n // 2]
        scene, mentioned = attention.scene[n], attention.mentioned[n]
        o = split.scenes[scene].objects[mentioned]
        axis.imshow(split.images[scene].transpose(1, 2, 0), extent=(0, side, side, 0))
        axis.imshow(attention.maps[n], cmap="magma", alpha=0.55, extent=(0, side, side, 0))
        edge = split.masks[scene, mentioned].astype(float)
        pixel = np.arange(side) + 0.5
        axis.contour(pixel, pixel, edge, levels=[0.5], colors="white", linewidths=1)
        axis.set_title(f"{o.colour} {o.kind}\n{o.place}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(
        f"Attention on the mentioned object {attention.on_mentioned:.1%} (of an even map "
        f"{attention.area_mentioned:.1%}), on the other one {attention.on_other:.1%}",
        fontsize=10,
    )
    figure.savefig(target, dpi=110)


def caption_sheet(split: SceneSplit, captions: Sequence[str], target: Path) -> None:
    """Held-out scenes with their generated captions; wrong ones in red."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(4, 6)
    for axis, image, caption, scene in zip(
        axes.flat, split.images, captions, split.scenes, strict=False
    ):
        axis.imshow(image.transpose(1, 2, 0))
        colour = "black" if is_exact(caption, scene) else "red"
        axis.set_title("\n".join(_wrapped(caption)), fontsize=7, color=colour)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(target, dpi=110)


def _wrapped(text: str, width: int = 34) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
