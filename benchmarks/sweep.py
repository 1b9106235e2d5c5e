"""Time the configurations of `kernel_configurations.py` on a GPU, each against the default.

The default is what the formula gives, whatever `tune.py` wrote down before.

    python benchmarks/sweep.py OUT.json [--seconds 110] [--workers 12] [--only NAME...]
    python benchmarks/sweep.py --compile    # beforehand, beside other work

Workers first compile all configurations at once. Then every kernel's are looked at for agreement
with its reference, and timed in turns from CUDA graphs. An error that ends a process costs the
configuration that made it, not the sweep: the rest goes on in a new process. Results are written
after each kernel; what time did not suffice for is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from comparing import one_line
from kernel_configurations import CASES, Case, Outputs
from machines import ceilings, run_conditions
from timing import Sampler, Spread, graph_sampler, input_sets, stopwatch

from blip2fast.kernels.launch import capability

DROPOUT = 0.1
# relative norm from the fp32 reference, of results in 16 bits
TOLERANCE = 2e-2
ROUNDS = 15
Key = tuple[str, float, str]


def keys(only: Sequence[str]) -> list[Key]:
    """`(case, dropout, configuration)` of everything to time; what has no dropout stands once."""
    found = []
    for case in CASES:
        if only and not any(part in case.name for part in only):
            continue
        rates = (0.0, DROPOUT) if has_dropout(case) else (0.0,)
        found += [(case.name, p, name) for p in rates for name in case.configurations]
    return found


def has_dropout(case: Case) -> bool:
    """Whether a kernel draws a dropout mask."""
    return not case.name.startswith(("gelu", "itc"))


def case_of(name: str) -> Case:
    """The case of a name."""
    return next(case for case in CASES if case.name == name)


def compile_one(key: Key) -> tuple[Key, str]:
    """Launch a configuration once, so that the compiler's cache holds it; why it does not run."""
    name, p, configuration = key
    case = case_of(name)
    try:
        case.run(case.make(device_of_sweep(), p), case.configurations[configuration])
        wait()
    except Exception as error:  # whatever ends a launch is its result
        return key, f"{type(error).__name__}: {one_line(error)}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return key, ""


def compile_all(found: Sequence[Key], workers: int) -> None:
    """Fill the compiler's cache; what breaks is left to the timing process to report."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, key) for key in found]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool:
            print("a worker died; its configurations compile where they are timed")


def device_of_sweep() -> torch.device:
    """The CUDA device, or the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """For the device, so that an error shows where it was made."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Results:
    """The result file, read again by every process.

    Args:
        path: Of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"conditions": {}, "rows": []}
        if path.exists():
            self.data = json.loads(path.read_text())

    def done(self) -> set[Key]:
        """What has a result or a reason."""
        rows = self.data["rows"]
        return {(row["case"], row["dropout"], row["configuration"]) for row in rows}

    def add(self, key: Key, **values: Any) -> None:
        """One configuration's result."""
        case, p, configuration = key
        row = {"case": case, "dropout": p, "configuration": configuration, **values}
        self.data["rows"].append(row)

    def write(self) -> None:
        """To the file, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        part.replace(self.path)


def difference(found: Outputs, expected: Outputs) -> float:
    """The greatest relative error of any output; NaN or infinite where one is not finite."""
    errors = [0.0]
    for x, truth in zip(found, expected, strict=False):
        if x.numel() and x.is_floating_point():
            x, truth = x.float(), truth.float()
            # a log-sum-exp may be -inf on both sides
            same = x == truth
            x, truth = x.masked_fill(same, 0), truth.masked_fill(same, 0)
            errors.append(float((x - truth).norm() / expected_norm(truth, same)))
    return max(errors, key=lambda e: float("inf") if e != e else e)


def expected_norm(truth: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """A norm that is not 0 where everything is the same to the bit."""
    return truth.norm().clamp(min=1e-30) if not bool(same.all()) else truth.norm() + 1


def time_cases(found: Sequence[Key], results: Results, ends: float) -> None:
    """Case by case, with and without dropout; stops between two where time runs out."""
    groups: dict[tuple[str, float], list[str]] = {}
    for name, p, configuration in found:
        groups.setdefault((name, p), []).append(configuration)
    for (name, p), configurations in groups.items():
        if time.monotonic() > ends:
            print(f"out of time before {name}, dropout {p}")
            return
        time_case(case_of(name), p, configurations, results)
        results.write()
        for line in table(results, name, p):
            print(line, flush=True)


def time_case(case: Case, p: float, configurations: Sequence[str], results: Results) -> None:
    """Agreement, then times in turns, of one kernel."""
    device = device_of_sweep()
    inputs = case.make(device, p)
    size = sum(x.nbytes for x in inputs.values() if isinstance(x, torch.Tensor))
    sets = [inputs] + [case.make(device, p) for _ in range(input_sets(size, device) - 1)]
    if case.reference is None:
        expected = case.run(inputs, case.configurations["default"])
    else:
        expected = case.reference(inputs)
    samplers: dict[str, Sampler] = {}
    errors: dict[str, float] = {}
    for name in configurations:
        configuration = case.configurations[name]
        # read by the parent if this process ends here
        print(f"trying {case.name} {p} {name}", flush=True)
        try:
            errors[name] = difference(case.run(inputs, configuration), expected)
            wait()
            calls = [
                lambda each=each, configuration=configuration: case.run(each, configuration)
                for each in sets
            ]
            if device.type == "cuda":
                samplers[name] = graph_sampler(calls)
            else:
                samplers[name] = Sampler(stopwatch(device), calls, sample_seconds=0.0)
        except Exception as error:  # whatever ends a launch is its result
            results.add(
                (case.name, p, name), does_not_run=f"{type(error).__name__}: {one_line(error)}"
            )
            results.write()
            wait()  # a sticky error ends the process here
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(ROUNDS if device.type == "cuda" else 2):
        order = list(samplers)
        for place in range(len(order)):
            name = order[(turn + place) % len(order)]
            samples[name].append(samplers[name].sample()[""])
    floor_s = floor_of(case, device)
    for name, taken in samples.items():
        spread = Spread.of(taken)
        results.add(
            (case.name, p, name),
            **vars(spread),
            floor_s=floor_s,
            of_floor=floor_s / spread.median_s,
            error=errors[name],
            agrees=errors[name] < TOLERANCE,
        )


def floor_of(case: Case, device: torch.device) -> float:
    """Seconds by the machine's two ceilings; 0 on a CPU, where kernels are only interpreted."""
    if device.type != "cuda":
        return 0.0
    rates = ceilings(device, torch.bfloat16)
    return max(case.flops / rates.flops_per_s, case.bytes / rates.bytes_per_s)


def table(results: Results, case: str, p: float) -> Iterator[str]:
    """A case's rows, quickest first."""
    rows = [r for r in results.data["rows"] if (r["case"], r["dropout"]) == (case, p)]
    ran = sorted((r for r in rows if "median_s" in r), key=lambda r: r["median_s"])
    for row in ran:
        note = "" if row["agrees"] else f"  WRONG, error {row['error']:.1e}"
        yield (
            f"{case:32} {p:4} {row['configuration']:32} {1e6 * row['median_s']:9.1f} us "
            f"{100 * row['of_floor']:4.0f} %{note}"
        )
    for row in rows:
        if "does_not_run" in row:
            yield f"{case:32} {p:4} {row['configuration']:32} {row['does_not_run']}"


def sweep_in_children(arguments: argparse.Namespace) -> int:
    """Time in a process of its own, and in another one where that ends early."""
    ends = time.monotonic() + arguments.seconds
    wanted = keys(arguments.only)
    if not arguments.compiled:
        compile_all(wanted, arguments.workers)
        print(f"compiled after {arguments.seconds - (ends - time.monotonic()):.0f} s", flush=True)
    while time.monotonic() < ends:
        left = [key for key in wanted if key not in Results(arguments.out).done()]
        if not left:
            return 0
        command = [sys.executable, __file__, str(arguments.out), "--child"]
        command += ["--seconds", f"{ends - time.monotonic():.0f}"]
        if arguments.only:
            command += ["--only", *arguments.only]
        trying = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                if line.startswith("trying "):
                    name, p, configuration = line.split()[1:]
                    trying = (name, float(p), configuration)
                else:
                    print(line, end="", flush=True)
            status = child.wait()
        results = Results(arguments.out)
        if status == 0:
            return 0
        if trying is None:
            print(f"the timing process ended with {status} before it began")
            return 1
        if trying not in results.done():
            results.add(trying, does_not_run=f"its process ended with {status}")
            results.write()
    return 0


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "out", nargs="?", type=Path, help="JSON file; what it has is not timed again"
    )
    parser.add_argument("--compile", action="store_true", help="time nothing")
    parser.add_argument("--compiled", action="store_true", help="that was done")
    parser.add_argument("--seconds", type=float, default=110, help="most seconds to take")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of cases")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="the commit that results name where there is no .git")
    arguments = parser.parse_args()
    if not keys(arguments.only):
        parser.error(f"--only: no case has {arguments.only} in its name")
    if arguments.compile:
        compile_all(keys(arguments.only), arguments.workers)
        return 0
    if arguments.out is None:
        parser.error("OUT.json is missing")
    if arguments.child:
        results = Results(arguments.out)
        done = results.done()
        left = [key for key in keys(arguments.only) if key not in done]
        time_cases(left, results, time.monotonic() + arguments.seconds)
        return 0
    results = Results(arguments.out)
    results.data["conditions"] = run_conditions(arguments.commit)
    if torch.cuda.is_available():
        results.data["conditions"]["capability"] = capability(torch.device("cuda"))
    results.write()
    return sweep_in_children(arguments)


if __name__ == "__main__":
    sys.exit(main())
