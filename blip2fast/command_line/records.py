"""`blip2fast data import`, `data check` and `features`: records and pictures before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blip2fast.command_line.given import check_folder, check_models
from blip2fast.command_line.options import on_terminal, settle_process, show_table

if TYPE_CHECKING:
    from blip2fast.data.source_config import RecordSource

Task = Literal["caption", "vqa", "sequence"]

Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, patterns.")
]
TaskOption = Annotated[
    Task | None, typer.Option("--task", help="By default what the first row fits.")
]
Images = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder from which images are named.")
]
Encoding = Annotated[str, typer.Option(help="Of text files.")]
Separator = Annotated[str | None, typer.Option(help="Of columns in a CSV file.")]
ImageKey = Annotated[str | None, typer.Option(metavar="NAME", help="Column of the images.")]
CaptionKey = Annotated[str | None, typer.Option(metavar="NAME", help="Column of the captions.")]
Annotations = Annotated[
    str | None, typer.Option(metavar="FILE", help="Answers to VQAv2's questions.")
]
ImageName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of VQAv2's images, with {} for the number.")
]
Split = Annotated[str | None, typer.Option(help="Of Karpathy's files, such as train+restval.")]


def _share_or_count(text: str) -> float:
    number = float(text) if "." in text else int(text)
    if number < 0 or (isinstance(number, float) and not 0 < number < 1):
        raise typer.BadParameter(f"{text}: expected a count, or a share such as 0.01")
    return number


OnError = Annotated[
    Literal["raise", "skip"],
    typer.Option(help="Of what cannot be used: skip leaves it out, and says so."),
]
MaxSkipped = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        parser=_share_or_count,
        help="With skip, how many may be left out: a count, or below 1 a share; default 0.01.",
    ),
]

app = typer.Typer(
    help="Import or check records of any layout: JSON lines and lists, CSV, TSV, Parquet, COCO and "
    "VQAv2 annotations, folders of datasets, webdataset shards, images with texts (docs/data.md).",
    no_args_is_help=True,
)


@app.command("import")
def import_(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the table.")],
    task: TaskOption = None,
    images: Images = None,
    on_error: OnError = "raise",
    max_skipped: MaxSkipped = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
) -> None:
    """Write records into a table that a run maps.

    Example: blip2fast data import captions_train2014.json --images train2014 --out data/coco
    """
    from blip2fast.data.importing import import_records

    options = {"encoding": encoding, "separator": separator, "image_key": image_key}
    options |= {"caption_key": caption_key, "annotations": annotations, "image_name": image_name}
    options["split"] = split
    print(
        import_records(
            *(_sources(sources, **options), str(out), task, _folder(images)),
            on_error=on_error,
            max_skipped=max_skipped,
        )
    )


@app.command("check")
def check(
    sources: Sources,
    task: TaskOption = None,
    images: Images = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="To count tokens: a folder or hub name.")
    ] = None,
    max_txt_len: Annotated[int, typer.Option(min=1, help="Tokens that a run keeps.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 4,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all that is found as JSON.")
    ] = False,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
) -> None:
    """Count records and images, and find what a run cannot use.

    Reads all records, and with --images all images. The exit status is 1 if something is unusable.

    Example: blip2fast data check captions.csv --images photos --tokenizer bert-base-uncased
    """
    from blip2fast.data.checking import check_records

    options = {"encoding": encoding, "separator": separator, "image_key": image_key}
    options |= {"caption_key": caption_key, "annotations": annotations, "image_name": image_name}
    options["split"] = split
    given, folder = _sources(sources, **options), _folder(images)
    found = check_records(given, task, folder, _tokenizer(tokenizer), max_txt_len, workers)
    if as_json:
        print(json.dumps(found.values(), indent=1))
    elif on_terminal():
        show_table(found.table())
        if found.ignored:
            print(f"ignored names: {', '.join(sorted(found.ignored))}")
        print("\n".join(found.told()))
    else:
        print(found)
    if not found.usable:
        raise typer.Exit(1)


def features(
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of image files.")],
    records: Annotated[
        str, typer.Option(metavar="SOURCE", help="What names the images (docs/data.md).")
    ],
    encoder: Annotated[
        str,
        typer.Option(metavar="PATH", help="Folder or hub name of a vision model, or timm:NAME."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the cache.")],
    layer: Annotated[
        int | None,
        typer.Option(help="Blocks to run, or -1, -2 from the last; default: BLIP-2's choice."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Of the encoder's images, in pixels; default: its own."),
    ] = None,
    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read the images.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a cache that is there.")
    ] = False,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of an image; default: PIL's limit.")
    ] = None,
    file_gb: Annotated[float, typer.Option(metavar="GB", help="Most of a file.")] = 4.0,
    on_error: OnError = "raise",
    max_skipped: MaxSkipped = None,
) -> None:
    """Compute a feature cache from a folder of images.

    Encodes the images that the records name, in sorted order, each once. An interrupted run
    continues where it stopped when the same command is given again.

    Example: blip2fast features --images photos --records captions.csv
    --encoder openai/clip-vit-large-patch14 --out features/photos
    """
    from blip2fast.data.skipping import LeftOut, check_skipped
    from blip2fast.data.sources import source_keys
    from blip2fast.frozen.unusable import MAX_PIXELS

    check_folder("--images", images)
    check_models(image_encoder=encoder)
    left_out: list[LeftOut] | None = [] if on_error == "skip" else None
    keys = source_keys(records, left_out)
    if left_out is not None:
        check_skipped(left_out, max_skipped, len(left_out) + len(keys), "rows and images")
    import torch

    from blip2fast.data.caching import cache_images
    from blip2fast.frozen.image_encoders import load_image_encoder

    settle_process()
    on_gpu = torch.cuda.is_available()
    compute = torch.bfloat16 if on_gpu else torch.float32
    loaded = load_image_encoder(encoder, layer, compute, image_size)
    cache = cache_images(
        str(images),
        keys,
        loaded.to("cuda" if on_gpu else "cpu"),
        str(out),
        name=encoder,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        overwrite=overwrite,
        on_error=on_error,
        max_skipped=max_skipped,
        file_bytes=max(1, int(file_gb * 1e9)),
        max_pixels=max_pixels or MAX_PIXELS,
    )
    told = [f"left out: {each}" for each in (left_out or ())[:10]]
    told += [f"left out: {reason}" for reason in list(cache.lacking.values())[:10]]
    for line in told:
        print(line)
    if len(left_out or ()) + len(cache.lacking) > len(told):
        print(f"and more: {cache.path / 'lacking.json'}")
    print(
        f"{cache.path}: {cache.num_images} images of {cache.num_tokens} tokens x {cache.width}, "
        f"{cache.dtype}, relative error {cache.relative_error:.2g}"
    )


def _sources(sources: list[str], **options: str | None) -> list[RecordSource]:
    from blip2fast.data.source_config import RecordSource

    if options["separator"] == "\\t":
        options["separator"] = "\t"
    given: dict[str, Any] = options
    return [RecordSource(source=source, **given) for source in sources]


def _folder(images: Path | None) -> Path | None:
    check_folder("--images", images)
    return images


def _tokenizer(path: str | None) -> Any:
    if path is None:
        return None
    check_models(tokenizer=path)
    from transformers import AutoTokenizer

    settle_process()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {path}: {str(error).splitlines()[0]}") from None
