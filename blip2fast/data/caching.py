"""Compute a feature cache from a folder of images (`blip2fast features`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blip2fast.data.feature_cache import FILE_BYTES, CacheDtype, FeatureCache, WhenThere
from blip2fast.data.images import read_picture
from blip2fast.data.skipping import LeftOut, OnError, check_skipped
from blip2fast.data.worker_errors import without_traceback
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.frozen.images import ImageTransform, transform_for
from blip2fast.frozen.unusable import MAX_PIXELS, UnusableImageError


def cache_images(
    images: str | Path,
    keys: Sequence[str],
    encoder: FrozenImageEncoder,
    out: str | Path,
    *,
    name: str,
    dtype: CacheDtype = "bfloat16",
    batch_size: int = 32,
    workers: int = 0,
    overwrite: bool = False,
    on_error: OnError = "raise",
    max_skipped: float | None = None,
    file_bytes: int = FILE_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> FeatureCache:
    """Encode `images/key` for every key into a feature cache; resumes an interrupted write.

    Args:
        images: folder of image files.
        keys: file names in that folder, in the row order of the cache.
        encoder: the frozen encoder, already on its device.
        out: folder of the cache.
        name: the encoder's checkpoint, from which the normalisation mean and std are read.
        dtype: storage type of the features.
        batch_size: images per forward pass.
        workers: processes that read and transform images; 0: this one.
        overwrite: replace a cache at `out`, finished or not.
        on_error: `skip`: leave unreadable images out; the cache lists them (`lacking`).
        max_skipped: how many may be left out: a count, or below 1 a share; None: 0.01.
        file_bytes: most bytes of a feature file.
        max_pixels: most pixels of an image; a larger one is unreadable.

    Raises:
        ValueError: an unreadable image, or more of them than may be left out; a finished cache
            already at `out`; another process that writes it; or a disk without room for it.
    """
    transform = transform_for(name, encoder.image_size)
    device = next(encoder.parameters()).device
    when_there: WhenThere = "replace" if overwrite else "resume"
    with FeatureCache.create(
        *(out, keys, encoder.num_tokens, encoder.width, dtype, encoder.identity, when_there),
        file_bytes=file_bytes,
    ) as writer:
        missing = writer.missing_rows
        print(f"{out}: {writer.nbytes / 1e9:,.2f} GB, {len(missing):,} images to encode")
        loader = DataLoader(
            _Pixels(Path(images), keys, missing, transform, on_error == "skip", max_pixels),
            batch_size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
        )
        left_out: list[LeftOut] = []
        with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="image") as bar:
            for rows, pixels, bad in _read(loader):
                bar.update(len(bad) + len(rows))
                for row, reason in bad:
                    writer.leave_out(row, reason)
                    left_out.append(LeftOut(keys[row], reason, keys[row]))
                check_skipped(left_out, max_skipped, len(keys), "images")
                if not rows:
                    continue
                features = encoder(pixels.to(device, non_blocking=True)).float().cpu()
                for row, feature in zip(rows, features, strict=True):
                    writer.write(row, feature[None])
    return FeatureCache(out)


_Batch = tuple[list[int], Tensor, list[tuple[int, str]]]


def _read(loader: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches of a loader.

    Raises:
        ValueError, OSError: as the images raise, in a worker too; or a worker died.
    """
    try:
        yield from loader
    except (ValueError, OSError) as error:
        raise without_traceback(error) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"{str(error).splitlines()[0]}; give the command again, with fewer --workers if the "
            "machine is out of memory"
        ) from None


@dataclass(frozen=True)
class _Pixels(Dataset[tuple[int, Tensor | str]]):
    """Row numbers and transformed images [3, h, w] of the rows that are missing.

    With `skips`, a text in the place of an image says why it cannot be used.
    """

    folder: Path
    keys: Sequence[str]
    rows: Sequence[int]
    transform: ImageTransform
    skips: bool
    max_pixels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        row = self.rows[place]
        try:
            least = self.transform.least_side
            image = read_picture(self.folder, self.keys[row], least, self.max_pixels)
        except UnusableImageError as error:
            if not self.skips:
                raise
            return row, str(error)
        return row, self.transform(image)


def _collate(
    items: Sequence[tuple[int, Tensor | str]],
) -> _Batch:
    """The rows and pixels of the images that can be used, and the others with the reasons."""
    usable = [(row, image) for row, image in items if isinstance(image, Tensor)]
    bad = [(row, image) for row, image in items if isinstance(image, str)]
    pixels = torch.stack([image for _, image in usable]) if usable else torch.empty(0)
    return [row for row, _ in usable], pixels, bad
