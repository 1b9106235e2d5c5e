"""Reads and transforms images to the tensors that a frozen image encoder takes (PIL and NumPy).

Legend: h = w the encoder's image size, in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor

from blip2fast._imports import needs
from blip2fast.frozen.pictures import load_image, to_rgb
from blip2fast.frozen.preprocessing import BICUBIC, CLIP_MEAN, CLIP_STD, read_preprocessing
from blip2fast.frozen.unusable import MAX_PIXELS, UnusableImageError

with needs("read images", "PIL"):
    from PIL import Image


@dataclass(frozen=True)
class ImageTransform:
    """PIL image to a normalised tensor [3, h, w].

    Evaluation resizes the whole image to a square. Training (`augment`) takes a random
    crop of at least half the area, with aspect ratio 3:4 to 4:3, and flips it horizontally with
    probability 0.5 (paper, section 3.4), using the random generator passed in.

    Args:
        size: h = w.
        mean, std: per channel.
        augment: random crops and flips.
        resample: number of PIL's filter; 3: bicubic, as in BLIP-2.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    augment: bool = False
    resample: int = BICUBIC

    @property
    def least_side(self) -> int:
        """The shorter side from which a larger picture may be decoded (`load_image`), in pixels.

        Twice what the resized image shows, of the smallest crop.
        """
        return self.size * (4 if self.augment else 2)

    def __call__(self, image: Image.Image, draws: np.random.Generator | None = None) -> Tensor:
        """Transform one image; `draws` is needed with `augment`.

        Raises:
            ValueError: `augment` without a generator.
        """
        image = to_rgb(image)
        box = None
        if self.augment:
            if draws is None:
                raise ValueError("augment needs a random generator")
            box = _random_crop(image.width, image.height, draws)
        small = image.resize((self.size, self.size), Image.Resampling(self.resample), box=box)
        if self.augment and draws is not None and draws.random() < 0.5:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(small, dtype=np.float32) / 255.0
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))


def transform_for(encoder: str, size: int, augment: bool = False) -> ImageTransform:
    """The transform of an encoder's checkpoint: its own mean, deviation and resampling.

    BLIP-2's, which are CLIP's, where the checkpoint states none.

    Args:
        encoder: folder or hub name, or `timm:NAME`.
        size: h = w.
        augment: random crops and flips.
    """
    own = read_preprocessing(encoder)
    return ImageTransform(size, own.mean, own.std, augment, own.resample)


def read_image(
    folder: Path, key: str, least: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read `folder/key` as `load_image` does. Links are followed, wherever they point.

    Args:
        folder: Of the images.
        key: Path in it.
        least, max_pixels: As in `load_image`.

    Raises:
        UnusableImageError: Not found, outside the folder, or not an image.
        ValueError: The system cannot read it just now.
    """
    path = PurePath(key)
    if path.is_absolute() or ".." in path.parts:
        raise UnusableImageError(f"image {key!r} lies outside {folder}")
    return load_image(folder / key, max_pixels=max_pixels, least=least)


def _random_crop(
    width: int, height: int, draws: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random box of 0.5 to 1 of the area, aspect 3:4 to 4:3; the whole image if none fits."""
    for _ in range(10):
        area = width * height * draws.uniform(0.5, 1.0)
        aspect = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = draws.uniform(0, width - w), draws.uniform(0, height - h)
            return float(left), float(top), float(left + w), float(top + h)
    return 0.0, 0.0, float(width), float(height)
