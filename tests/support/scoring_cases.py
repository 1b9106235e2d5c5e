"""Small models, pictures and benchmark files for the tests of `blip2fast.scoring`."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_files as files
import torch
from blip2_models import pictures, qformer_words, write_run
from stage1_cases import SMALL
from stage2_models import SIZE, spread_weights
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
    OPTConfig,
    ViTConfig,
    ViTModel,
)

from blip2fast.checkpoints.trained import Description, save_model
from blip2fast.data.source_config import RecordSource
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.scoring.models import ModelSource
from blip2fast.scoring.setup import Setup
from blip2fast.stage1.model import Blip2Stage1

COUNT = 7
BAD = 4  # the picture that cannot be read
CAPTIONS = [
    ["a red ring", "ring with a red cross"],
    ["a blue star on top", "a star"],
    ["a green dog", "the green dog on the left"],
    ["what is it a disc", "a black disc"],
    ["a cat", "the cat"],
    ["bottom left cross", "a cross"],
    ["a red dog and a cat", "a cat with a dog"],
]
NAMES = [f"{number}.png" for number in range(COUNT)]


def write_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, picture in zip(NAMES, pictures(COUNT), strict=True):
        picture.save(folder / name)
    return folder


def write_stage1_run(folder: Path, trains_encoder: bool = False) -> Path:
    """A finished stage-1 run with its image encoder and tokenizer beside it.

    Args:
        trains_encoder: it has an image encoder of its own, whose weights are twice those it
            began with.
    """
    sizes = {"hidden_size": 24, "intermediate_size": 32, "image_size": SIZE, "patch_size": 8}
    vision = ViTModel(
        ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2), add_pooling_layer=False
    )
    spread_weights(vision, 2)
    vision.save_pretrained(folder / "vision")
    qformer_words().save_pretrained(folder / "words")
    encoder = load_image_encoder(str(folder / "vision"), layer=1)
    torch.manual_seed(0)
    model = Blip2Stage1(replace(SMALL, max_position_embeddings=12))
    spread_weights(model, 3)
    state = model.state_dict()
    if trains_encoder:
        state |= {f"image_encoder.{k}": 2 * v for k, v in encoder.state_dict().items()}
    description = Description(
        stage=1,
        trains_encoder=trains_encoder,
        sizes=dataclasses.asdict(model.config),
        image_encoder=encoder.encoder_id,
        tokenizer=str(folder / "words"),
        frozen={"image_encoder": encoder.identity},
    )
    save_model(folder / "run", state, description)
    return folder / "run"


def write_retrieval_model(folder: Path) -> Path:
    """A Blip2ForImageTextRetrieval of transformers with its processor."""
    vision = {
        "hidden_size": SMALL.encoder_hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    config = Blip2Config(
        vision_config=vision,
        qformer_config=replace(SMALL).qformer_config().to_dict(),
        text_config=OPTConfig(hidden_size=16, num_attention_heads=2).to_dict(),
        num_query_tokens=SMALL.num_query_tokens,
        image_text_hidden_size=SMALL.embed_dim,
        image_token_index=None,
    )
    model = Blip2ForImageTextRetrieval(config)
    spread_weights(model, 5)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    qformer_words().save_pretrained(folder)
    return folder


def write_world(folder: Path) -> Path:
    """Both models, pictures of which one is damaged, and files of each layout."""
    write_run(folder / "stage2", "opt")
    write_stage1_run(folder / "stage1")
    write_pictures(folder / "pictures")
    (folder / "pictures" / "damaged").mkdir()
    for name in NAMES:
        content = (folder / "pictures" / name).read_bytes()
        bad = content[: len(content) // 2] if name == NAMES[BAD] else content
        (folder / "pictures" / "damaged" / name).write_bytes(bad)
    entries = [(name, "test", captions) for name, captions in zip(NAMES, CAPTIONS, strict=True)]
    files.karpathy(folder / "flickr.json", entries, coco=False)
    rows = [
        (n // 2, f"what is {colour} ?", ["ring"] * 4 + ["star"] * 6)
        for n, colour in enumerate(["red", "blue", "green", "black", "it", "the"] * 2)
    ]
    files.vqa(folder / "questions.json", folder / "annotations.json", rows)
    return folder


def setup(
    world: Path, out: Path, stage: int, source: dict[str, Any] | None = None, **more: Any
) -> Setup:
    """An evaluation of the stage's run on the captions, or on `source`."""
    return Setup(
        model=ModelSource(str(world / f"stage{stage}" / "run")),
        data=RecordSource(**(source or {"source": str(world / "flickr.json"), "split": "test"})),
        out=out,
        **({"images": world / "pictures", "batch_size": 3} | more),
    )


def questions(world: Path) -> dict[str, Any]:
    return {
        "source": str(world / "questions.json"),
        "annotations": str(world / "annotations.json"),
        "image_name": "{}.png",
    }
