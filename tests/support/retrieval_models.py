"""Small random stage-1 models on disk, with image encoder and tokenizer, and picture files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from blip2_models import WORDS, qformer_words
from PIL import Image
from stage1_cases import SMALL
from stage2_models import SIZE, spread_weights
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    ViTConfig,
    ViTModel,
)

from blip2fast.checkpoints.trained import Description, save_model
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.stage1.model import Blip2Stage1

__all__ = ["WORDS", "write_pictures", "write_retrieval", "write_stage1"]


def write_stage1(folder: Path, seed: int = 3) -> Path:
    """A finished stage-1 run with its image encoder and tokenizer beside it."""
    vision = ViTModel(
        ViTConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=4,
        ),
        add_pooling_layer=False,
    )
    spread_weights(vision, 2)
    vision.save_pretrained(folder / "vision")
    encoder = load_image_encoder(str(folder / "vision"), layer=1)
    qformer_words().save_pretrained(folder / "words")
    torch.manual_seed(0)
    model = Blip2Stage1(dataclasses.replace(SMALL))
    spread_weights(model, seed)
    description = Description(
        stage=1,
        sizes=dataclasses.asdict(model.config),
        image_encoder=encoder.encoder_id,
        tokenizer=str(folder / "words"),
        frozen={"image_encoder": encoder.identity},
    )
    save_model(folder / "run", model.state_dict(), description)
    return folder / "run"


def write_retrieval(folder: Path) -> Path:
    """A transformers Blip2ForImageTextRetrieval with tokenizer and image processor."""
    torch.manual_seed(1)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=4,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            encoder_hidden_size=24,
            vocab_size=64,
            max_position_embeddings=16,
            use_qformer_text_input=True,
        ).to_dict(),
        text_config=OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).to_dict(),
        num_query_tokens=5,
        image_text_hidden_size=16,
        image_token_index=None,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    spread_weights(model, 4)
    model.save_pretrained(folder)
    qformer_words().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Picture files of random colours, `0.png`, `1.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        small = Image.fromarray(draws.integers(0, 256, (4, 5, 3), np.uint8))
        path = folder / f"{number}.png"
        small.resize((24, 20)).save(path)
        paths.append(path)
    return paths
