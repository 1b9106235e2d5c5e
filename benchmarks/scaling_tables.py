"""Tables and plots of docs/scaling.md: what was counted and timed against each size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extrapolation import handed_bytes
from fits import Fit
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tables import gigabytes, seconds

PLOT = Path(__file__).parent.parent / "docs" / "scaling.svg"
MEANINGS = {
    "B": "pairs of a step, one process",
    "N": "pairs of ITC alone",
    "T": "tokens of each text",
    "S": "tokens of an image",
    "Q": "queries",
    "layers": "layers of the Q-Former",
}
COSTS = {"flops": "FLOPs", "saved_bytes": "bytes kept for the backward pass"}
_RAISED = {0: "", 1: " {}", 2: " {}²"}
# sizes of `scaling_counts.BASE`, which the counted bytes are compared with
BASE = {"a_process": 8, "image": (17, 64), "feature_width": 32, "text_tokens": 8}
KINDS = {
    "all-reduce": ("gradients", "text gradients"),
    "all-gather": ("weights", "texts"),
    "all-to-all": ("statistics", "negatives"),
}


def fit_of(cost: Mapping[str, Any], held_out: int) -> tuple[Fit, int]:
    """The fit of a counted cost without its held-out point, and that point's cost."""
    points = {int(x): value for x, value in cost["points"].items()}
    expected = points.pop(held_out)
    return Fit.of(points, cost["powers"]), expected


def formula(fit: Fit, size: str) -> str:
    """`1,000 + 20 B + 3 B²`."""
    letter = "L" if size == "layers" else size
    terms = [
        f"{abs(round(x)):,}{_RAISED[power].format(letter)}"
        for x, power in zip(fit.coefficients, fit.powers, strict=True)
    ]
    signs = ["- " if x < 0 else "+ " for x in fit.coefficients]
    joined = " ".join(sign + term for sign, term in zip(signs, terms, strict=True))
    return joined.removeprefix("+ ")


def counts(result: Mapping[str, Any]) -> str:
    """A line for each size and cost: its polynomial, and the point that it did not see."""
    lines = [
        "| against | cost | fitted | largest residual | held out | counted there | predicted |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for size, sweep in result["sweeps"].items():
        letter = "L" if size == "layers" else size
        for name, cost in sweep["costs"].items():
            fit, expected = fit_of(cost, sweep["held_out"])
            predicted = round(fit.at(sweep["held_out"]))
            lines.append(
                f"| {letter}: {MEANINGS[size]} | {COSTS[name]} | {formula(fit, size)} "
                f"| {_percent(fit.residual)} | {letter} = {sweep['held_out']} | {expected:,} "
                f"| {predicted:,} |"
            )
    run = result["conditions"]
    return "\n".join([*lines, "", _versions(run) + f"; `python {run['command']}`."])


def _percent(share: float) -> str:
    return "0" if share < 1e-9 else f"{100 * share:.2g} %"


def _versions(run: Mapping[str, Any]) -> str:
    return f"PyTorch {run['versions']['torch']}, commit {run['commit'][:8]}"


def handed(counted: Mapping[str, int]) -> dict[str, int]:
    """Counted bytes by kind of collective, whatever PyTorch calls its forms."""
    found = dict.fromkeys(KINDS, 0)
    for name, size in counted.items():
        found[next(kind for kind in KINDS if kind.replace("-", "") in name)] += size
    return found


def expected(processes: int, stage: int, parameters: int) -> dict[str, int]:
    """What `extrapolation.handed_bytes` says of the model that was counted, by kind."""
    each = handed_bytes(processes, parameters=parameters, zero_stage=stage, **BASE)
    return {kind: sum(each[name] for name in names) for kind, names in KINDS.items()}


def processes(result: Mapping[str, Any]) -> str:
    """Bytes that a process hands over in a step, counted and by the formula."""
    worlds = sorted(result["processes"], key=int)
    lines = [
        "| bytes of a process, counted (by the formula) | "
        + " | ".join(f"P = {world}" for world in worlds)
        + " |",
        "|---|" + "---:|" * len(worlds),
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for stage in next(iter(result["processes"].values())):
        for kind in KINDS:
            row = [kind]
            for world in worlds:
                found = result["processes"][world][stage]
                formula = expected(int(world), int(stage), found["parameters"])[kind]
                row.append(f"{handed(found['sent_bytes'])[kind]:,} ({formula:,})")
            rows.setdefault(tuple(row), []).append(stage)
    for (kind, *cells), stages in rows.items():
        lines.append(f"| {kind}, ZeRO-{', '.join(stages)} | " + " | ".join(cells) + " |")
    numbers = [result["processes"][world]["1"] for world in worlds]
    calls = [f"{sum(x['collectives'].values())}" for x in numbers]
    lines.append("| ZeRO-1, collectives | " + " | ".join(calls) + " |")
    flops = [f"{x['flops']:,}" for x in numbers]
    lines.append("| FLOPs of a process | " + " | ".join(flops) + " |")
    return "\n".join(lines)


# times


def times(result: Mapping[str, Any]) -> str:
    """A table for each size that was timed, rows where ours is slower in bold, and the fits."""
    return "\n\n".join(_timed(size, sweep) for size, sweep in result.items())


def _timed(size: str, sweep: Mapping[str, Any]) -> str:
    values = sweep["values"]
    ours, rival = next(iter(values.values()))
    lines = [
        f"**Against {size}: {MEANINGS[size]}**",
        "",
        f"| {size} | {ours} | {rival} | times faster | peak | peak, {rival} | times less |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for value, found in values.items():
        us, them = found[ours], found[rival]
        cells = [f"{int(value):,}", seconds(us["median_s"]), seconds(them["median_s"])]
        cells += [_factor(them["median_s"] / us["median_s"])]
        cells += [gigabytes(us["peak_bytes"]), gigabytes(them["peak_bytes"])]
        cells += [_factor(them["peak_bytes"] / us["peak_bytes"])]
        lines.append("| " + " | ".join(cells) + " |")
    told = "; ".join(f"{name} {_fitted(values, name, size)}" for name in (ours, rival))
    run = sweep["conditions"]
    core = "a core to itself (real-time)" if run["own_core"] else "a core shared with other work"
    if run.get("keeps_freed_memory"):
        core += ", freed memory kept by the process"
    rounds = next(iter(values.values()))[ours]["rounds"]
    return "\n".join(
        [
            *lines,
            "",
            f"Fitted: {told}. Medians of {rounds} rounds in turns, {run['threads']} thread, "
            f"{core}, load {run['load_average']:.1f}; {run['device']}, {run['date']}, "
            f"{_versions(run)}; `python {run['command']}`.",
        ]
    )


def _factor(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def time_fit(values: Mapping[str, Any], name: str, size: str) -> Fit:
    """A contender's time as a constant, the size and, for ITC, its square."""
    points = {int(x): found[name]["median_s"] for x, found in values.items()}
    return Fit.of(points, (0, 1, 2) if size == "N" else (0, 1))


def _fitted(values: Mapping[str, Any], name: str, size: str) -> str:
    fit = time_fit(values, name, size)
    said = ""
    for x, power in zip(fit.coefficients, fit.powers, strict=True):
        sign = "-" if x < 0 else "+"
        said += f" {sign} {_small(abs(x))}{_RAISED[power].format(size)}"
    return f"{said.removeprefix(' + ')} (points within {100 * fit.residual:.0f} %)"


def _small(value: float) -> str:
    return seconds(value) if value >= 1e-6 else f"{1e9 * value:.3g} ns"


def digest(result: Mapping[str, Any]) -> str:
    """Identifies what the plot shows; written into it."""
    shown = {size: sweep["values"] for size, sweep in result.items()}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def is_current(result: Mapping[str, Any]) -> bool:
    """Whether the plot shows these times."""
    return PLOT.exists() and digest(result) in PLOT.read_text()


def draw(result: Mapping[str, Any], path: Path = PLOT) -> None:
    """Time above, peak memory below, a column for each size; fits are dashed."""
    figure = Figure(figsize=(4.2 * len(result), 6.4), layout="constrained")
    rows = figure.subplots(2, len(result), squeeze=False)
    for column, (size, sweep) in enumerate(result.items()):
        values = sweep["values"]
        sizes = [int(x) for x in values]
        for name, colour, marker in zip(
            next(iter(values.values())), ("C0", "C1"), "os", strict=True
        ):
            fit = time_fit(values, name, size)
            _line(rows[0][column], sizes, values, name, "median_s", 1.0, colour, marker)
            fitted = [(x, fit.at(x)) for x in sizes if fit.at(x) > 0]
            rows[0][column].plot(*zip(*fitted, strict=True), color=colour, ls="--", lw=0.8)
            _line(rows[1][column], sizes, values, name, "peak_bytes", 1e6, colour, marker)
        rows[0][column].set(title=MEANINGS[size], ylabel="seconds")
        rows[1][column].set(ylabel="peak, MB")
        for axis in (rows[0][column], rows[1][column]):
            axis.set(xscale="log", yscale="log", xlabel=size)
            axis.set_xticks(sizes, [str(x) for x in sizes])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    with rc_context({"svg.hashsalt": "blip2fast"}):  # the same data, the same file
        figure.savefig(path, metadata={"Date": None, "Description": digest(result)})


def _line(
    axis: Any,
    sizes: Sequence[int],
    values: Mapping[str, Any],
    name: str,
    field: str,
    unit: float,
    colour: str,
    marker: str,
) -> None:
    found = [values[str(x)][name][field] / unit for x in sizes]
    axis.plot(sizes, found, color=colour, marker=marker, ls="-", lw=1, label=name)
