"""Tables of the kernel model's file beside what was measured, for docs/kernel_model.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tables import seconds

Row = Mapping[str, Any]
_KINDS = (
    "tensor",
    "special",
    "fp32",
    "integer",
    "shuffle",
    "shared",
    "global",
    "barrier",
    "uniform",
)
_RELEASE = "triton 3.6"


def _compilers(data: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in data if name.startswith("triton "))


def _of_release(data: Mapping[str, Any], release: str, part: str) -> list[Row]:
    """The rows of the compiler whose name begins so."""
    found = [name for name in _compilers(data) if name.startswith(release)]
    return list(data[found[-1]].get(part, ())) if found else []


def _times(sweep: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    return {_key(row): row["median_s"] for row in sweep if "median_s" in row}


def _key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["dropout"], row["configuration"]


def _each(row: Row, show: Any) -> str:
    """Of every launch, once where all are the same."""
    found = [show(launch) for launch in row["launches"]]
    return " / ".join(found[:1] if len(set(found)) == 1 else found)


def unhidden_s(row: Row) -> float:
    """The time that is left if nothing waited for latency: of each launch the longest other part,
    and PyTorch's own launches.
    """
    found = max(0.0, row["predicted_s"] - sum(x["seconds"] for x in row["launches"]))
    for launch in row["launches"]:
        parts = {name: x for name, x in launch["parts_s"].items() if name != "latency"}
        found += max(parts.values())
    return found


def _code(row: Row) -> list[str]:
    """Columns about the machine code."""

    def registers(launch: Row) -> str:
        spilled = f" + {launch['stack_bytes']} B" if launch["stack_bytes"] else ""
        return f"{launch['registers']}{spilled}"

    return [
        _each(row, registers),
        _each(row, lambda x: f"{x['shared_bytes'] / 1024:.0f}"),
        _each(row, lambda x: f"{x['blocks']} x {x['warps']} ({x['limit']})"),
        _each(row, lambda x: f"{x['waves']:.1f}"),
    ]


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %"


def _measured(row: Row, times: Mapping[tuple[Any, ...], float]) -> list[str]:
    """Measured time, its share of the floor, the model's error."""
    time = times.get(_key(row))
    if time is None:
        return ["", "", ""]
    share = f"{100 * row['floor_s'] / time:.0f} %"
    return [seconds(time), share, _error(row["predicted_s"], time)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _name(row: Row) -> list[str]:
    return [str(row["case"]), f"{row['dropout']:g}"]


_HEAD = ["kernel, bf16", "dropout"]
_CODE = ["registers + spilled", "shared, KB", "blocks x warps (limit)", "waves"]
_TIMES = ["floor", "predicted", "of floor", "measured", "of floor", "error"]


def measured_card_table(data: Mapping[str, Any], sweep: Sequence[Row]) -> str:
    """What `auto` launches on the card that was measured, beside its times."""
    times, lines = _times(sweep), []
    for row in _of_release(data, _RELEASE, "shipped"):
        if row["card"] != "H200":
            continue
        if "not_modelled" in row:
            lines.append([*_name(row), row["not_modelled"], *[""] * 13])
            continue
        lines.append(
            [
                *_name(row),
                f"{row['configuration'] or 'its own'}",
                *_code(row),
                seconds(row["floor_s"]),
                seconds(row["predicted_s"]),
                f"{100 * row['of_floor']:.0f} %",
                *_measured(row, times),
                _each(row, lambda x: x["bound"]),
                seconds(unhidden_s(row)),
                str(row["plain_launches"]),
            ]
        )
    head = [*_HEAD, "configuration", *_CODE, *_TIMES, "waits for", "if latency were hidden"]
    head.append("PyTorch's launches")
    name = next((x for x in _compilers(data) if x.startswith(_RELEASE)), None)
    return _table(head, lines) + (_told(data, name) if name else "")


def instructions_table(data: Mapping[str, Any]) -> str:
    """The inner loops of the same launches."""
    lines = []
    seen = set()
    rows = [*_of_release(data, _RELEASE, "shipped"), *data.get("nvcc", {}).get("shipped", ())]
    for row in rows:
        if row["card"] != "H200" or "not_modelled" in row:
            continue
        for launch in row["launches"]:
            loop = launch["inner_loop"]
            own = (launch["kernel"], row["dropout"], tuple(loop.items()))
            if own in seen:
                continue
            seen.add(own)
            counts = [str(loop.get(name, 0)) for name in _KINDS]
            trips = ", ".join(f"{x:g}" for x in launch["trips"]) or "no loop"
            lines.append([launch["kernel"], *_name(row), trips, str(sum(loop.values())), *counts])
    return _table(["function", *_HEAD, "trips", "instructions", *_KINDS], lines)


def cuda_table(data: Mapping[str, Any], profile: Mapping[str, Sequence[float]]) -> str:
    """The kernels of csrc/, beside what a profile of a step with dropout says.

    Args:
        data: The model's file.
        profile: By a kernel's name, its launches and microseconds in all.
    """

    def each(part: str) -> float:
        found = [value for name, value in profile.items() if part in name]
        return 1e-6 * found[0][1] / found[0][0] if found else 0.0

    fused = each("backward_queries_kernel<blip2fast::BFloat16, 64, 2, true>")
    apart = each("backward_queries_kernel<blip2fast::BFloat16, 64, 2, false>")
    keys = each("cross_attention_backward_keys_kernel")
    times = {
        ("cross_backward_32x257_b256", 0.1, "cuda"): fused,
        ("cross_backward_32x257_n768_b256", 0.1, "cuda"): apart + keys,
    }
    times = {key: value for key, value in times.items() if value}
    lines, forward = [], 0.0
    for row in data.get("nvcc", {}).get("shipped", ()):
        if "not_modelled" in row:
            lines.append([row["card"], *_name(row), row["not_modelled"], *[""] * 11])
            continue
        on_h200 = row["card"] == "H200"
        if on_h200 and row["case"].startswith("cross_forward"):
            forward += row["predicted_s"]
        lines.append(
            [
                row["card"],
                *_name(row),
                *_code(row),
                seconds(row["floor_s"]),
                seconds(row["predicted_s"]),
                f"{100 * row['of_floor']:.0f} %",
                *_measured(row, times if on_h200 else {}),
                _each(row, lambda x: x["bound"]),
                seconds(unhidden_s(row)),
            ]
        )
    head = ["card", *_HEAD, *_CODE, *_TIMES, "waits for", "if latency were hidden"]
    text = _table(head, lines)
    both = 2 * each("cross_attention_forward_kernel")
    if both and forward:
        text += (
            "\n\nThe profile has the forward pass at both sizes together: predicted "
            f"{seconds(forward)}, measured {seconds(both)}, {_error(forward, both)}."
        )
    return text


def cards_table(data: Mapping[str, Any]) -> str:
    """What `auto` launches on every card, compiled by the newest Triton."""
    compilers = _compilers(data)
    lines = []
    for row in data[compilers[-1]].get("shipped", ()) if compilers else ():
        if "not_modelled" in row:
            lines.append([row["card"], *_name(row), row["not_modelled"], *[""] * 7])
            continue
        lines.append(
            [
                row["card"],
                *_name(row),
                *_code(row),
                seconds(row["floor_s"]),
                seconds(row["predicted_s"]),
                f"{100 * row['of_floor']:.0f} %",
                _each(row, lambda x: x["bound"]),
            ]
        )
    head = ["card", *_HEAD, *_CODE, "floor", "predicted", "of floor", "waits for"]
    return _table(head, lines) + (_told(data, compilers[-1]) if compilers else "")


def _told(data: Mapping[str, Any], name: str) -> str:
    """Which compiler, and which kernels."""
    return f"\n\nCompiled by {name}; kernels of commit {data[name].get('commit', 'unknown')}."


def errors(data: Mapping[str, Any], sweep: Sequence[Row]) -> dict[str, list[float]]:
    """By case, predicted over measured less 1 of every configuration that was timed."""
    times = _times(sweep)
    found: dict[str, list[float]] = {}
    for row in _of_release(data, _RELEASE, "sweep"):
        if _key(row) in times and "predicted_s" in row:
            error = row["predicted_s"] / times[_key(row)] - 1
            found.setdefault(row["case"], []).append(error)
    return found


def sweep_errors_table(data: Mapping[str, Any], sweep: Sequence[Row]) -> str:
    """How far the model is off, and what it would cost to choose by it."""
    times = _times(sweep)
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in _of_release(data, _RELEASE, "sweep"):
        if _key(row) in times and "predicted_s" in row:
            groups.setdefault((row["case"], row["dropout"]), []).append(row)
    lines = []
    for (case, dropout), rows in groups.items():
        off = [row["predicted_s"] / times[_key(row)] - 1 for row in rows]
        chosen = min(rows, key=lambda row: row["predicted_s"])
        quickest = min(times[_key(row)] for row in rows)
        lines.append(
            [
                case,
                f"{dropout:g}",
                str(len(rows)),
                f"{100 * median(off):+.0f} %",
                f"{100 * min(off):+.0f} % to {100 * max(off):+.0f} %",
                f"{100 * (times[_key(chosen)] / quickest - 1):.0f} %",
            ]
        )
    head = [*_HEAD, "configurations", "median error", "from, to", "its choice is slower by"]
    every = [abs(x) for found in errors(data, sweep).values() for x in found]
    if not every:
        return "No result yet."
    within = sum(x <= 0.1 for x in every)
    told = (
        f"\n\nAll {len(every)} configurations: half are within {100 * median(every):.0f} %, "
        f"{within} within 10 %, the worst is off by {100 * max(every):.0f} %."
    )
    return _table(head, lines) + told


def assumptions_table(data: Mapping[str, Any]) -> str:
    """Of cards, then the constants that were set by the measured times."""
    lines = []
    for card in data["cards"]:
        rates = ", ".join(f"{name} {value:g}" for name, value in card["cycles"].items())
        lines.append(
            [
                f"{card['name']} (sm_{card['capability']})",
                str(card["multiprocessors"]),
                f"{card['clock_hz'] / 1e9:g}",
                f"{card['bytes_per_s'] / 1e12:g}",
                f"{card['l2_bytes_per_s'] / 1e12:g}",
                f"{card['flops_per_s'] / 1e12:g}",
                f"{card['fma_per_cycle']:g}",
                rates,
                card["source"],
            ]
        )
    head = ["card", "multiprocessors", "GHz", "memory, TB/s", "L2, TB/s", "TFLOP/s"]
    head += ["mma products a cycle", "cycles of a partition for a warp's instruction", "rates from"]
    at = data["constants"]
    told = (
        f"Cycles: from a load to its value {at['memory_cycles']}, where it was asked for ahead "
        f"{at['cached_cycles']}; a barrier {at['barrier_cycles']}; the last product's sums "
        f"{at['tensor_cycles']}. A launch in a graph costs {at['launch_s'] * 1e6:g} µs, one of "
        f"PyTorch's own {at['plain_s'] * 1e6:g} µs. Soft maxima have exponents {at['sharpness']} "
        f"(of a multiprocessor) and {at['overlap']} (of computing and moving)."
    )
    return f"{_table(head, lines)}\n\n{told}"
