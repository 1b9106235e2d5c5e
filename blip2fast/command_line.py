"""The command `blip2fast`.

blip2fast plan --config configs/vitg_opt6.7b_stage2.yaml --processes 8 --device-gib 80
blip2fast storage-loss --config configs/scenes_stage2.yaml --storage int4 --batches 8
blip2fast caption --model runs/scenes/stage2 one.png two.png
blip2fast convert blip2_pretrained_opt2.7b.pth DIR --to transformers --language-model PATH
blip2fast check-kernels
blip2fast doctor
blip2fast data import captions_train2014.json --out DIR
blip2fast data check metadata.csv --images DIR
blip2fast features --images DIR --records FILE --encoder PATH --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from blip2fast.data.source_config import RecordSource


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with a one-line message on bad input."""
    parser = argparse.ArgumentParser(
        prog="blip2fast", description="Plan and use runs of BLIP-2, and cache their image features."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="print what a run takes in memory, for every way to keep its language model",
        description="Count parameters, optimiser and activations of a run, and in stage 2 the "
        "memory of every way to keep its frozen language model. Nothing is loaded but config.json.",
    )
    _add_config(plan)
    plan.add_argument("--processes", type=_positive, default=1, help="of the run, one a device")
    plan.add_argument("--machines", type=_positive, default=1, help="that the processes share")
    plan.add_argument(
        "--device-gib", type=float, metavar="GIB", help="of each device, instead of what is free"
    )
    plan.add_argument(
        "--host-gib", type=float, metavar="GIB", help="of each machine, instead of what is free"
    )
    loss = commands.add_parser(
        "storage-loss",
        help="print what storing the language model in 8 or 4 bits does to the loss",
        description="Load a stage-2 run as it starts (init_from), on the CPU, and compare the loss "
        "of its first batches with the language model's weights as they are and in fewer bits.",
    )
    _add_config(loss)
    loss.add_argument("--storage", choices=("int8", "int4"), action="append")
    loss.add_argument("--batches", type=_positive, default=4)
    _add_caption(commands)
    _add_convert(commands)
    _add_check_kernels(commands)
    commands.add_parser(
        "doctor",
        help="print what a bug report should carry",
        description="Print versions, devices, the extension, and for every op the backend that "
        "would run and why others would not. Nothing is checked or compiled.",
    ).add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    _add_features(commands)
    _add_data(commands)
    given = parser.parse_args(arguments)
    run = {
        "plan": _plan,
        "storage-loss": _storage_loss,
        "caption": _caption,
        "convert": _convert,
        "check-kernels": _check_kernels,
        "doctor": _doctor,
        "features": _features,
        "data": _data,
    }[given.command]

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        print(run(given))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _add_caption(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    caption = commands.add_parser(
        "caption",
        help="describe image files, or answer a question about each",
        description="Print a line for each image: its path, a tab, and what the model writes.",
    )
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="files")
    caption.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a stage-2 run, a checkpoint of it, or a transformers BLIP-2 (folder or hub name)",
    )
    caption.add_argument("--question", help="to answer, instead of a caption")
    caption.add_argument("--prompt", help="instead of the model's own; with {} for a question")
    caption.add_argument("--num-beams", type=_positive, default=5)
    caption.add_argument("--device", help="by default CUDA where there is one")
    _add_moved(caption, "a run's, if it has moved since training")


def _add_moved(command: argparse.ArgumentParser, which: str) -> None:
    for name in ("--language-model", "--image-encoder"):
        command.add_argument(name, metavar="PATH", help=f"folder or hub name: {which}")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="write trained weights in transformers', LAVIS's or this library's layout",
        description="Convert a run, a transformers BLIP-2 or InstructBLIP, or a file of LAVIS, and "
        "print what was mapped, left out and missing (docs/published_weights.md).",
    )
    convert.add_argument("source", metavar="SRC", help="folder, hub name or .pth file")
    convert.add_argument("target", metavar="DST", help="a folder; for LAVIS a .pth file")
    convert.add_argument("--to", required=True, choices=("transformers", "lavis", "blip2fast"))
    convert.add_argument(
        "--image-size", type=_positive, help="side of the images, in pixels: positions are resized"
    )
    _add_moved(convert, "what SRC lacks, or one that has moved")
    convert.add_argument("--tokenizer", metavar="PATH", help="of the Q-Former, likewise")
    convert.add_argument("--overwrite", action="store_true", help="replace a DST that exists")


def _add_check_kernels(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check-kernels",
        help="find out which of the library's own kernels are right and quicker on this GPU",
        description="Check the kernels that both stages and inference run, where nobody has yet, "
        "and print a line for each. docs/kernels.md says how.",
    )
    check.add_argument("--device", help="by default the first CUDA device")
    check.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    check.add_argument("--again", action="store_true", help="check all, whatever is known")
    check.add_argument("--jobs", type=_positive, help="processes that compile; by default up to 8")
    check.add_argument("--out", metavar="FILE", help="write what is known as JSON, too")


def _add_features(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser(
        "features",
        help="compute a feature cache from a folder of images",
        description="Encode the images that the records name, in sorted order, each once. An "
        "interrupted run continues where it stopped when the same command is given again.",
    )
    cache.add_argument("--images", required=True, metavar="DIR", help="folder of image files")
    cache.add_argument(
        "--records", required=True, metavar="SOURCE", help="what names the images (docs/data.md)"
    )
    cache.add_argument(
        "--encoder", required=True, metavar="PATH", help="folder or hub name of a vision model"
    )
    cache.add_argument("--out", required=True, metavar="DIR", help="folder of the cache")
    cache.add_argument("--layer", type=_positive, help="blocks to run; default: BLIP-2's choice")
    cache.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16")
    cache.add_argument("--batch-size", type=_positive, default=32)
    cache.add_argument("--workers", type=int, default=0, help="processes that read the images")
    cache.add_argument("--overwrite", action="store_true", help="replace a cache that is there")


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser(
        "data",
        help="import or check records of any layout",
        description="Records are read from JSON lines and lists, CSV, TSV, Parquet, COCO and VQAv2 "
        "annotations, folders of datasets, webdataset shards, images with texts (docs/data.md).",
    )
    actions = data.add_subparsers(dest="action", required=True)
    load = actions.add_parser("import", help="write records into a table that a run maps")
    load.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders or patterns")
    load.add_argument("--out", required=True, metavar="DIR", help="folder of the table")
    _add_source(load)
    check = actions.add_parser(
        "check",
        help="count records and images, and find what a run cannot use",
        description="Read all records, and with --images all images. The exit status is 1 if "
        "something is unusable.",
    )
    check.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders or patterns")
    check.add_argument("--tokenizer", metavar="PATH", help="to count tokens: a folder or hub name")
    check.add_argument("--max-txt-len", type=_positive, default=32, help="tokens that a run keeps")
    check.add_argument("--workers", type=_positive, default=4, help="threads that read images")
    check.add_argument("--json", action="store_true", help="print all that is found as JSON")
    _add_source(check)


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--task", choices=("caption", "vqa", "sequence"), help="by default what the first row fits"
    )
    command.add_argument("--images", metavar="DIR", help="folder from which images are named")
    command.add_argument("--encoding", default="utf-8", help="of text files")
    command.add_argument("--separator", help="of columns in a CSV file")
    command.add_argument("--image-key", metavar="NAME", help="column of the images")
    command.add_argument("--caption-key", metavar="NAME", help="column of the captions")
    command.add_argument("--annotations", metavar="FILE", help="answers to VQAv2's questions")
    command.add_argument(
        "--image-name", metavar="NAME", help="of VQAv2's images, with {} for the number"
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="FILE", help="a yaml file, such as those in configs/"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as optim.batch_size=8; repeatable",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def _plan(given: argparse.Namespace) -> str:
    from blip2fast.training.config_files import load_config
    from blip2fast.training.memory_plan import GIB, Memory, machine_memory, plan_memory

    memory = machine_memory()
    if given.device_gib is not None or given.host_gib is not None:
        device = memory.device if given.device_gib is None else int(given.device_gib * GIB)
        host = memory.host if given.host_gib is None else int(given.host_gib * GIB)
        on_host = memory.device_is_host and given.device_gib is None
        memory = Memory(host if on_host else device, host, on_host)
    config = load_config(given.config, given.set)
    plan = plan_memory(config, given.processes, given.machines, memory)
    chosen = plan.first(config.stream_storage)
    said = "it fits as" if config.stage == 1 else "offload: auto would choose"
    verdict = "nothing fits" if chosen is None else f"{said} {chosen.name!r}"
    return f"{plan}\n{verdict}"


def _check_kernels(given: argparse.Namespace) -> str:
    from pathlib import Path

    from blip2fast.ops import check_kernels
    from blip2fast.ops.kernel_kinds import DTYPES
    from blip2fast.ops.records import Record, write_records

    made: list[Record] = []

    def tell(record: Record) -> None:
        # save each record immediately: a command that is cut off keeps its results
        made.append(record)
        print(f"{record} ({record.seconds:.0f} s)", flush=True)
        if given.out is not None:
            write_records(Path(given.out), made)

    records = check_kernels(
        given.device, DTYPES[given.precision], again=given.again, jobs=given.jobs, tell=tell
    )
    if given.out is not None:
        write_records(Path(given.out), records)
    if not records:
        return "no CUDA device: nothing to check"
    lines = [f"{record}, as recorded before" for record in records if record not in made]
    right = sum(not record.fault for record in records)
    return "\n".join([*lines, f"{right} of {len(records)} kinds are right and quicker here"])


def _doctor(given: argparse.Namespace) -> str:
    from blip2fast.doctor import report
    from blip2fast.ops.kernel_kinds import DTYPES

    return report(DTYPES[given.precision])


def _caption(given: argparse.Namespace) -> str:
    from blip2fast.inference.model import Blip2

    model = Blip2.from_pretrained(
        given.model,
        device=given.device,
        language_model=given.language_model,
        image_encoder=given.image_encoder,
    )
    if given.question is None:
        texts = model.caption(given.images, prompt=given.prompt, num_beams=given.num_beams)
    else:
        texts = model.answer(
            given.images, given.question, prompt=given.prompt, num_beams=given.num_beams
        )
    pairs = zip(given.images, texts, strict=True)
    return "\n".join(f"{path}\t{text}" for path, text in pairs)


def _convert(given: argparse.Namespace) -> str:
    from blip2fast.published.converting import convert

    return str(
        convert(
            given.source,
            given.target,
            given.to,
            image_size=given.image_size,
            language_model=given.language_model,
            image_encoder=given.image_encoder,
            tokenizer=given.tokenizer,
            overwrite=given.overwrite,
        )
    )


def _features(given: argparse.Namespace) -> str:
    import torch

    from blip2fast.data.caching import cache_images
    from blip2fast.data.sources import source_keys
    from blip2fast.frozen.image_encoders import load_image_encoder

    keys = source_keys(given.records)
    on_gpu = torch.cuda.is_available()
    compute = torch.bfloat16 if on_gpu else torch.float32
    encoder = load_image_encoder(given.encoder, given.layer, compute)
    cache = cache_images(
        given.images,
        keys,
        encoder.to("cuda" if on_gpu else "cpu"),
        given.out,
        name=given.encoder,
        dtype=given.dtype,
        batch_size=given.batch_size,
        workers=given.workers,
        overwrite=given.overwrite,
    )
    return (
        f"{cache.path}: {cache.num_images} images of {cache.num_tokens} tokens x {cache.width}, "
        f"{cache.dtype}, relative error {cache.relative_error:.2g}"
    )


def _data(given: argparse.Namespace) -> str:
    from pathlib import Path

    from blip2fast.data.importing import import_records
    from blip2fast.data.source_config import RecordSource

    names = ("encoding", "separator", "image_key", "caption_key", "annotations", "image_name")
    options = {name: getattr(given, name) for name in names}
    if options["separator"] == "\\t":
        options["separator"] = "\t"
    sources = [RecordSource(source=source, **options) for source in given.sources]
    images = None if given.images is None else Path(given.images)
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images}: not a folder")
    if given.action == "import":
        return str(import_records(sources, given.out, given.task, images))
    return _check_data(given, sources, images)


def _check_data(given: argparse.Namespace, sources: list[RecordSource], images: Path | None) -> str:
    import json

    from transformers import AutoTokenizer

    from blip2fast.data.checking import check_records

    tokenizer = None
    if given.tokenizer is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--tokenizer {given.tokenizer}: {reason}") from None
    found = check_records(sources, given.task, images, tokenizer, given.max_txt_len, given.workers)
    shown = json.dumps(found.values(), indent=1) if given.json else str(found)
    if not found.usable:
        print(shown)
        sys.exit(1)
    return shown


def _storage_loss(given: argparse.Namespace) -> str:
    from dataclasses import replace

    from blip2fast.offload.blocks import find_blocks
    from blip2fast.offload.quantised import Storage
    from blip2fast.offload.storage_loss import loss_difference
    from blip2fast.stage2.model import Blip2Stage2
    from blip2fast.training.build import build_run
    from blip2fast.training.config_files import load_config

    config = load_config(given.config, given.set)
    if config.stage != 2:
        raise ValueError("stage 1 has no language model: give a configuration of stage 2")
    if config.data.images is not None:
        raise ValueError("storage-loss reads a feature cache: set data.features, not data.images")
    parts = build_run(
        replace(config, offload="none", zero_stage=0, stream_storage="as_is", stream_buffers=2),
        rank=0,
        world_size=1,
    )
    if not isinstance(parts.model, Blip2Stage2):
        raise ValueError("stage 2 expected")
    model = parts.model.eval()
    batches = [parts.batches[number] for number in range(given.batches)]
    storages: list[Storage] = given.storage or ["int8", "int4"]
    blocks = find_blocks(model.language_model)
    return "\n".join(str(loss_difference(model, batches, each, blocks)) for each in storages)


if __name__ == "__main__":
    main()
