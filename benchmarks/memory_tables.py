"""Tables of docs/memory_and_speed.md: memory plans of the recipes, steps of stage 1 by batch; and
of docs/data.md: start and memory of a run by a large table of records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from results import ResultFile
from tables import gigabytes, seconds

GIB = 2**30
# how an option of a plan is told apart: where the language model is; in a cell, whether layers are
# recomputed
RECOMPUTED = ", gradient_checkpointing"


def plans(result: dict[str, Any]) -> str:
    """Parameters and parts of each recipe's first option, then device and host memory of all."""
    found, cluster = result["plans"], result["conditions"]["cluster"]
    stage2 = {name: plan for name, plan in found.items() if "language model" in plan["parameters"]}
    versions = ", ".join(f"{n} {v}" for n, v in result["conditions"]["versions"].items())
    told = (
        f"{cluster['processes']} processes on {cluster['machines']} machines, "
        f"{cluster['device_gib']} GiB a device, {cluster['host_gib']} GiB of host memory a "
        f"machine, ZeRO-1 for the trained part; {versions}; commit "
        f"{result['conditions']['commit'][:8]}."
    )
    return "\n\n".join([_parts(found), _places(stage2), told])


def _parts(found: dict[str, Any]) -> str:
    kinds = ("language model", "image encoder", "trained", "optimiser", "activations", "logits")
    lines = [
        "| recipe | frozen language model | image encoder | trained | samples a process "
        f"| GiB: {' | '.join(kinds)} | sum | `auto` takes |",
        "|---|" + "---:|" * (5 + len(kinds)) + "---|",
    ]
    for name, plan in found.items():
        first = plan["options"][0]
        counts = [
            f"{plan['parameters'][kind]:,}" if kind in plan["parameters"] else ""
            for kind in ("language model", "image encoder", "trained")
        ]
        parts = [_gib(first["device"].get(kind, 0)) for kind in kinds]
        total = _gib(sum(first["device"].values()))
        chosen = plan["chosen"].replace(RECOMPUTED, ", recomputed") if plan["chosen"] else "nothing"
        cells = [name, *counts, str(plan["batch_size"]), *parts, total, chosen]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _places(found: dict[str, Any]) -> str:
    """A column for each place of the language model: GiB on each device, of each process's host."""
    names = [option["name"] for plan in found.values() for option in plan["options"]]
    places = list(dict.fromkeys(name.replace(RECOMPUTED, "") for name in names))
    lines = [
        "| GiB on a device / of a process on the host | "
        + " | ".join(f"`{place}`" for place in places)
        + " |",
        "|---|" + "---:|" * len(places),
    ]
    for name, plan in found.items():
        by_name = {option["name"]: option for option in plan["options"]}
        for way in ("", RECOMPUTED):
            cells = [_pair(by_name.get(place + way)) for place in places]
            if any(cells):
                recomputed = ", recomputed" if way else ""
                lines.append(f"| {name}{recomputed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(option: dict[str, Any] | None) -> str:
    if option is None:
        return ""
    said = f"{_gib(sum(option['device'].values()))} / {_gib(option['host'])}"
    return said if option["fits"] else f"({said})"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def stage1_steps(files: Sequence[ResultFile]) -> str:
    """Time, pairs a second and peak memory of every stage-1 step, ours and the textbook's."""
    lines = [
        "| | ours | pairs/s | peak | peak a pair | textbook | pairs/s | peak |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for file in files:
        lines.append(f"| **{file.runs[0]['device']}, {file.date}** |" + " |" * 7)
        for name, cell in file.cells.items():
            size, told = re.search(r"_b(\d+)", name), cell["contenders"]
            ours, rival = told.get("blip2fast", {}), told.get("textbook", {})
            if size is None or "median_s" not in ours:
                continue
            pairs = int(size[1])
            row = [
                name.removeprefix("step[").removesuffix("]"),
                *_rate(ours, pairs),
                gigabytes(ours["peak_bytes"]),
                gigabytes(ours["peak_bytes"] / pairs),
                *_rate(rival, pairs),
                gigabytes(rival.get("peak_bytes")),
            ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _rate(told: dict[str, Any], pairs: int) -> tuple[str, str]:
    if "median_s" not in told:
        return "", ""
    return seconds(told["median_s"]), f"{pairs / told['median_s']:,.3g}"


def large_table(result: dict[str, Any]) -> str:
    """Time to the first batch by part, and what each process then holds."""
    rows, run, load = result["rows"], result["conditions"], result["load"]
    parts, workers = result["seconds"], load["workers"]
    total = seconds(sum(parts.values()))
    lines = [
        f"**{rows:,} records, {result['bytes'] / 1e9:.2g} GB: the first batch after {total}**, in "
        f"a fresh process with {workers} workers and nothing of the table in memory: "
        + ", ".join(f"{name} {seconds(value)}" for name, value in parts.items())
        + ".",
        "",
        "| MB | private (USS) | share of all (PSS) | resident (RSS) |",
        "|---|---:|---:|---:|",
        _held("when all is imported, before the records", [result["before"]]),
    ]
    for way, found in result["memory"].items():
        if not found["workers"]:
            lines.append(_held("main process without workers", [found["main"]]))
            continue
        verb = f"{way}ed"
        lines.append(_held(f"main process, workers {verb}", [found["main"]]))
        lines.append(_held(f"a worker, {verb}", found["workers"]))
    told = (
        f"After {load['batches']} batches of {load['batch_size']} records in each row; of workers "
        f"the largest. {run['device']}, {run['cores']} cores, "
        f"{run['memory_bytes'] / 1e9:.0f} GB of memory, load average {run['load_average']:.1f} at "
        f"the start, {run['date']}; Python {run['python']}, torch {run['versions']['torch']}, "
        f"commit {run['commit'][:8]}; `python {run['command']}`."
    )
    return "\n".join([*lines, "", told])


def _held(name: str, processes: Sequence[dict[str, int]]) -> str:
    largest = [max(each[kind] for each in processes) for kind in ("uss", "pss", "rss")]
    return f"| {name} | " + " | ".join(f"{size / 1e6:,.0f}" for size in largest) + " |"
