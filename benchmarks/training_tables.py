"""Tables of training runs: the demo, the ablations, bf16 against fp32."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from blip2fast.demo.table import COLUMNS, FLOORS, ROW_NAMES, SECTIONS


def demo_table(result: dict[str, Any]) -> str:
    """The demo's table in markdown, means over its seeds; losses as they are, the rest in percent.

    The trained model's column also has the range, from the worst to the best seed.
    """
    tables = [run["table"] for run in result["runs"]]
    rows = tables[0]
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
        cells = [
            _over_seeds(kind, [table[name][c] for table in tables], c == "model")
            if c in row
            else ""
            for c in columns
        ]
        gate = f"≥ {100 * FLOORS[name]:.0f}" if name in FLOORS else ""
        lines.append(f"| {ROW_NAMES.get(part, part)} | " + " | ".join(cells) + f" | {gate} |")
    return "\n".join([*lines, "", conditions(result)])


def gates_table(result: dict[str, Any]) -> str:
    """The rows that have a gate: the trained model against shuffled images and the gate."""
    gated = result["source"] == "shapes"
    lines = [
        "| percent | trained | shuffled images |" + (" gate |" if gated else ""),
        "|---|---:|---:|" + ("---:|" if gated else ""),
    ]
    for name, floor in FLOORS.items():
        kind, _, part = name.partition("/")
        cells = [
            _over_seeds(kind, [run["table"][name][c] for run in result["runs"]], c == "model")
            for c in ("model", "shuffled")
        ]
        gate = [f"≥ {100 * floor:.0f}"] if gated else []
        row = f"{SECTIONS[kind]}: {ROW_NAMES[part]}"
        lines.append(f"| {row} | {' | '.join(cells + gate)} |")
    return "\n".join([*lines, "", conditions(result)])


def _over_seeds(kind: str, values: Sequence[float], with_range: bool) -> str:
    scale, digits = (1, 3) if kind == "loss" else (100, 1)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    if not with_range or len(values) == 1:
        return mean
    return f"{mean} ({scale * min(values):.{digits}f} to {scale * max(values):.{digits}f})"


def time_of_a_run(result: dict[str, Any]) -> str:
    """How long the first run took, and what each of its phases took of it."""
    run, machine = result["runs"][0], result["machine"]
    phases = ", ".join(
        f"{name.partition(':')[0]} {phase['seconds']:.0f}" for name, phase in run["phases"].items()
    )
    gates = "every gate met" if not run["unmet_gates"] else f"{len(run['unmet_gates'])} gates unmet"
    return (
        f"In {machine['processes']} processes on {machine['cores']} idle cores seed {run['seed']} "
        f"took {run['from_nothing']['seconds']:.0f} s, {gates}: {phases}."
    )


def conditions(result: dict[str, Any]) -> str:
    """Where and how the numbers were taken, and which gates were not met."""
    machine, runs = result["machine"], result["runs"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "deepspeed")
    )
    cores = machine["cores"]
    where = machine["gpu"] or f"{cores} core{'s' * (cores > 1)} of {machine['processor']}"
    if machine.get("linear", "auto") != "auto":
        where += f", BLIP2FAST_LINEAR={machine['linear']}"
    seeds = [str(run["seed"]) for run in runs]
    which = (
        f"Seeds {', '.join(seeds)}: means, and ranges in brackets"
        if len(seeds) > 1
        else f"Seed {seeds[0]}"
    )
    spent = {
        key: _span([run["from_nothing"][key] for run in runs]) for key in ("seconds", "cpu_seconds")
    }
    unmet = [f"seed {run['seed']}: {gate}" for run in runs for gate in run["unmet_gates"]]
    gates = f" Gates not met: {'; '.join(unmet)}." if unmet else ""
    return (
        f"{which}. {result['settings']['held_out_scenes']} held-out scenes; a run took "
        f"{spent['seconds']} s ({spent['cpu_seconds']} s of CPU time) on {where}; {versions}; "
        f"commit {machine['commit'][:8]}. Losses as they are, the rest in percent.{gates}"
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def ablation_tables(result: dict[str, Any]) -> str:
    """Mean and standard error over seeds of every run, and of differences seed by seed."""
    seeds, schedule = result["seeds"], result["conditions"]["schedule"]
    longer = seeds[0]["steps"]
    stage2 = {
        "after_stage1": f"stage 1 ({schedule['stage1']}), stage 2 ({schedule['stage2']} steps)",
        "alone_equal_steps": f"stage 2 alone, as many of its steps ({schedule['stage2']})",
        "alone_equal_compute": f"stage 2 alone, as many operations ({longer} steps)",
    }
    finetuned = {
        "stage1": f"pretrained on all three ({schedule['stage1']} steps)",
        "itc_itm": f"then fine-tuned on ITC + ITM ({schedule['finetune']} steps)",
        "itc_itm_itg": f"then fine-tuned on ITC + ITM + ITG ({schedule['finetune']} steps)",
    }
    blocks = [
        _seed_table(
            seeds,
            stage2,
            {
                "caption_exact": "captions exact",
                "vqa_read": "VQA, caption then read",
                "loss": "loss",
            },
            [
                ("after_stage1", "alone_equal_steps", "difference, equal steps"),
                ("after_stage1", "alone_equal_compute", "difference, equal operations"),
            ],
        ),
        _seed_table(
            seeds,
            finetuned,
            {
                "t2i_r1": "text to image R@1",
                "i2t_r1": "image to text R@1",
                "rerank_t2i_r1": "re-ranked, text to image",
                "rerank_i2t_r1": "re-ranked, image to text",
            },
            [("itc_itm_itg", "itc_itm", "difference by ITG")],
        ),
    ]
    machine = result["conditions"]
    blocks.append(
        "Mean ± standard error over seeds, in percent but for the loss; differences are taken seed "
        f"by seed. {machine['held_out_scenes']} held-out scenes, batch "
        f"{machine['batch']}, torch {machine['versions']['torch']}, commit "
        f"{machine['commit'][:8]}."
    )
    return "\n\n".join(blocks)


def _seed_table(
    seeds: Sequence[dict[str, Any]],
    runs: dict[str, str],
    metrics: dict[str, str],
    differences: Sequence[tuple[str, str, str]],
) -> str:
    def row(title: str, values: dict[str, list[float]]) -> str:
        return f"| {title} | " + " | ".join(_mean(name, v) for name, v in values.items()) + " |"

    seeds = [seed for seed in seeds if runs.keys() <= seed.keys()]
    head = f"| {len(seeds)} seeds | {' | '.join(metrics.values())} |"
    lines = [head, "|---|" + "---:|" * len(metrics)]
    for run, title in runs.items():
        lines.append(row(title, {m: [seed[run][m] for seed in seeds] for m in metrics}))
    for one, other, title in differences:
        gaps = {m: [seed[one][m] - seed[other][m] for seed in seeds] for m in metrics}
        lines.append(row(f"*{title}*", gaps))
    return "\n".join(lines)


def _mean(name: str, values: Sequence[float]) -> str:
    scale, digits = (1.0, 3) if "loss" in name else (100.0, 1)
    mean = scale * statistics.fmean(values)
    error = scale * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def precision_table(result: dict[str, Any]) -> str:
    """Last losses and held-out retrieval of bf16 and fp32 runs, and whether spreads overlap."""
    runs = result["runs"]
    names = list(runs["fp32"][0])
    lines = [
        "| | fp32 | bf16 | difference of means over its standard error |",
        "|---|---:|---:|---:|",
    ]
    for name in names:
        values = {kind: [run[name] for run in found] for kind, found in runs.items()}
        gap = statistics.fmean(values["bf16"]) - statistics.fmean(values["fp32"])
        spread = math.sqrt(sum(statistics.variance(v) / len(v) for v in values.values()))
        cells = (_mean(name, values[kind]) for kind in ("fp32", "bf16"))
        lines.append(f"| {name} | {' | '.join(cells)} | {gap / spread:+.1f} |")
    told = result["conditions"]
    lines += [
        "",
        f"{len(runs['fp32'])} seeds each, {told['steps']} steps of {told['batch']} pairs; losses "
        "are means of the last five logged ones, retrieval (in percent) is on held-out scenes. "
        f"{told['device']}, torch {told['torch']}, commit {told['commit']}.",
    ]
    return "\n".join(lines)
