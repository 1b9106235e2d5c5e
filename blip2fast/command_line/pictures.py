"""`blip2fast caption`, `vqa`, `chat`, `attention`, `demo-page`: what a model says of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2fast.command_line.given import check_folder, check_models
from blip2fast.command_line.options import (
    BatchSize,
    Device,
    ImageEncoder,
    LanguageModel,
    complain,
    note,
    say,
    settle_process,
)

if TYPE_CHECKING:
    from blip2fast.inference.inputs import GenerationOptions
    from blip2fast.inference.model import Blip2

Writing = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="A stage-2 run, a checkpoint of it, or a transformers BLIP-2 (folder, hub name).",
    ),
]
OnePicture = Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file.")]
Prompt = Annotated[
    str | None, typer.Option(help="Instead of the model's own; with {} for a question.")
]
NumBeams = Annotated[int, typer.Option(min=1, help="Of beam search; 1 is greedy.")]


def caption(
    images: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Picture files, or folders.")
    ],
    model: Writing,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also folders below.")] = False,
    ext: Annotated[str, typer.Option(help="Write a side-car of this suffix, such as .txt.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all to a .jsonl or .csv.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Pass over what is written already.")
    ] = False,
    num_captions: Annotated[int, typer.Option(min=1, help="Of each picture.")] = 1,
    sample: Annotated[
        bool, typer.Option("--sample", help="Nucleus sampling instead of beam search.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    question: Annotated[str | None, typer.Option(help="To answer, instead of a caption.")] = None,
    prompt: Prompt = None,
    num_beams: NumBeams = 5,
    batch_size: BatchSize = 8,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Describe pictures, or answer a question about each.

    Prints a line for each picture: its path, a tab, and what the model writes; or writes side-cars
    (--ext) or one file (--out). Pictures that cannot be read are named and passed over; the exit
    status is 1 then.

    Example: blip2fast caption photos --model runs/scenes/stage2 --recursive --ext .txt
    """
    from blip2fast.inference.captioning import Outputs, caption_files
    from blip2fast.inference.picture_files import find_pictures

    outputs = Outputs(ext, out, resume)
    pictures = find_pictures(images, recursive)
    outputs.check(pictures)
    if not sample and num_captions > num_beams:
        raise ValueError(
            f"--num-captions {num_captions} of --num-beams {num_beams}: raise --num-beams, or give "
            "--sample"
        )
    if question is not None and num_captions > 1:
        raise ValueError(f"--num-captions {num_captions}: a question has one answer; leave one out")
    options: GenerationOptions = {"num_beams": num_beams}
    if sample:
        options = {"do_sample": True, "seed": seed}
    done = caption_files(
        _writer(model, device, language_model, image_encoder),
        pictures,
        outputs,
        options,
        question=question,
        num_captions=num_captions,
        prompt=prompt,
        batch_size=batch_size,
        tell=say,
        complain=complain,
    )
    if done.there or out is not None or ext:
        note(f"{done.written} captioned, {done.there} there, {len(done.faults)} unreadable")
    if done.faults:
        raise typer.Exit(1)


def vqa(
    image: OnePicture,
    model: Writing,
    question: Annotated[list[str] | None, typer.Argument(help="One or several.")] = None,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More questions, one a line.")
    ] = None,
    prompt: Prompt = None,
    num_beams: NumBeams = 5,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Answer questions about a picture: a line for each, the question, a tab, and the answer.

    Example: blip2fast vqa cat.jpg "what is it?" "which colour?" --model runs/scenes/vqa
    """
    from blip2fast.inference.talking import one_picture, read_lines

    asked = read_lines(question or [], questions)
    picture = one_picture(image)
    loaded = _writer(model, device, language_model, image_encoder)
    seen = loaded.encode(picture)
    for each in asked:
        say(f"{each}\t{loaded.answer(seen, each, prompt=prompt, num_beams=num_beams)}")


def chat(
    image: OnePicture,
    model: Writing,
    once: Annotated[
        str | None, typer.Option(metavar="QUESTION", help="Answer this one and end.")
    ] = None,
    prompt: Prompt = None,
    num_beams: NumBeams = 5,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Talk about a picture: each question is read with those before it; an empty line ends.

    Example: blip2fast chat cat.jpg --model runs/scenes/stage2
    """
    from blip2fast.inference.talking import asked, converse, one_picture

    picture = one_picture(image)
    talk = _writer(model, device, language_model, image_encoder).chat(
        picture, prompt=prompt, num_beams=num_beams
    )
    if once is not None:
        say(talk(once))
    elif converse(talk, asked(), say):
        raise typer.Exit(1)


def attention(
    image: OnePicture,
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="A stage-1 run, or a transformers Blip2ForImageTextRetrieval."
        ),
    ],
    text: Annotated[str, typer.Option(help="What the queries see beside the picture.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .png.")],
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Draw where each query looks: the last cross-attention of the matching pass.

    Example: blip2fast attention cat.jpg --text "a cat" --model runs/scenes/stage1 --out cat.png
    """
    from blip2fast.inference.results import check_writable
    from blip2fast.inference.talking import one_picture

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: a drawing is written as .png; give such a name")
    check_writable(out)
    picture = one_picture(image)
    check_models(model=model)
    from blip2fast.inference.model_folders import check_model_folder
    from blip2fast.search.attention import draw_attention, save_drawing
    from blip2fast.search.retriever import Blip2Retriever

    check_model_folder(model, (1,))
    settle_process()
    retriever = Blip2Retriever.from_pretrained(model, device=device, image_encoder=image_encoder)
    save_drawing(draw_attention(picture, retriever.attention(picture, text), text), out)
    say(str(out))


def demo_page(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="A run, a checkpoint or a transformers model of stage 2, of stage 1, or (given "
            "twice) one of each.",
        ),
    ],
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--search", metavar="DIR", help="Pictures to search: an index, or a folder of them."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve at; 0.0.0.0 shows the page to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve at.")] = 7860,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    device: Device = None,
) -> None:
    """Serve a page that tries a model in the browser (needs gradio), until Ctrl-C.

    A model of stage 2 describes a picture and answers questions about it; one of stage 1 searches
    pictures and draws where each query looks beside a text.

    Example: blip2fast demo-page --model runs/scenes/stage2 --model runs/scenes/stage1
    """
    from blip2fast._imports import needs

    for each in model:
        check_models(model=each)
    check_folder("--search", pictures)
    with needs("serve the demo page", "gradio"):
        from blip2fast.demo_page.models import PageModels, PageParts, check_port

    parts = PageParts.check(model, pictures)
    check_port(host, port)
    settle_process()
    models = PageModels.load(
        parts,
        device=device,
        language_model=language_model,
        image_encoder=image_encoder,
        complain=complain,
    )
    from blip2fast.demo_page.page import build_page, serve_page

    page = build_page(models)
    say(serve_page(page, host, port, wait=False))
    note("Ctrl-C ends it")
    page.block_thread()


def _writer(
    model: str, device: str | None, language_model: str | None, image_encoder: str | None
) -> Blip2:
    check_models(model=model, language_model=language_model, image_encoder=image_encoder)
    from blip2fast.inference.model import Blip2
    from blip2fast.inference.model_folders import check_model_folder

    check_model_folder(model, (2,))
    settle_process()
    return Blip2.from_pretrained(
        model, device=device, language_model=language_model, image_encoder=image_encoder
    )
