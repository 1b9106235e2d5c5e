"""`blip2fast convert`, `report` and `demo`: what a run is used for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2fast.command_line.given import check_models, check_output_folder
from blip2fast.command_line.options import (
    Device,
    ImageEncoder,
    LanguageModel,
    note,
    say,
    settle_process,
)


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

    Example: blip2fast convert Salesforce/blip2-opt-2.7b runs/published --to blip2fast
    """
    from blip2fast.published.targets import check_target

    check_target(source, target, to, overwrite)
    if not Path(source).expanduser().exists():
        check_models(trained_weights=source)
    check_models(language_model=language_model, image_encoder=image_encoder, tokenizer=tokenizer)
    from blip2fast.published.converting import convert as write

    settle_process()
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
    samples: Annotated[
        int,
        typer.Option(min=0, max=24, help="Pictures to show, of a run that has ended; 0: none."),
    ] = 6,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the pictures, if the run read a feature cache."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Write report.html into the folder of a run, also while it trains: one file, no network.

    Of a run that has ended the model is loaded and shown pictures: its captions or answers, or in
    stage 1 the captions that it finds, and where each query looks.

    Example: blip2fast report runs/scenes/stage1 --images runs/scenes/images/held_out
    """
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images}: not a folder; give the one that the records name in")
    for run in runs:  # all, before the first is drawn
        metrics = run / "metrics.jsonl"
        if not metrics.is_file():
            raise ValueError(
                f"no metrics at {metrics}: not a file; give the output folder of a run"
            )
    from blip2fast.reporting.run_report import write_report

    for run in runs:
        path = write_report(run)
        if samples:
            from blip2fast.reporting.samples import draw_samples

            settle_process()
            drawn = draw_samples(run, samples, images=images, device=device)
            write_report(run, drawn.samples, notes=drawn.notes)
            for line in drawn.notes:
                note(line)
        say(str(path))


def demo(
    source: Annotated[
        Literal["shapes", "digits"], typer.Option(help="Drawn shapes or handwriting.")
    ] = "shapes",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="By default runs/scenes or runs/digits.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of scenes and training.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Reuse nothing of an earlier run.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Tiny sizes: shows that it runs, meets no gate.")
    ] = False,
) -> None:
    """Train both stages on rendered scenes, on a CPU, and judge them on held-out images.

    Everything lands in the folder of --output. The exit status is 1 if a gate is not met.

    Example: blip2fast demo --fast
    """
    from blip2fast._imports import needs

    if output is not None:
        check_output_folder("--output", output)
    with needs("run the demo", "matplotlib", "rich", "sklearn"):
        from blip2fast.demo.run import start

    raise typer.Exit(start(source, output, seed, fresh, fast))
