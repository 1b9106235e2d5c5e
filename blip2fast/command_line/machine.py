"""`blip2fast kernels check`, `doctor`, `bench`: this machine, and what runs on it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2fast.command_line.options import on_terminal, show_table

Precision = Literal["bf16", "fp16", "fp32"]

app = typer.Typer(help="The library's own GPU kernels.", no_args_is_help=True)


@app.command()
def check(
    device: Annotated[str | None, typer.Option(help="By default the first CUDA device.")] = None,
    precision: Precision = "bf16",
    again: Annotated[bool, typer.Option("--again", help="Check all, whatever is known.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile; by default up to 8.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what is known as JSON, too.")
    ] = None,
) -> None:
    """Find out which of the library's own kernels are right and quicker on this GPU.

    Checks the kernels that both stages and inference run, where nobody has yet, and prints a line
    for each. docs/kernels.md says how.

    Example: blip2fast kernels check --precision bf16
    """
    if out is not None:
        from blip2fast.inference.results import check_writable

        check_writable(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    from blip2fast.ops import check_kernels
    from blip2fast.ops.kernel_kinds import DTYPES
    from blip2fast.ops.records import Record, write_records

    made: list[Record] = []

    def tell(record: Record) -> None:
        # save each record immediately: a command that is cut off keeps its results
        made.append(record)
        print(f"{record} ({record.seconds:.0f} s)", flush=True)
        if out is not None:
            write_records(out, made)

    records = check_kernels(device, DTYPES[precision], again=again, jobs=jobs, tell=tell)
    if out is not None:
        write_records(out, records)
    if not records:
        print("no CUDA device: nothing to check")
        return
    for record in records:
        if record not in made:
            print(f"{record}, as recorded before")
    right = sum(not record.fault for record in records)
    print(f"{right} of {len(records)} kinds are right and quicker here")


def doctor(precision: Precision = "bf16") -> None:
    """Print what a bug report should carry.

    Versions, devices, the extension, and for every op the backend that would run and why others
    would not: plain lines where the output goes to a file. Nothing is checked or compiled.

    Example: blip2fast doctor --precision fp32
    """
    from blip2fast.doctor import machine, op_table, report
    from blip2fast.ops.kernel_kinds import DTYPES

    if not on_terminal():
        print(report(DTYPES[precision]))
        return
    print("\n".join(machine()))
    show_table(op_table(DTYPES[precision]), left=(0, 1, 3))


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout: `pytest benchmarks/ --benchmark-only`.

    Under ten minutes on 2 cores, with `--full` about an hour. What follows goes to pytest.

    Example: blip2fast bench -k itc
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ValueError(
            "the benchmarks are not in the wheel: clone the repository, run `pip install -e "
            "'.[dev]'` there, then `blip2fast bench`"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the benchmarks need {' and '.join(missing)}: run `pip install -e '.[dev]'` in {root}"
        )
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)
