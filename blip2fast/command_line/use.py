"""`blip2fast convert`, `report` and `demo`: what a run is used for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2fast.command_line.options import ImageEncoder, LanguageModel, quiet_transformers


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, hub name or .pth file.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A folder; for LAVIS a .pth file.")],
    to: Annotated[
        Literal["transformers", "lavis", "blip2fast"], typer.Option(help="The layout of DST.")
    ],
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images, in pixels: positions are resized."),
    ] = None,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Of the Q-Former, what SRC lacks.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a DST that exists.")
    ] = False,
) -> None:
    """Write trained weights in transformers', LAVIS's or this library's layout.

    Converts a run, a transformers BLIP-2 or InstructBLIP, or a file of LAVIS, and prints what was
    mapped, left out and missing (docs/published_weights.md).

    Example: blip2fast convert runs/scenes/stage2 scenes-blip2 --to transformers
    """
    from blip2fast.published.converting import convert as write

    quiet_transformers()
    print(
        write(
            source,
            target,
            to,
            image_size=image_size,
            language_model=language_model,
            image_encoder=image_encoder,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )
    )


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
