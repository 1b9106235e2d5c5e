"""The images of a batch: tokens from a feature cache, or pixels from image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
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
from blip2fast.frozen.unusable import MAX_PIXELS, UnusableImageError

if TYPE_CHECKING:
    from PIL import Image


class _Store:
    """What both kinds of images have in common."""

    def missing(self, keys: Iterable[str]) -> Iterator[str]:
        """A message for each of the keys that does not exist."""
        raise NotImplementedError

    def check(self, keys: Iterable[str]) -> None:
        """Raise `ValueError` for keys that do not exist, before training starts."""
        for fault in self.missing(keys):
            raise ValueError(fault)


@dataclass
class CachedImages(_Store):
    """Reads image tokens from a feature cache."""

    cache: FeatureCache

    def __call__(self, keys: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """`{"image_embeds": [B, S, E]}`."""
        return self.join([self.cache.row(key) for key in keys])

    def load(self, key: str, epoch: int, sample: int) -> int:
        """What `join` takes of an image: its row in the cache.

        Raises:
            UnusableImageError: the cache lacks it.
        """
        return self.cache.row(key)

    def join(self, loaded: Sequence[int]) -> dict[str, Tensor]:
        """The image part of a batch, of its loaded images."""
        return {"image_embeds": self.cache.read(loaded)}

    def missing(self, keys: Iterable[str]) -> Iterator[str]:
        """A message for each of the keys that does not exist."""
        for key in keys:
            try:
                self.cache.row(key)
            except UnusableImageError as error:
                yield str(error)


@dataclass
class FileImages(_Store):
    """Reads pixels from a folder; augmentation is a function of (seed, epoch, sample) alone."""

    folder: Path
    transform: ImageTransform
    seed: int
    max_pixels: int = MAX_PIXELS

    def __call__(self, keys: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        """`{"images": [B, 3, h, w]}`; without keys, an empty `image_embeds` [0, 1, 1]."""
        samples = batch.samples.tolist()
        return self.join(
            [self.load(key, batch.epoch, n) for key, n in zip(keys, samples, strict=True)]
        )

    def load(self, key: str, epoch: int, sample: int) -> Tensor:
        """What `join` takes of an image: its pixels [3, h, w].

        Raises:
            UnusableImageError: missing or damaged.
        """
        # The fourth number separates this random stream from that of the caption choice.
        draws = np.random.default_rng([self.seed, epoch, sample, 2])
        image = read_picture(self.folder, key, self.transform.least_side, self.max_pixels)
        return self.transform(image, draws)

    def join(self, loaded: Sequence[Tensor]) -> dict[str, Tensor]:
        """The image part of a batch, of its loaded images."""
        if not loaded:
            return {"image_embeds": torch.empty(0, 1, 1)}
        return {"images": torch.stack(list(loaded))}

    def missing(self, keys: Iterable[str]) -> Iterator[str]:
        """A message for each of the keys that does not exist."""
        for key in keys:
            inside = ShardKey.parse(key)
            name = key if inside is None else inside.shard
            if _climbs(name):
                remedy = "; import its records again with --images" if name[0] == "/" else ""
                yield f"image {key!r} lies outside {self.folder}{remedy}"
            elif not (self.folder / name).is_file():
                yield f"image {key!r}: no such file in {self.folder}"


def read_picture(
    folder: Path, key: str, least: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read the image `key`: a file of `folder`, or a member of a tar shard there.

    Raises:
        UnusableImageError, ValueError: as in `blip2fast.frozen.images.read_image`, or the shard
            has changed.
    """
    inside = ShardKey.parse(key)
    if inside is None:
        return read_image(folder, key, least, max_pixels)
    if _climbs(inside.shard):
        raise UnusableImageError(f"image {key!r} lies outside {folder}")
    return load_image(read_member(folder, inside), max_pixels=max_pixels, least=least)


def _climbs(name: str) -> bool:
    """Whether a file is named that may lie outside the folder of the images."""
    return ".." in PurePath(name).parts or PurePath(name).is_absolute()


def read_bytes(folder: Path, key: str) -> bytes:
    """The file of the image `key`, as it is stored."""
    inside = ShardKey.parse(key)
    return (folder / key).read_bytes() if inside is None else read_member(folder, inside).read()


ImageStore = CachedImages | FileImages
_AHEAD = 256


def unusable_images(store: ImageStore, keys: Iterable[str], threads: int = 4) -> dict[str, str]:
    """The images that cannot be used, each with the reason; files are read to their end."""

    def fault(key: str) -> str | None:
        try:
            store.load(key, 0, 0)
        except UnusableImageError as error:
            return str(error)
        return None

    found: dict[str, str] = {}
    rest = iter(keys)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(rest, _AHEAD)):
            faults = pool.map(fault, some)
            found |= {key: why for key, why in zip(some, faults, strict=True) if why is not None}
    return found
