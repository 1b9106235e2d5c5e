"""The images of an evaluation, read ahead; one that cannot be read is a fault of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import read_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class FolderPictures:
    """Pictures of a folder, or of webdataset shards in it."""

    folder: Path

    def read(self, key: str) -> Image.Image | str:
        """The picture, or why there is none."""
        try:
            return read_picture(self.folder, key)
        except (ValueError, OSError) as error:
            return str(error)


@dataclass(frozen=True)
class CachedTokens:
    """Tokens of the image encoder from a feature cache."""

    cache: FeatureCache

    def read(self, key: str) -> Tensor | str:
        """Tokens [S, E] in fp32, or why there are none."""
        try:
            return self.cache.read([self.cache.row(key)])[0]
        except ValueError as error:
            return str(error)


ImageSource = FolderPictures | CachedTokens


def open_images(images: Path | None, features: Path | None) -> ImageSource:
    """The images of an evaluation.

    Raises:
        ValueError: neither or both are given, or there is nothing.
    """
    if (images is None) == (features is None):
        raise ValueError("give --images, a folder of pictures, or --features, a feature cache")
    if features is not None:
        return CachedTokens(FeatureCache(features))
    if images is None or not images.is_dir():
        raise ValueError(f"--images {images}: not a folder")
    return FolderPictures(images)


@dataclass
class ReadBatch:
    """The images of a batch, each once.

    Attributes:
        found: pictures, or tokens, by key.
        faults: why there is none, by key.
    """

    found: dict[str, Image.Image | Tensor]
    faults: dict[str, str]

    def tokens(self, keys: Sequence[str]) -> Tensor:
        """Tokens [B, S, E] of a feature cache."""
        values = [self.found[key] for key in keys]
        return torch.stack([value for value in values if isinstance(value, Tensor)])

    def pictures(self, keys: Sequence[str]) -> list[Image.Image]:
        """Pictures of a folder."""
        values = [self.found[key] for key in keys]
        return [value for value in values if not isinstance(value, Tensor)]


def read_ahead(
    source: ImageSource, batches: Sequence[Sequence[str]], threads: int
) -> Iterator[ReadBatch]:
    """Read the images of batches, in order, the next batch while this one is used.

    Args:
        batches: the keys of each batch; a key may come several times.
        threads: how many images are read at a time.
    """
    read: Callable[[str], Image.Image | Tensor | str] = source.read
    with ThreadPoolExecutor(max(1, threads)) as pool:

        def start(number: int) -> dict[str, Future[Image.Image | Tensor | str]]:
            keys = batches[number] if number < len(batches) else ()
            return {key: pool.submit(read, key) for key in dict.fromkeys(keys)}

        coming = start(0)
        for number in range(len(batches)):
            current, coming = coming, start(number + 1)
            read_now = {key: future.result() for key, future in current.items()}
            yield ReadBatch(
                {key: value for key, value in read_now.items() if not isinstance(value, str)},
                {key: value for key, value in read_now.items() if isinstance(value, str)},
            )
