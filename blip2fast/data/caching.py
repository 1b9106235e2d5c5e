"""Compute a feature cache from a folder of images (`blip2fast features`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blip2fast.data.feature_cache import CacheDtype, FeatureCache, WhenThere
from blip2fast.data.images import read_picture
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.frozen.images import ImageTransform, transform_for


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

    Raises:
        ValueError: an unreadable image, a finished cache already at `out`, another process that
            writes it, or a disk without room for it.
    """
    transform = transform_for(name, encoder.image_size)
    device = next(encoder.parameters()).device
    when_there: WhenThere = "replace" if overwrite else "resume"
    with FeatureCache.create(
        out, keys, encoder.num_tokens, encoder.width, dtype, encoder.identity, when_there
    ) as writer:
        missing = writer.missing_rows
        print(f"{out}: {writer.nbytes / 1e9:,.2f} GB, {len(missing):,} images to encode")
        loader = DataLoader(
            _Pixels(Path(images), keys, missing, transform),
            batch_size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="image") as bar:
            for rows, pixels in loader:
                features = encoder(pixels.to(device, non_blocking=True)).float().cpu()
                for row, feature in zip(rows.tolist(), features, strict=True):
                    writer.write(row, feature[None])
                bar.update(len(rows))
    return FeatureCache(out)


@dataclass(frozen=True)
class _Pixels(Dataset[tuple[int, Tensor]]):
    """Row numbers and transformed images [3, h, w] of the rows that are missing."""

    folder: Path
    keys: Sequence[str]
    rows: Sequence[int]
    transform: ImageTransform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Tensor]:
        row = self.rows[place]
        image = read_picture(self.folder, self.keys[row], self.transform.least_side)
        return row, self.transform(image)
