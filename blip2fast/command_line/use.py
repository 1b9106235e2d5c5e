"""`blip2fast report` and `demo`: what a run shows of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.")],
) -> None:
    """Write report.html into the folder of a run, also while it trains: one file, no network.

    Example: blip2fast report runs/scenes/stage1
    """
    from blip2fast.reporting.run_report import write_report

    for run in runs:
        print(write_report(run))


def demo(context: typer.Context) -> None:
    """Train both stages on rendered scenes, on a CPU, and judge them on held-out images.

    Everything lands in runs/scenes. `blip2fast demo --help` lists its options.

    Example: blip2fast demo --fast
    """
    from blip2fast._imports import needs

    with needs("run the demo", "matplotlib", "rich", "sklearn"):
        from blip2fast.demo.run import main

    raise typer.Exit(main(context.args, "blip2fast demo"))
