"""The command `blip2fast`.

blip2fast plan --config configs/vitg_opt6.7b_stage2.yaml --processes 8 --device-gib 80
blip2fast storage-loss --config configs/scenes_stage2.yaml --storage int4 --batches 8
blip2fast caption photos --model runs/scenes/stage2 --recursive --ext .txt
blip2fast vqa cat.jpg "what colour is it?" --model runs/scenes/vqa
blip2fast chat cat.jpg --model runs/scenes/stage2
blip2fast attention cat.jpg --text "a black cat" --model runs/scenes/stage1 --out attention.png
blip2fast index build photos --model runs/scenes/stage1 --out runs/photos.index
blip2fast index query runs/photos.index "a red heart" -k 10
blip2fast capfilt captions.jsonl --images photos --captioner RUN --ranker RUN --out DIR
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
        description="Count parameters, optimiser and activations of a stage-2 run, and the memory "
        "of every way to keep its frozen language model. Nothing is loaded but config.json.",
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
    _add_vqa(commands)
    _add_chat(commands)
    _add_attention(commands)
    _add_index(commands)
    _add_capfilt(commands)
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
        "vqa": _vqa,
        "chat": _chat,
        "attention": _attention,
        "index": _index,
        "capfilt": _capfilt,
        "check-kernels": _check_kernels,
        "doctor": _doctor,
        "features": _features,
        "data": _data,
    }[given.command]

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        said = run(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if said:
        print(said)


def _add_caption(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    caption = commands.add_parser(
        "caption",
        help="describe pictures, or answer a question about each",
        description="Print a line for each picture, its path, a tab, and what the model writes, or "
        "write side-car files (--ext) or one file (--out). Pictures that cannot be read are named "
        "and passed over; the exit status is 1 then.",
    )
    caption.add_argument("images", nargs="+", metavar="PATH", help="picture files, or folders")
    _add_model(caption, "a stage-2 run, a checkpoint of it, or a transformers BLIP-2")
    caption.add_argument("--recursive", action="store_true", help="also folders below")
    caption.add_argument("--ext", default="", help="write a side-car of this suffix, such as .txt")
    caption.add_argument("--out", metavar="FILE", help="write all to a .jsonl or .csv")
    caption.add_argument("--resume", action="store_true", help="pass over what is written already")
    caption.add_argument("--num-captions", type=_positive, default=1, help="of each picture")
    caption.add_argument("--sample", action="store_true", help="nucleus sampling, not beam search")
    caption.add_argument("--seed", type=int, default=0, help="of --sample")
    caption.add_argument("--question", help="to answer, instead of a caption")
    caption.add_argument("--prompt", help="instead of the model's own; with {} for a question")
    caption.add_argument("--num-beams", type=_positive, default=5)
    caption.add_argument("--batch-size", type=_positive, default=8, help="pictures at a time")


def _add_model(command: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    command.add_argument(
        "--model", required=required, metavar="PATH", help=f"{what} (folder or hub name)"
    )
    command.add_argument("--device", help="by default CUDA where there is one")


def _add_vqa(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    vqa = commands.add_parser(
        "vqa",
        help="answer questions about a picture",
        description="Print a line for each question: the question, a tab, and the answer.",
    )
    vqa.add_argument("image", metavar="IMAGE", help="a picture file")
    vqa.add_argument("question", nargs="*", metavar="QUESTION")
    vqa.add_argument("--questions", metavar="FILE", help="more questions, one a line")
    _add_model(vqa, "a stage-2 run, a checkpoint of it, or a transformers BLIP-2")
    vqa.add_argument("--prompt", help="instead of the model's own; with {} for the question")
    vqa.add_argument("--num-beams", type=_positive, default=5)


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk about a picture",
        description="Answer questions from the terminal, each after those before; an empty line "
        "ends.",
    )
    chat.add_argument("image", metavar="IMAGE", help="a picture file")
    chat.add_argument("--once", metavar="QUESTION", help="answer this one and end")
    _add_model(chat, "a stage-2 run, a checkpoint of it, or a transformers BLIP-2")
    chat.add_argument("--prompt", help="of a turn, instead of the model's own; with {}")
    chat.add_argument("--num-beams", type=_positive, default=5)


def _add_attention(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    attention = commands.add_parser(
        "attention",
        help="draw where each query looks beside a text",
        description="Draw the last cross-attention of every query over the picture, as the "
        "matching head sees picture and text.",
    )
    attention.add_argument("image", metavar="IMAGE", help="a picture file")
    attention.add_argument("--text", required=True)
    attention.add_argument("--out", required=True, metavar="FILE", help="a .png")
    _add_model(attention, "a stage-1 run, or a transformers Blip2ForImageTextRetrieval")


def _add_index(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    index = commands.add_parser(
        "index",
        help="search pictures by text or by picture",
        description="Build an index of pictures, and find those that fit (docs/search.md).",
    )
    actions = index.add_subparsers(dest="action", required=True)
    build = actions.add_parser(
        "build",
        help="index pictures, or add them to an index",
        description="Pictures that the index has are passed over, so an interrupted build is "
        "given again. The exit status is 1 if a picture could not be read.",
    )
    build.add_argument(
        "images", nargs="+", metavar="PATH", help="folders, picture files, or one feature cache"
    )
    _add_model(build, "a stage-1 run, or a transformers Blip2ForImageTextRetrieval")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the index")
    build.add_argument("--batch-size", type=_positive, default=32)
    build.add_argument("--workers", type=_positive, default=4, help="threads that read pictures")
    query = actions.add_parser(
        "query",
        help="print the pictures that fit a text",
        description="Print a line for each picture: its score, a tab, and its path or key.",
    )
    query.add_argument("index", metavar="DIR", help="folder of the index")
    query.add_argument("text", nargs="?", help="what to look for")
    query.add_argument("--image", metavar="FILE", help="find pictures like this, not a text")
    query.add_argument("-k", type=_positive, default=10, help="pictures to print")
    query.add_argument(
        "--rerank", type=_positive, nargs="?", const=128, help="re-rank this many by ITM (128)"
    )
    query.add_argument(
        "--candidates", type=_positive, help="read at most this many features, not until exact"
    )
    query.add_argument("--cache", metavar="DIR", help="feature cache that the index was made of")
    query.add_argument("--json", action="store_true", help="print all that is known, as JSON lines")
    _add_model(query, "where the model of the index is now", required=False)


def _add_capfilt(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    capfilt = commands.add_parser(
        "capfilt",
        help="write captions of a data set and keep the best (CapFilt)",
        description="Write captions of every image, rank them together with those of the records, "
        "and keep the best (docs/capfilt.md). An interrupted command is given again; several "
        "processes share the work: torchrun --nproc-per-node 8 -m blip2fast.command_line capfilt",
    )
    capfilt.add_argument("records", metavar="RECORDS", help="captions of any layout (docs/data.md)")
    capfilt.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    capfilt.add_argument(
        "--captioner",
        required=True,
        metavar="PATH",
        help="stage-2 run, or a transformers captioner",
    )
    capfilt.add_argument(
        "--ranker", required=True, metavar="PATH", help="stage-1 run, or a transformers CLIP"
    )
    capfilt.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    capfilt.add_argument("--num-captions", type=_positive, default=10, help="written for an image")
    capfilt.add_argument("--keep", type=_positive, default=2, help="captions kept of an image")
    capfilt.add_argument("--match", action="store_true", help="rank by ITM too; a stage-1 ranker")
    capfilt.add_argument("--top-p", type=float, default=0.9, help="of nucleus sampling")
    capfilt.add_argument("--max-new-tokens", type=_positive, default=30)
    capfilt.add_argument("--min-new-tokens", type=int, default=5)
    capfilt.add_argument("--prompt", help="of our own captioners, instead of the model's")
    capfilt.add_argument("--seed", type=int, default=0)
    capfilt.add_argument("--batch-size", type=_positive, default=8, help="images at a time")
    capfilt.add_argument("--workers", type=_positive, default=4, help="threads that read pictures")
    capfilt.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


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
    verdict = "nothing fits" if chosen is None else f"offload: auto would choose {chosen.name!r}"
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
    from pathlib import Path

    from blip2fast.inference.captioning import Outputs, caption_files
    from blip2fast.inference.inputs import GenerationOptions
    from blip2fast.inference.model import Blip2
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.picture_files import find_pictures

    out = None if given.out is None else Path(given.out)
    outputs = Outputs(given.ext, out, given.resume)
    pictures = find_pictures(given.images, given.recursive)
    outputs.check(pictures)
    if not given.sample and given.num_captions > given.num_beams:
        raise ValueError(
            f"--num-captions {given.num_captions} of --num-beams {given.num_beams}: raise "
            "--num-beams, or give --sample"
        )
    options: GenerationOptions = {"num_beams": given.num_beams}
    if given.sample:
        options = {"do_sample": True, "seed": given.seed}
    check_model_folder(given.model, (2,))
    model = Blip2.from_pretrained(given.model, device=given.device)
    done = caption_files(
        model,
        pictures,
        outputs,
        options,
        question=given.question,
        num_captions=given.num_captions,
        prompt=given.prompt,
        batch_size=given.batch_size,
        tell=_say,
        complain=_complain,
    )
    if done.there or out is not None or given.ext:
        _note(f"{done.written} captioned, {done.there} there, {len(done.faults)} unreadable")
    if done.faults:
        sys.exit(1)
    return ""


def _say(line: str) -> None:
    print(line, flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _complain(fault: str) -> None:
    _note(f"passed over: {fault}")


def _vqa(given: argparse.Namespace) -> str:
    from pathlib import Path

    from blip2fast.inference.model import Blip2
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.talking import one_picture, read_lines

    file = None if given.questions is None else Path(given.questions)
    questions = read_lines(given.question, file)
    image = one_picture(given.image)
    check_model_folder(given.model, (2,))
    model = Blip2.from_pretrained(given.model, device=given.device)
    seen = model.encode(image)
    for question in questions:
        answer = model.answer(seen, question, prompt=given.prompt, num_beams=given.num_beams)
        _say(f"{question}\t{answer}")
    return ""


def _chat(given: argparse.Namespace) -> str:
    from blip2fast.inference.model import Blip2
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.talking import asked, converse, one_picture

    image = one_picture(given.image)
    check_model_folder(given.model, (2,))
    model = Blip2.from_pretrained(given.model, device=given.device)
    chat = model.chat(image, prompt=given.prompt, num_beams=given.num_beams)
    if given.once is not None:
        return chat(given.once)
    if converse(chat, asked(), _say):
        sys.exit(1)
    return ""


def _attention(given: argparse.Namespace) -> str:
    from pathlib import Path

    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.results import check_writable
    from blip2fast.inference.talking import one_picture
    from blip2fast.search.attention import draw_attention, save_drawing
    from blip2fast.search.retriever import Blip2Retriever

    out = Path(given.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: a drawing is written as .png; give such a name")
    check_writable(out)
    image = one_picture(given.image)
    check_model_folder(given.model, (1,))
    retriever = Blip2Retriever.from_pretrained(given.model, device=given.device)
    save_drawing(draw_attention(image, retriever.attention(image, given.text), given.text), out)
    return str(out)


def _index(given: argparse.Namespace) -> str:
    return _build_index(given) if given.action == "build" else _query_index(given)


def _build_index(given: argparse.Namespace) -> str:
    from pathlib import Path

    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.picture_files import find_pictures
    from blip2fast.inference.results import check_writable
    from blip2fast.search.index import INDEX
    from blip2fast.search.retriever import Blip2Retriever, feature_cache

    cache = feature_cache(given.images)
    if cache is None:
        find_pictures(given.images, recursive=True)
    check_writable(Path(given.out, INDEX))
    check_model_folder(given.model, (1,))
    retriever = Blip2Retriever.from_pretrained(given.model, device=given.device)
    done = retriever.index(
        cache or given.images,
        given.out,
        batch_size=given.batch_size,
        workers=given.workers,
        complain=_complain,
    )
    _say(f"{given.out}: {done.added} added, {done.there} there, {len(done.faults)} unreadable")
    if done.faults:
        sys.exit(1)
    return ""


def _query_index(given: argparse.Namespace) -> str:
    import json

    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.inference.talking import one_picture
    from blip2fast.search.index import SearchIndex
    from blip2fast.search.retriever import Blip2Retriever, feature_cache

    if (given.text is None) == (given.image is None):
        raise ValueError("give a text, or --image FILE, one of them")
    if given.rerank is not None and given.rerank < given.k:
        raise ValueError(f"--rerank {given.rerank}: give at least -k {given.k}")
    image = None if given.image is None else one_picture(given.image)
    model = given.model or SearchIndex(given.index).model["name"]
    cache = None if given.cache is None else feature_cache([given.cache], required=True)
    check_model_folder(model, (1,))
    retriever = Blip2Retriever.from_pretrained(model, device=given.device)
    retriever.open(given.index, cache)
    hits = retriever.search(
        given.text, given.k, image=image, candidates=given.candidates, rerank=given.rerank or 0
    )
    if given.json:
        return "\n".join(json.dumps(vars(hit), ensure_ascii=False) for hit in hits)
    if not hits.exact:
        _note(f"{hits.read} images were compared: others may fit better (--candidates)")
    return "\n".join(f"{hit.score:.4f}\t{hit.path or hit.key}" for hit in hits)


def _capfilt(given: argparse.Namespace) -> str:

    import torch

    from blip2fast.capfilt.captioners import Sampling
    from blip2fast.capfilt.run import FAULTS, Settings, bootstrap_captions

    sampling = Sampling(
        given.num_captions,
        given.top_p,
        given.max_new_tokens,
        given.min_new_tokens,
        given.seed,
        given.prompt,
    )
    settings = Settings(
        given.records,
        given.images,
        given.captioner,
        given.ranker,
        sampling,
        given.keep,
        given.match,
    )
    done = bootstrap_captions(
        settings,
        given.out,
        batch_size=given.batch_size,
        workers=given.workers,
        dtype=torch.bfloat16 if given.precision == "bf16" else torch.float32,
        complain=_complain,
    )
    if done.captions is None:
        return ""
    return f"{done.captions}: of {done.rows} records; unreadable ones are in {FAULTS}"


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
