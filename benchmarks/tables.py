"""Result files as markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fingerprint import describe
from results import ResultFile

OURS = ("blip2fast", "ours")
AUTO, REFERENCE = "blip2fast auto", "blip2fast reference"
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
Contenders = Mapping[str, Mapping[str, Any]]


def seconds(value: float) -> str:
    """Three significant digits in a fitting unit."""
    unit, size = next((pair for pair in UNITS if value >= pair[1]), UNITS[-1])
    digits = f"{value / size:#.3g}"
    return f"{digits.rstrip('.')} {unit}"


def gigabytes(value: float | None) -> str:
    """Memory in a fitting unit; empty where it was not measured."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def is_ours(name: str) -> bool:
    """Whether a contender is this package's."""
    return name.startswith(OURS)


def fastest(contenders: Contenders, ours: bool) -> str | None:
    """The name of the quickest one, ours or of the rivals; None where none runs.

    Of ours neither the reference counts, which is the definition, nor `auto`, which is another's
    second sample, unless it is all there is.
    """
    times = {
        name: result["median_s"]
        for name, result in contenders.items()
        if is_ours(name) == ours and "median_s" in result and name != REFERENCE
    }
    if len(times) > 1:
        times.pop(AUTO, None)
    return min(times, key=lambda name: times[name]) if times else None


def ratio(contenders: Contenders, ours: str | None = None) -> float | None:
    """The best rival's time over our best one's, or over a named one's; None where either lacks."""
    ours, rival = ours or fastest(contenders, True), fastest(contenders, False)
    if ours is None or rival is None or "median_s" not in contenders.get(ours, {}):
        return None
    return contenders[rival]["median_s"] / contenders[ours]["median_s"]


def overview(files: Iterable[ResultFile]) -> str:
    """A line for each suite and machine: in how many benchmarks ours is quicker, by how much."""
    lines = [
        "| suite | machine | compared | quicker | rival / ours: lowest | median | highest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for file in files:
        found = [ratio(cell["contenders"]) for cell in file.cells.values()]
        factors = [factor for factor in found if factor is not None]
        if factors:
            numbers = (min(factors), statistics.median(factors), max(factors))
            lines.append(
                f"| [{file.suite}](suites/{file.suite}.md) "
                f"| {file.runs[0]['device']}, {file.date} "
                f"| {len(factors)} | {sum(factor >= 1 for factor in factors)} | "
                + " | ".join(f"{number:.2f}" for number in numbers)
                + " |"
            )
    return "\n".join(lines) if len(lines) > 2 else "No result yet."


def suite_table(file: ResultFile) -> str:
    """Everything about a suite on a machine: tables, who does not run, conditions."""
    parts = [f"**{file.runs[0]['device']}, {file.date}**"]
    timed = {n: c for n, c in file.cells.items() if _any(c["contenders"], "median_s")}
    memory = {
        n: c
        for n, c in file.cells.items()
        if n not in timed and _any(c["contenders"], "peak_bytes")
    }
    profiled = {n: c for n, c in file.cells.items() if _any(c["contenders"], "shares")}
    if timed:
        parts += [_glance(timed), _summary(timed), f"Everything:\n\n{_time_table(timed)}"]
    if memory:
        parts.append(_memory_table(memory))
    if profiled:
        parts.append(_shares_table(profiled))
    absences = _absences(file.cells)
    if absences:
        parts.append("Does not run:\n\n" + "\n".join(absences))
    parts.append(_conditions(file))
    return "\n\n".join(parts)


def _any(contenders: Contenders, field: str) -> bool:
    return any(field in result for result in contenders.values())


def _glance(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """The time of our best backend and of the best rival, nothing else."""
    lines = [
        "| | ours | best rival | rival / ours | of floor |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, cell in cells.items():
        found = cell["contenders"]
        ours, rival, factor = fastest(found, True), fastest(found, False), ratio(found)
        share = found[ours].get("of_floor") if ours else None
        times = [
            "does not run" if n is None else seconds(found[n]["median_s"]) for n in (ours, rival)
        ]
        shown = "" if factor is None else f"{factor:.2f}" if factor >= 1 else f"**{factor:.2f}**"
        floor = "" if share is None else f"{100 * share:.0f} %"
        lines.append("| " + " | ".join([name, *times, shown, floor]) + " |")
    return "\n".join(lines)


def _time_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| | floor | ours | of floor | peak | best rival | peak | rival / ours | / auto | others |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for name, cell in cells.items():
        contenders = cell["contenders"]
        ours, rival = fastest(contenders, True), fastest(contenders, False)
        work = cell.get("work")
        factors = [ratio(contenders), ratio(contenders, AUTO)]
        floor = f"{seconds(work['floor_s'])} ({work['bound']})" if work else ""
        share = contenders[ours].get("of_floor") if ours else None
        others = [
            f"{who} {seconds(result['median_s'])}"
            for who, result in sorted(contenders.items(), key=lambda x: x[1].get("median_s", 0))
            if who not in (ours, rival) and "median_s" in result
        ]
        row = [
            name,
            floor,
            _time(contenders, ours),
            "" if share is None else f"{100 * share:.0f} %",
            _peak(contenders, ours),
            _time(contenders, rival),
            _peak(contenders, rival),
            *("" if factor is None else f"{factor:.2f}" for factor in factors),
            ", ".join(others),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _time(contenders: Contenders, name: str | None) -> str:
    if name is None:
        return "does not run"
    result = contenders[name]
    label = name.removeprefix("blip2fast ")
    low, high = (seconds(result[key]) for key in ("q1_s", "q3_s"))
    text = f"{label} {seconds(result['median_s'])} ({low} to {high})"
    if "phases_s" in result:
        text += ": " + ", ".join(f"{n} {seconds(s)}" for n, s in result["phases_s"].items())
    if "host_s" in result:
        text += f"; queued in {seconds(result['host_s'])}"
    found = rates(result)
    return f"{text}: {', '.join(found)}" if found else text


def rates(result: Mapping[str, Any]) -> list[str]:
    """What a second gives, and how long one process reads a batch, where that was measured."""
    names = {"images_per_s": "images/s", "pairs_per_s": "pairs/s"}
    found = [f"{result[name]:.3g} {unit}" for name, unit in names.items() if name in result]
    if "reading_s" in result:
        found.append(f"a batch read in {seconds(result['reading_s'])}")
    return found


def _peak(contenders: Contenders, name: str | None) -> str:
    return "" if name is None else gigabytes(contenders[name].get("peak_bytes"))


def _summary(cells: Mapping[str, Mapping[str, Any]]) -> str:
    factors = {name: ratio(cell["contenders"]) for name, cell in cells.items()}
    behind = [f"`{name}` {f:.2f}" for name, f in factors.items() if f is not None and f < 1]
    compared = sum(factor is not None for factor in factors.values())
    if not behind:
        return f"Ours is the fastest in all {compared} that have a rival."
    return f"Slower than the best rival in {len(behind)} of {compared}: {', '.join(behind)}."


def _memory_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["contenders"]))
    lines = ["| peak | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for name, cell in cells.items():
        found = cell["contenders"]
        row = [
            gigabytes(found[who]["peak_bytes"])
            if "peak_bytes" in found.get(who, {})
            else found.get(who, {}).get("does_not_run", "")
            for who in names
        ]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _shares_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        f"{name}, {who}": result["shares"]
        for name, cell in cells.items()
        for who, result in cell["contenders"].items()
        if "shares" in result
    }
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    lines = ["| share of the time | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for name, row in rows.items():
        values = [f"{100 * row[kind]:.0f} %" if kind in row else "" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _absences(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each contender and reason, with how many cells it is about."""
    counts: dict[tuple[str, str], int] = {}
    for cell in cells.values():
        for name, result in cell["contenders"].items():
            reason = result.get("does_not_run") or result.get("failed")
            if reason:
                counts[name, reason] = counts.get((name, reason), 0) + 1
    return [f"* {name} ({count} rows): {why}" for (name, why), count in counts.items()]


def _conditions(file: ResultFile) -> str:
    lines = []
    for run in file.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        where = f"{run['cores']} cores of {run['processor']}, {run['threads']} threads"
        if run.get("keeps_freed_memory"):
            where += ", freed memory kept by the process"
        lines.append(f"* {where}; {versions}; commit {run['commit'][:8]}; `{run['command']}`")
    if not file.on_gpu:
        lines += [f"* {told}" for told in dict.fromkeys(describe(run) for run in file.runs)]
    sources = {
        c["ceilings"]["source"]: c["ceilings"] for c in file.cells.values() if "ceilings" in c
    }
    for source, rates in sources.items():
        lines.append(
            f"* ceilings ({source}): {rates['flops_per_s'] / 1e12:.3g} TFLOP/s, "
            f"{rates['bytes_per_s'] / 1e9:.3g} GB/s"
        )
    return "\n".join(lines)


def sweep_table(sweep: Mapping[str, Any]) -> str:
    """The quickest configuration of each kernel that a sweep timed, and what the formula gave."""
    lines = [
        "| kernel, bf16 | dropout | floor | quickest | of floor | by formula | configuration |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    cells: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for row in sweep["rows"]:
        if row.get("agrees"):
            cells.setdefault((row["case"], row["dropout"]), {})[row["configuration"]] = row
    for (case, dropout), found in cells.items():
        best = min(found.values(), key=lambda row: row["median_s"])
        formula = found.get("default", {}).get("median_s")
        lines.append(
            f"| {case} | {dropout:g} | {seconds(best['floor_s'])} | {seconds(best['median_s'])} "
            f"| {100 * best['of_floor']:.0f} % | {seconds(formula) if formula else ''} "
            f"| {best['configuration']} |"
        )
    run = sweep["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += ["", f"{run['device']}, {run['date']}; {versions}; commit {run['commit'][:8]}."]
    return "\n".join(lines)


def records_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Kinds of calls whose kernels passed the check on a card."""
    lines = ["| op, backend | kind | ours | instead | |", "|---|---|---:|---|---:|"]
    cards: dict[str, None] = {}
    for record in records:
        ours, rival = (seconds(record[name] * 1e-6) for name in ("ours_us", "rival_us"))
        lines.append(
            f"| {record['op']}, {record['backend']} | {record['kind']} | {ours} "
            f"| {record['rival']} | {rival} |"
        )
        cards[f"{record['card']}, torch {record['torch']}, triton {record['triton']}"] = None
    return "\n".join([*lines, "", "; ".join(cards) + "."]) if cards else "None yet."


# suite, benchmark, what it is, ours, the rival
HEADLINES = (
    ("stage1_step", "step[vit_g_b8-fp32]", "stage-1 step, 8 pairs, fp32", "blip2fast", "textbook"),
    ("stage1_step", "step[vit_g_b8-bf16]", "stage-1 step, 8 pairs, bf16", "blip2fast", "textbook"),
    (
        "itc",
        "itc[n1680_cpu-fp32-train]",
        "ITC with gradients, 1,680 pairs, fp32",
        "blip2fast auto",
        "torch matmul, amax",
    ),
    (
        "qformer",
        "forward[vit_g_b1-fp32]",
        "`QFormer` on one image, fp32, inference",
        "blip2fast",
        "transformers sdpa",
    ),
)


# the same on a GPU
GPU_HEADLINES = (
    *(
        (
            "stage1_step",
            f"step[vit_g_b{batch}_{dropout}cuda-bf16]",
            f"stage-1 step, {batch} pairs, bf16{', dropout' if dropout else ''}",
            "blip2fast",
            rival,
        )
        for batch, dropout in ((256, ""), (256, "dropout_"), (64, "dropout_"))
        for rival in ("textbook", "blip2fast, no kernels")
    ),
    *(
        (
            "itc",
            f"itc[n{pairs}-bf16-train]",
            f"ITC with gradients, {pairs:,} pairs, bf16",
            "blip2fast auto",
            "torch matmul, amax",
        )
        for pairs in (1680, 4096, 16_384)
    ),
)


def headlines(
    files: Mapping[str, Sequence[ResultFile]], rows: Sequence[tuple[str, ...]] = HEADLINES
) -> str:
    """A few rows of suites, each against the rival that its users have today.

    Args:
        files: By suite, its results on each machine. Times are those of the newest one that ran the
            benchmark; "times faster" is the range over all runs.
        rows: Suite, benchmark, title, ours, rival.
    """
    lines = [
        "| | blip2fast | peak | rival | | peak | times faster |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for suite, cell, title, ours, rival in rows:
        timed = [
            (file.cells[cell]["contenders"][ours], file.cells[cell]["contenders"][rival])
            for file in sorted(files.get(suite, ()), key=lambda file: file.date, reverse=True)
            if cell in file.cells and _both_timed(file.cells[cell]["contenders"], ours, rival)
        ]
        if timed:
            us, them = timed[0]
            factors = sorted(b["median_s"] / a["median_s"] for a, b in timed)
            span = f"{factors[0]:.2f}"
            if len(factors) > 1:
                span += f" to {factors[-1]:.2f} in {len(factors)} runs"
            lines.append(
                f"| {title} | {seconds(us['median_s'])} | {us['peak_bytes'] / 1e6:,.0f} MB "
                f"| {rival} | {seconds(them['median_s'])} | {them['peak_bytes'] / 1e6:,.0f} MB "
                f"| {span} |"
            )
    return "\n".join(lines)


def _both_timed(contenders: Contenders, ours: str, rival: str) -> bool:
    return all("median_s" in contenders.get(name, {}) for name in (ours, rival))
