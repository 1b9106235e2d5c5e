"""The images of a batch: tokens from a feature cache, or pixels from image files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blip2fast.data.batches import Batch
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.shards import ShardKey, read_member
from blip2fast.frozen.images import ImageTransform, read_image
from blip2fast.frozen.pictures import load_image as load_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class CachedImages:
    """Reads image tokens from a feature cache."""

    cache: FeatureCache

    def __call__(self, keys: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """`{"image_embeds": [B, S, E]}`."""
        return {"image_embeds": self.cache.read([self.cache.row(key) for key in keys])}

    def check(self, keys: Iterable[str]) -> None:
        """Raise `ValueError` for keys that do not exist, before training starts."""
        for key in keys:
            self.cache.row(key)


@dataclass
class FileImages:
    """Reads pixels from a folder; augmentation is a function of (seed, epoch, sample) alone."""

    folder: Path
    transform: ImageTransform
    seed: int

    def __call__(self, keys: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """`{"images": [B, 3, h, w]}`; without keys, an empty `image_embeds` [0, 1, 1]."""
        if not keys:
            return {"image_embeds": torch.empty(0, 1, 1)}
        pixels = []
        for key, index in zip(keys, batch.samples.tolist(), strict=True):
            # The fourth number separates this random stream from that of the caption choice.
            draws = np.random.default_rng([self.seed, batch.epoch, index, 2])
            pixels.append(self.transform(self._read(key), draws))
        return {"images": torch.stack(pixels)}

    def _read(self, key: str) -> Image.Image:
        return read_picture(self.folder, key, self.transform.least_side)

    def check(self, keys: Iterable[str]) -> None:
        """Raise `ValueError` for keys that do not exist, before training starts."""
        for key in keys:
            inside = ShardKey.parse(key)
            name = key if inside is None else inside.shard
            if not (self.folder / name).is_file():
                raise ValueError(f"image {key!r}: no such file in {self.folder}")


def read_picture(folder: Path, key: str, least: int | None = None) -> Image.Image:
    """Read the image `key`: a file of `folder`, or a member of a tar shard there.

    Raises:
        ValueError: as in `blip2fast.frozen.images.read_image`, or the shard has changed.
    """
    inside = ShardKey.parse(key)
    if inside is None:
        return read_image(folder, key, least)
    if ".." in PurePath(inside.shard).parts or PurePath(inside.shard).is_absolute():
        raise ValueError(f"image {key!r} lies outside {folder}")
    return load_image(read_member(folder, inside), least=least)


def read_bytes(folder: Path, key: str) -> bytes:
    """The file of the image `key`, as it is stored."""
    inside = ShardKey.parse(key)
    return (folder / key).read_bytes() if inside is None else read_member(folder, inside).read()


ImageStore = CachedImages | FileImages
