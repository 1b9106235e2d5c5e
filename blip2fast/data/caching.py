"""Compute a feature cache from a folder of images (`blip2fast cache-features`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from blip2fast.data.feature_cache import CacheDtype, FeatureCache
from blip2fast.data.images import read_picture
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.frozen.images import transform_for


def cache_images(
    images: str | Path,
    keys: Sequence[str],
    encoder: FrozenImageEncoder,
    out: str | Path,
    *,
    name: str,
    dtype: CacheDtype = "bfloat16",
    batch_size: int = 32,
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

    Raises:
        ValueError: an unreadable image, or a finished cache already at `out`.
    """
    transform = transform_for(name, encoder.image_size)
    device = next(encoder.parameters()).device
    writer = FeatureCache.create(
        out, keys, encoder.num_tokens, encoder.width, dtype, encoder.identity, "resume"
    )
    missing = torch.tensor(writer.missing_rows, dtype=torch.long)
    with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="image") as bar:
        for rows in missing.split(batch_size):
            pixels = [
                transform(read_picture(Path(images), keys[row], transform.least_side))
                for row in rows.tolist()
            ]
            features = encoder(torch.stack(pixels).to(device)).float().cpu()
            for row, feature in zip(rows.tolist(), features, strict=True):
                writer.write(row, feature[None])
            bar.update(len(rows))
    writer.close()
    return FeatureCache(out)
