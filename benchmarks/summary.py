"""What a terminal shows of results: ours beside each rival, losses included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results import ResultFile
from tables import AUTO, REFERENCE, fastest, gigabytes, is_ours, rates, seconds

# what a user gets who chooses nothing
_DEFAULTS = (AUTO, "blip2fast", "ours")
_WIDTHS = (42, 20, 34)
# the longest reason that is shown
_MOST = 100
Contenders = Mapping[str, Mapping[str, Any]]


def ours_of(contenders: Contenders, field: str) -> str | None:
    """What runs by default, or else the best of ours."""
    for name in _DEFAULTS:
        if contenders.get(name, {}).get(field) is not None:
            return name
    if field == "median_s":
        return fastest(contenders, True)
    return next((n for n, r in contenders.items() if is_ours(n) and r.get(field)), None)


def rivals_table(files: Sequence[ResultFile]) -> str:
    """Time of ours beside that of each rival, their ratio, the share of the floor; then the losses.

    A ratio over 1 means that ours is quicker. Where only a peak was measured, it stands for the
    time. Of a profiled step and of a whole run a line for each contender: what its time went to.
    """
    lines = [_row("", "ours", "rival", "ratio", "of floor")]
    losses: list[str] = []
    compared = 0
    for file in files:
        lines.append(file.suite)
        for name, cell in file.cells.items():
            found = cell["contenders"]
            profiled = {n: r for n, r in found.items() if "shares" in r}
            timed = any("median_s" in r for r in found.values())
            if timed or not profiled:
                rows, ratios = _cell_rows(name, found)
                lines += rows
                compared += bool(ratios)
                if ratios and min(ratios) < 1:
                    losses.append(f"  {file.suite} {name}: {min(ratios):.2f}")
            label = "  " if timed else f"{name}: "
            lines += [f"  {label}{n}: {_run(r)}" for n, r in profiled.items()]
            lines += [
                f"    {n}: failed: {r['failed']}"[:_MOST] for n, r in found.items() if "failed" in r
            ]
    lines.append("")
    if losses:
        lines.append(f"slower than the best rival in {len(losses)} of {compared}:")
        lines += losses
    else:
        lines.append(f"ours is the quickest in all {compared} that have a rival")
    return "\n".join([*lines, *absent(files)])


def _row(name: str, ours: str, rival: str, ratio: str, floor: str, mark: str = "") -> str:
    first, second, third = _WIDTHS
    row = f"{name:{first}} {ours:{second}} {rival:{third}} {ratio:>6} {floor:>8}  {mark}"
    return row.rstrip()


def _cell_rows(name: str, found: Contenders) -> tuple[list[str], list[float]]:
    """The rows of a cell, and its ratios."""
    field = "median_s" if any("median_s" in r for r in found.values()) else "peak_bytes"
    shown = seconds if field == "median_s" else gigabytes
    ours = ours_of(found, field)
    rivals = sorted(
        (n for n, r in found.items() if not is_ours(n) and r.get(field) is not None),
        key=lambda n: found[n][field],
    )
    label, share = f"  {name}", None
    text = "does not run"
    if ours is not None:
        text = f"{shown(found[ours][field])} {ours.removeprefix('blip2fast').lstrip(', ')}"
        share = found[ours].get("of_floor")
    floor = "" if share is None else f"{100 * share:.0f} %"
    if not rivals:
        return [_row(label, text, "none", "", floor)], []
    rows, ratios = [], []
    for rival in rivals:
        ratio, mark = "", ""
        if ours is not None:
            ratios.append(found[rival][field] / found[ours][field])
            ratio, mark = f"{ratios[-1]:.2f}", "slower" if ratios[-1] < 1 else ""
        rows.append(_row(label, text, f"{shown(found[rival][field])} {rival}", ratio, floor, mark))
        label = text = floor = ""
    return rows, ratios


def _run(result: Mapping[str, Any]) -> str:
    """What a second gives, where that was counted, and what the time went to."""
    shares = ", ".join(f"{kind} {100 * x:.0f} %" for kind, x in result["shares"].items())
    return "; ".join([*rates(result), shares])


def absent(files: Sequence[ResultFile]) -> list[str]:
    """A line for each contender that could not run, with its first reason."""
    reasons: dict[str, list[str]] = {}
    for file in files:
        for cell in file.cells.values():
            for name, result in cell["contenders"].items():
                if "does_not_run" in result and name != REFERENCE:
                    reasons.setdefault(name, []).append(result["does_not_run"])
    if not reasons:
        return []
    told = [f"  {n} ({len(found)}): {found[0]}"[:_MOST] for n, found in reasons.items()]
    return ["does not run here (cells):", *told]
