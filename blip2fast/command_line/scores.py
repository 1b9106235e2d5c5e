"""`blip2fast eval retrieval`, `caption` and `vqa`: a model on a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blip2fast.command_line.given import (
    check_file,
    check_folder,
    check_models,
    check_output_folder,
    check_records,
    is_alone,
)
from blip2fast.command_line.options import on_terminal, settle_process, show_table
from blip2fast.command_line.records import (
    Annotations,
    CaptionKey,
    Encoding,
    ImageKey,
    ImageName,
    Separator,
)

if TYPE_CHECKING:
    from blip2fast.scoring.setup import Setup

Model = Annotated[
    str, typer.Option(metavar="PATH", help="A run, a checkpoint, or a folder of transformers.")
]
Data = Annotated[
    str, typer.Option(metavar="FILE", help="The benchmark's annotation file, or records.")
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of predictions and result.")]
Images = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the pictures.")]
Features = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A feature cache, instead of pictures.")
]
Split = Annotated[str, typer.Option(help="Of Karpathy's files.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The first N images or questions only.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images, questions or pairs at a time.")]
DType = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the weights.")]
Device = Annotated[
    str | None, typer.Option(help="By default a GPU for each process, if there is one.")
]
Workers = Annotated[int, typer.Option(min=1, help="Threads that read pictures.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew; without it, an evaluation goes on.")
]
LanguageModel = Annotated[
    str | None, typer.Option(metavar="PATH", help="Of a run, where it is now.")
]
ImageEncoder = Annotated[
    str | None, typer.Option(metavar="PATH", help="Of a run, where it is now.")
]
Prompt = Annotated[str | None, typer.Option(help="Instead of the model's own.")]
NumBeams = Annotated[int, typer.Option(min=1, help="1 is greedy.")]
LengthPenalty = Annotated[float, typer.Option(help="Below 0 favours short texts.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens that are written at most.")]
MinNewTokens = Annotated[int, typer.Option(min=0, help="Tokens that are written at least.")]

app = typer.Typer(
    help="Score a model on COCO, Flickr30K, NoCaps, VQAv2, OK-VQA, GQA or your own records "
    "(docs/evaluation.md). A stopped evaluation goes on when the command is given again. On "
    "several GPUs: torchrun --nproc-per-node 8 --no-python blip2fast eval ...",
    no_args_is_help=True,
)


@app.command()
def retrieval(
    model: Model,
    data: Data,
    out: Out,
    images: Images = None,
    features: Features = None,
    split: Split = "test",
    rerank_k: Annotated[
        int, typer.Option(min=0, help="Candidates that ITM re-ranks; 0: ITC alone.")
    ] = 128,
    captions_per_image: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N; by default all.")
    ] = None,
    max_txt_len: Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")] = 35,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    dtype: DType = "fp32",
    device: Device = None,
    workers: Workers = 4,
    overwrite: Overwrite = False,
    image_encoder: ImageEncoder = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
) -> None:
    """Find the texts of an image and the image of a text: R@1, R@5 and R@10, a stage-1 model.

    Example: blip2fast eval retrieval --model runs/stage1 --data dataset_flickr30k.json
    --images flickr30k-images --out results/flickr30k
    """
    source = {"encoding": encoding, "separator": separator, "image_key": image_key}
    setup = _setup(
        (model, dtype, None, image_encoder),
        {"source": data, "split": split, "caption_key": caption_key, **source},
        out=out,
        images=images,
        features=features,
        limit=limit,
        batch_size=batch_size,
        device=device,
        workers=workers,
        overwrite=overwrite,
    )
    from blip2fast.scoring.retrieving import evaluate_retrieval

    _show(evaluate_retrieval(setup, rerank_k, captions_per_image, max_txt_len), out)


@app.command()
def caption(
    model: Model,
    data: Data,
    out: Out,
    images: Images = None,
    features: Features = None,
    split: Split = "test",
    prompt: Prompt = None,
    num_beams: NumBeams = 5,
    length_penalty: LengthPenalty = 1.0,
    max_new_tokens: MaxNewTokens = 30,
    min_new_tokens: MinNewTokens = 0,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    dtype: DType = "fp32",
    device: Device = None,
    workers: Workers = 4,
    overwrite: Overwrite = False,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
) -> None:
    """Caption images: CIDEr-D, BLEU-1 to 4 and ROUGE-L, of a stage-2 model.

    Example: blip2fast eval caption --model runs/stage2 --data dataset_coco.json --images coco
    --out results/coco
    """
    source = {"encoding": encoding, "separator": separator, "image_key": image_key}
    setup = _setup(
        (model, dtype, language_model, image_encoder),
        {"source": data, "split": split, "caption_key": caption_key, **source},
        out=out,
        images=images,
        features=features,
        limit=limit,
        batch_size=batch_size,
        device=device,
        workers=workers,
        overwrite=overwrite,
    )
    from blip2fast.scoring.writing import evaluate_captions

    options = _generation(num_beams, length_penalty, max_new_tokens, min_new_tokens)
    _show(evaluate_captions(setup, prompt, options), out)


@app.command()
def vqa(
    model: Model,
    data: Data,
    out: Out,
    annotations: Annotations = None,
    images: Images = None,
    features: Features = None,
    image_name: ImageName = None,
    prompt: Prompt = None,
    num_beams: NumBeams = 5,
    length_penalty: LengthPenalty = -1.0,
    max_new_tokens: MaxNewTokens = 10,
    min_new_tokens: MinNewTokens = 0,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    dtype: DType = "fp32",
    device: Device = None,
    workers: Workers = 4,
    overwrite: Overwrite = False,
    language_model: LanguageModel = None,
    image_encoder: ImageEncoder = None,
    encoding: Encoding = "utf-8",
    separator: Separator = None,
    image_key: ImageKey = None,
) -> None:
    """Answer questions: VQA accuracy, or exact match where there is one answer; a stage-2 model.

    Example: blip2fast eval vqa --model runs/stage2 --data OpenEnded_mscoco_val2014_questions.json
    --annotations mscoco_val2014_annotations.json --images val2014 --out results/okvqa
    """
    source: dict[str, Any] = {"encoding": encoding, "separator": separator, "image_key": image_key}
    setup = _setup(
        (model, dtype, language_model, image_encoder),
        {"source": data, "annotations": annotations, "image_name": image_name, **source},
        out=out,
        images=images,
        features=features,
        limit=limit,
        batch_size=batch_size,
        device=device,
        workers=workers,
        overwrite=overwrite,
    )
    from blip2fast.scoring.writing import evaluate_answers

    options = _generation(num_beams, length_penalty, max_new_tokens, min_new_tokens)
    _show(evaluate_answers(setup, prompt, options), out)


def _setup(
    model: tuple[str, str, str | None, str | None], source: dict[str, Any], **more: Any
) -> Setup:
    from blip2fast.data.source_config import RecordSource

    if is_alone():
        _check_paths(model, source, more["images"], more["features"], more["out"])
    from blip2fast.scoring.models import ModelSource
    from blip2fast.scoring.setup import Setup

    settle_process()
    return Setup(model=ModelSource(*model), data=RecordSource(**source), **more)


def _check_paths(
    model: tuple[str, str, str | None, str | None],
    source: dict[str, Any],
    images: Path | None,
    features: Path | None,
    out: Path,
) -> None:
    if (images is None) == (features is None):
        raise ValueError("give --images, a folder of pictures, or --features, a feature cache")
    check_folder("--images", images)
    check_folder("--features", features)
    check_records(source["source"])
    check_file("--annotations", source.get("annotations"))
    check_models(model=model[0], language_model=model[2], image_encoder=model[3])
    check_output_folder("--out", out)


def _generation(beams: int, penalty: float, most: int, least: int) -> Any:
    options = {"num_beams": beams, "length_penalty": penalty, "max_new_tokens": most}
    return options | ({"min_new_tokens": least} if least else {})


def _show(result: dict[str, Any] | None, out: Path) -> None:
    if result is None:  # another process shows it
        return
    scores = dict(result["metrics"])
    for grouping, kinds in result.get("by", {}).items():
        for kind, value in kinds.items():
            scores[f"{grouping}: {kind}"] = value if isinstance(value, float) else value["CIDEr-D"]
    if on_terminal():
        rows = [[name, f"{value:.4f}"] for name, value in scores.items()]
        show_table([[result.get("task", "metric"), "score"], *rows])
    else:
        for name, value in scores.items():
            print(f"{name:28} {value:.4f}")
    for row in result["failed"][:5]:
        print(f"not evaluated: {row['id']}: {row['error']}")
    count = len(result["failed"])
    print(f"{result['samples'] - count} of {result['samples']} samples; {out / 'result.json'}")
    if count:
        raise typer.Exit(1)
