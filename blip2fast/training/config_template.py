"""The commented configuration that `blip2fast init` writes."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import yaml

from blip2fast.training.config_files import parse_config, parse_text

_TEMPLATE = """\
# {title}
# Every key: `blip2fast.training.RunConfig`; one may be changed for a run with --set KEY=VALUE.
stage: {stage}
output_dir: {output_dir}
{init_from}data:
  records: {records}  # JSON lines, CSV, COCO, ... (docs/data.md); try: blip2fast data check
  images: {images}
  image_encoder: {encoder}  # frozen; runs in the loop
  # Without random crops, encode each image once: blip2fast features ..., then set
  # features: FOLDER in place of images and image_encoder.
  augment: true
  workers: 4  # processes that read images
  # eval_records: held_out.jsonl  # losses and retrieval or captions on held-out images
  # eval_images: {images}
{model}optim:
  max_steps: {max_steps}
  batch_size: {batch_size}  # a process and pass; the paper's step has {paper_batch:,} samples
  accumulation: 1  # passes a step
  lr: 1e-4
  min_lr: {min_lr}
  warmup_steps: 2000
seed: 0
precision: bf16  # or fp32, fp16
zero_stage: 1  # what DeepSpeed partitions: 0 nothing, 1 optimizer, 2 gradients, 3 parameters
save_every: 1000
eval_every: 0  # with eval_records: every so many steps
log_every: 50
"""

_STAGE1_MODEL = """\
model:  # BLIP-2's sizes where nothing is said
  tokenizer: google-bert/bert-base-uncased
  bert: google-bert/bert-base-uncased  # initialises the Q-Former
"""

_STAGE2_MODEL = """\
language_model:
  path: {language_model}  # frozen; `blip2fast plan` says what it takes
  prompt: ""  # text before every caption
{end_text}offload: auto  # where the language model lives: the first place in which it fits
"""


def write_config(
    path: Path,
    *,
    stage: int = 1,
    records: str = "captions.jsonl",
    images: str = "images",
    encoder: str = "openai/clip-vit-large-patch14",
    language_model: str = "facebook/opt-2.7b",
    init_from: str = "runs/stage1",
    overwrite: bool = False,
) -> str:
    """Write a commented configuration, checked as a run would check it; nothing is loaded.

    Args:
        path: the yaml file to write. The run's folder is `runs/` and the name of the file.
        stage: 1, or 2.
        records: images and their texts, of any layout.
        images: folder of the image files.
        encoder: folder or hub name of the frozen image encoder.
        language_model: folder or hub name of the frozen language model (stage 2).
        init_from: the stage-1 run that stage 2 starts from.
        overwrite: replace a file that is there.

    Returns:
        The command that starts the run.

    Raises:
        ValueError: there is such a file already, or the path is not one of a yaml file.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a configuration is a yaml file; try {path.with_suffix('.yaml')}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: give --overwrite, or another name")
    if stage not in (1, 2):
        raise ValueError(f"stage {stage}: expected 1 or 2")
    # the published OPT models end a caption by a line break
    opt = "opt" in Path(language_model).name.lower()
    end_text = '  end_text: "\\n"  # as the published OPT models were trained\n' if opt else ""
    text = _TEMPLATE.format(
        title=f"Stage {stage} of BLIP-2 (arXiv 2301.12597); written by `blip2fast init`.",
        stage=stage,
        output_dir=_scalar(f"runs/{path.stem}"),
        init_from="" if stage == 1 else f"init_from: {_scalar(init_from)}\n",
        records=_scalar(records),
        images=_scalar(images),
        encoder=_scalar(encoder),
        model=_STAGE1_MODEL
        if stage == 1
        else _STAGE2_MODEL.format(language_model=_scalar(language_model), end_text=end_text),
        max_steps=250_000 if stage == 1 else 80_000,
        batch_size=64,
        paper_batch=1_680 if stage == 1 else 1_920,
        min_lr="1e-5" if stage == 1 else "5e-5",
    )
    parse_config(parse_text(text, str(path)), str(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return f"blip2fast train --config {shlex.quote(str(path))}"


def _scalar(text: str) -> str:
    """A string as yaml reads it back, quoted where it must be."""
    plain = yaml.safe_load(text) if text.strip() else None
    return text if plain == text and "#" not in text else json.dumps(text)
