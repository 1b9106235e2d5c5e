"""How the cost of a step grows: counted against each size, timed against some.

    python benchmarks/scaling.py counts        # minutes; benchmarks/results/DATE_scaling.json
    python benchmarks/scaling.py times N B S   # minutes each, one idle core; _scaling-times.json
    python benchmarks/report.py                # then docs/scaling.md and its plots

What is counted is the same on every machine with the same PyTorch; the names of a feature cache
are weighed as well. Of times those of a day are kept together. On a machine with other work,
`chrt -r 5 taskset -c 0` before the command gives it one core to itself; results say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

# this checkout is measured, whichever is installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from results import RESULTS, rounded

ROOT = Path(__file__).parent.parent
SIZES = ("N", "B", "S")
# GPUs of the paper and of a cluster, eight a machine
GPUS, GPUS_A_MACHINE = (16, 512), 8
PLANNED = ("vitg_stage1", "vitg_opt2.7b_stage2", "vitg_flant5xxl_stage2")


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def count() -> dict[str, Any]:
    """Everything that does not depend on the machine, and the names of a cache."""
    # fixes the products' library for the process, so not where times are taken
    import cache_index
    import full_size
    import plans
    import scaling_counts
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"conditions": _conditions(), "sweeps": {}, "processes": {}}
    for sweep in scaling_counts.SWEEPS:
        say(f"against {sweep.size}")
        found["sweeps"][sweep.size] = scaling_counts.sweep_counts(sweep)
    for world in sorted({*scaling_counts.PROCESSES, scaling_counts.HELD_OUT_PROCESSES}):
        say(f"{world} process(es)")
        found["processes"][world] = scaling_counts.processes(world)
    say("published sizes")
    found["full_size"] = full_size.measure()
    found["plans"] = {}
    with plans.published_folder() as models:
        for gpus in GPUS:
            cluster = plans.Cluster(gpus, gpus // GPUS_A_MACHINE)
            for recipe in PLANNED:
                path = ROOT / "configs" / f"{recipe}.yaml"
                for stage in scaling_counts.ZERO_STAGES:
                    planned = plans.plan(path, models, cluster, [f"zero_stage={stage}"])
                    found["plans"][f"{recipe}, {gpus}, {stage}"] = planned
    say("names of a feature cache")
    found["cache_index"] = cache_index.measure()
    return found


def take_times(sizes: list[str]) -> dict[str, Any]:
    """Time and peak memory against each of some sizes."""
    import scaling_times
    import torch

    from blip2fast._heap import keep_freed_memory

    torch.set_num_threads(1)
    kept, found = keep_freed_memory(), {}
    for size in sizes:
        say(f"against {size}")
        values = scaling_times.measure(scaling_times.SWEEPS[size], say=say)
        conditions = _conditions() | {"keeps_freed_memory": kept}
        found[size] = {"conditions": conditions, "values": values}
    return found


def _conditions() -> dict[str, Any]:
    from machines import run_conditions

    scheduler = os.sched_getscheduler(0)
    return {
        **run_conditions(),
        "load_average": os.getloadavg()[0],
        "own_core": scheduler in (os.SCHED_RR, os.SCHED_FIFO),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("counts", help="what can be counted, on every machine the same")
    times = commands.add_parser("times", help="time and peak memory, on this machine")
    times.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}; default: all")
    given = parser.parse_args()
    for size in getattr(given, "sizes", []):
        if size not in SIZES:
            parser.error(f"size {size!r}: expected one of {', '.join(SIZES)}")
    name = "scaling" if given.command == "counts" else "scaling-times"
    path = RESULTS / f"{datetime.date.today().isoformat()}_{name}.json"
    if given.command == "counts":
        result = count()
    else:
        result = json.loads(path.read_text()) if path.exists() else {}
        result |= take_times(given.sizes or list(SIZES))
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
