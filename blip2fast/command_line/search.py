"""`blip2fast index build` and `index query`: pictures found by text or by picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from blip2fast.command_line.given import check_folder, check_models, check_pictures
from blip2fast.command_line.options import (
    BatchSize,
    Device,
    ImageEncoder,
    Readers,
    complain,
    note,
    say,
    settle_process,
)

app = typer.Typer(
    help="Search pictures by text or by picture (docs/search.md).", no_args_is_help=True
)


@app.command()
def build(
    images: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Folders, picture files, or one feature cache."),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="A stage-1 run, or a transformers Blip2ForImageTextRetrieval."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the index.")],
    batch_size: BatchSize = 32,
    workers: Readers = 4,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Index pictures, or add them to an index.

    Pictures that the index has are passed over, so an interrupted build is given again. The exit
    status is 1 if a picture could not be read.

    Example: blip2fast index build photos --model runs/scenes/stage1 --out runs/photos.index
    """
    from blip2fast.inference.results import check_writable

    check_pictures(images)
    check_writable(out / "index.json")
    check_models(model=model)
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.search.retriever import Blip2Retriever, feature_cache

    cache = feature_cache(images)
    check_model_folder(model, (1,))
    settle_process()
    retriever = Blip2Retriever.from_pretrained(model, device=device, image_encoder=image_encoder)
    done = retriever.index(
        cache or images, out, batch_size=batch_size, workers=workers, complain=complain
    )
    say(f"{out}: {done.added} added, {done.there} there, {len(done.faults)} unreadable")
    if done.faults:
        raise typer.Exit(1)


@app.command()
def query(
    index: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the index.")],
    text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Find pictures like this, not a text.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Pictures to print.")] = 10,
    rerank: Annotated[
        bool, typer.Option("--rerank", help="Re-rank the best by ITM, which reads them again.")
    ] = False,
    rerank_k: Annotated[int, typer.Option(min=1, help="How many --rerank takes.")] = 128,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Read at most this many features, not until it is exact."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Feature cache that the index was made of, to re-rank."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all that is known, as JSON lines.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the model of the index is now.")
    ] = None,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Print the pictures that fit a text: a line for each, its score, a tab, and its path or key.

    Example: blip2fast index query runs/photos.index "a red heart" -k 10 --rerank
    """
    from blip2fast.inference.talking import one_picture

    if (text is None) == (image is None):
        raise ValueError("give a text, or --image FILE, one of them")
    picture = None if image is None else one_picture(image)
    if not Path(index, "index.json").is_file():
        raise ValueError(
            f"no index at {index}: index.json is missing; make one with `blip2fast index build`"
        )
    check_models(model=model)
    check_folder("--cache", cache)
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.search.index import SearchIndex
    from blip2fast.search.retriever import Blip2Retriever, feature_cache

    name = model or SearchIndex(index).model["name"]
    tokens = None if cache is None else feature_cache([cache], required=True)
    check_model_folder(name, (1,))
    settle_process()
    retriever = Blip2Retriever.from_pretrained(name, device=device, image_encoder=image_encoder)
    retriever.open(index, tokens)
    many = max(k, rerank_k) if rerank else 0
    hits = retriever.search(text, k, image=picture, candidates=candidates, rerank=many)
    if not hits.exact:
        note(f"{hits.read} images were compared: others may fit better (--candidates)")
    for hit in hits:
        if as_json:
            say(json.dumps(vars(hit), ensure_ascii=False))
        else:
            say(f"{hit.score:.4f}\t{hit.path or hit.key}")
