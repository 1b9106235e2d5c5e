"""The demo's one table, its gates and its summary file.

A table maps a row name such as `"vqa_read/colour"` to `{column: value}`. Fractions lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

Row = Mapping[str, float]
Rows = Mapping[str, Row]

# Column name -> heading. A row that has no value in a column shows a dash.
COLUMNS = {
    "model": "trained",
    "chance": "chance",
    "blind": "blind LM",
    "shuffled": "shuffled images",
    "untrained": "untrained Q-Former",
    "true_caption": "true caption",
    "unseen_pairs": "unseen pairs",
}
SECTIONS = {
    "loss": "Held-out losses",
    "retrieval": "Retrieval by ITC",
    "rerank": "Retrieval, ITM re-ranks",
    "itm": "ITM, one attribute swapped",
    "caption": "Captions by the language model",
    "vqa_direct": "VQA, zero-shot",
    "vqa_read": "VQA, caption then read",
    "vqa_tuned": "VQA, fine-tuned",
}
ROW_NAMES = {
    "itc": "contrastive (ITC)",
    "itm": "matching (ITM)",
    "itg": "generation (ITG)",
    "stage2": "language modelling",
    "t2i_r1": "text to image R@1",
    "t2i_r5": "text to image R@5",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "image to text R@5",
    "accuracy": "accuracy",
    "ranked": "true one ranked first",
    "exact": "exact",
    "all": "all questions",
}

# Minimum values of the trained model on drawn shapes.
FLOORS = {
    "retrieval/t2i_r1": 0.65,
    "itm/accuracy": 0.78,
    "caption/exact": 0.65,
    "vqa_read/all": 0.90,
    "vqa_tuned/all": 0.78,
}
# With shuffled images a metric may exceed the blind level by at most this much.
BLIND_MARGIN = 0.05


def check_gates(summary: Mapping[str, Any]) -> list[str]:
    """Check the demo's results; returns one sentence per unmet gate, and none if all are met.

    Drawn shapes must reach `FLOORS`. For either source, the metrics with shuffled images may not
    exceed the blind level (the better of chance and the blind language model) by more than
    `BLIND_MARGIN`; if they do, the score does not come from the images.

    Args:
        summary: the contents of `summary.json`.

    Raises:
        ValueError: the summary lacks a row or column that a gate reads.
    """
    rows: Rows = summary["table"]
    failed = []
    for name, floor in FLOORS.items():
        reached = _value(rows, name, "model")
        # Written so that NaN fails.
        if summary["source"] == "shapes" and not reached >= floor:
            failed.append(f"{name}: {reached:.1%} reached, at least {floor:.0%} wanted")
        shuffled = _value(rows, name, "shuffled")
        blind = max(_value(rows, name, "chance"), rows[name].get("blind", 0.0))
        if not shuffled <= blind + BLIND_MARGIN:
            failed.append(
                f"{name}: {shuffled:.1%} with shuffled images, at most {blind + BLIND_MARGIN:.1%} "
                f"wanted (blind level {blind:.1%})"
            )
    return failed


def _value(rows: Rows, name: str, column: str) -> float:
    try:
        return rows[name][column]
    except KeyError:
        raise ValueError(
            f"the summary has no column {column!r} in row {name!r}; its rows are "
            f"{', '.join(rows) or 'none'}: run the demo's evaluation again"
        ) from None


def render(rows: Rows, title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    section = ""
    for name, row in rows.items():
        kind, _, part = name.partition("/")
        if kind != section:
            section = kind
            table.add_section()
            table.add_row(f"[bold]{SECTIONS.get(kind, kind)}[/bold]")
        cells = (_cell(kind, row.get(column)) for column in COLUMNS)
        table.add_row(f"  {ROW_NAMES.get(part, part)}", *cells)
    return table


def _cell(kind: str, value: float | None) -> str:
    if value is None:
        return "-"
    if kind == "loss" or math.isnan(value):
        return f"{value:.3f}"
    return f"{100 * value:.1f}"
