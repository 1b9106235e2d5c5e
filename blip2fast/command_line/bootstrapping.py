"""`blip2fast capfilt`: captions of a data set, written, ranked and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from blip2fast.command_line.given import (
    check_folder,
    check_models,
    check_output_folder,
    check_records,
    is_alone,
)
from blip2fast.command_line.options import (
    BatchSize,
    ImageEncoder,
    LanguageModel,
    Readers,
    complain,
    say,
    settle_process,
)


def capfilt(
    records: Annotated[
        str, typer.Argument(metavar="RECORDS", help="Captions of any layout (docs/data.md).")
    ],
    images: Annotated[str, typer.Option(metavar="DIR", help="Folder of the images.")],
    captioner: Annotated[
        str, typer.Option(metavar="PATH", help="A stage-2 run, or a transformers captioner.")
    ],
    ranker: Annotated[
        str, typer.Option(metavar="PATH", help="A stage-1 run, or a transformers CLIP.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")],
    num_captions: Annotated[int, typer.Option(min=1, help="Written for an image.")] = 10,
    keep: Annotated[int, typer.Option(min=1, help="Captions kept of an image.")] = 2,
    match: Annotated[
        bool, typer.Option("--match", help="Rank by ITM too, by a stage-1 ranker.")
    ] = False,
    top_p: Annotated[float, typer.Option(help="Of nucleus sampling.")] = 0.9,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Of a caption.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 30,
    prompt: Annotated[str | None, typer.Option(help="Of our own captioners.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="With an image's name, decides its draws.")] = 0,
    batch_size: BatchSize = 8,
    workers: Readers = 4,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of both models.")] = "fp32",
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
) -> None:
    """Write captions of every image, rank them with those of the records, keep the best.

    An interrupted command is given again. Several processes share the work under torchrun
    (docs/capfilt.md).

    Example: blip2fast capfilt web.jsonl --images photos --captioner RUN --ranker RUN --out DIR
    """
    if is_alone():
        check_records(records)
        check_folder("--images", images)
        check_models(captioner=captioner, ranker=ranker)
        check_output_folder("--out", out)
    import torch

    from blip2fast.capfilt.captioners import Sampling
    from blip2fast.capfilt.run import FAULTS, Settings, bootstrap_captions

    sampling = Sampling(num_captions, top_p, max_new_tokens, min_new_tokens, seed, prompt)
    settings = Settings(records, images, captioner, ranker, sampling, keep, match)
    settle_process()
    done = bootstrap_captions(
        settings,
        out,
        batch_size=batch_size,
        workers=workers,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        complain=complain,
        language_model=language_model,
        image_encoder=image_encoder,
    )
    if done.captions is not None:
        say(f"{done.captions}: of {done.rows} records; unreadable ones are in {FAULTS}")
