"""The small image tower: a ViT trained by masked autoencoding, on images alone.

As in the paper, the image encoder is trained on its own, by others' means, and frozen: it never
meets a caption. Three quarters of the patches are hidden and reconstructed from the rest (He et
al., arXiv 2111.06377); then the decoder is thrown away.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from blip2fast.scenes.schedule import cosine_factor

# Pixels in [0, 1] become (x - MEAN) / STD; saved beside the tower as its preprocessor.
MEAN, STD = 0.5, 0.5


class ImageTowerReport(NamedTuple):
    """What training gave: reconstruction loss (mean of the last tenth of the steps), seconds."""

    steps: int
    loss: float
    seconds: float


def train_image_tower(
    images: NDArray[np.uint8],
    out_dir: Path | str,
    *,
    width: int = 64,
    layers: int = 3,
    steps: int = 300,
    batch_size: int = 128,
    seed: int = 0,
) -> ImageTowerReport:
    """Train a ViT by masked autoencoding and save it as a `transformers` folder.

    Args:
        images: uint8 [n, 3, h, w] with h = w, a multiple of 8; the ViT cuts them into 8x8 patches.
        out_dir: where `config.json`, `model.safetensors` and `preprocessor_config.json` go;
            `ViTModel.from_pretrained(out_dir, add_pooling_layer=False)` reads them.
        width: token width E; a multiple of 16, the width of a head.
        layers: transformer blocks.
        steps: optimiser steps.
        batch_size: images a step.
        seed: of the weights, the batches and the masks.

    Raises:
        ValueError: for images of another shape or type, or a width that heads do not divide.
    """
    size = _check(images, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _autoencoder(size, width, layers)
        started = time.perf_counter()
        losses = _train(model, images, steps, batch_size, seed)
        seconds = time.perf_counter() - started
    tower = ViTModel(_tower_config(size, width, layers), add_pooling_layer=False)
    tower.load_state_dict(model.vit.state_dict())
    tower.save_pretrained(out_dir)
    _save_preprocessor(Path(out_dir), size)
    return ImageTowerReport(steps, float(np.mean(losses[-max(1, steps // 10) :])), seconds)


def to_pixel_values(images: NDArray[np.uint8]) -> Tensor:
    """Images uint8 [B, 3, h, w] to the float32 tensor that the tower takes."""
    return (torch.from_numpy(images).float() / 255.0 - MEAN) / STD


def _train(
    model: ViTMAEForPreTraining,
    images: NDArray[np.uint8],
    steps: int,
    batch_size: int,
    seed: int,
) -> list[float]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_factor(step, steps, warmup=steps // 10)
    )
    rng = np.random.default_rng(seed)
    losses = []
    model.train()
    for _ in (bar := tqdm(range(steps), desc="image tower", unit="step")):
        rows = rng.integers(len(images), size=batch_size)
        loss = model(pixel_values=to_pixel_values(images[rows])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return losses


def _autoencoder(size: int, width: int, layers: int) -> ViTMAEForPreTraining:
    shared = _tower_config(size, width, layers).to_diff_dict()
    shared.pop("model_type", None)
    shared.pop("transformers_version", None)
    config = ViTMAEConfig(
        **shared,
        mask_ratio=0.75,
        # Normalised patches would hide the colours.
        norm_pix_loss=False,
        decoder_hidden_size=width // 2,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=max(1, width // 32),
        decoder_intermediate_size=2 * width,
    )
    return ViTMAEForPreTraining(config)


def _tower_config(size: int, width: int, layers: int) -> ViTConfig:
    return ViTConfig(
        image_size=size,
        patch_size=size // 8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _save_preprocessor(folder: Path, size: int) -> None:
    # Written by hand: transformers' own image processors differ with and without torchvision.
    values = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": {"height": size, "width": size},
    }
    text = json.dumps(values, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _check(images: NDArray[np.uint8], width: int) -> int:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [n, 3, h, w] with n >= 1"
        )
    height, breadth = images.shape[2:]
    if height != breadth or height % 8:
        raise ValueError(
            f"images are {height}x{breadth} pixels; the tower takes squares with a side that is a "
            "multiple of 8"
        )
    if width < 16 or width % 16:
        raise ValueError(f"width is {width}; use a multiple of 16, the width of a head")
    return int(height)
