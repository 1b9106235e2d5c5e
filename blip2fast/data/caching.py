"""Compute a feature cache from a folder of images (`blip2fast cache-features`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from blip2fast.data.feature_cache import CacheDtype, FeatureCache
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.frozen.images import read_image, transform_for


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
    """Encode `images/key` for every key and write a cache; resumes an interrupted one.

    Args:
        images: folder.
        keys: file names in it; the rows of the cache.
        encoder: on the device that it is to run on.
        out: folder of the cache.
        name: of the encoder's checkpoint, for its mean and deviation.
        dtype: how features are stored.
        batch_size: images encoded at a time.

    Raises:
        ValueError: an image that cannot be read, or a cache that is there.
    """
    transform = transform_for(name, encoder.image_size)
    device = next(encoder.parameters()).device
    writer = FeatureCache.create(
        out, keys, encoder.num_tokens, encoder.width, dtype, encoder.identity, "resume"
    )
    missing = torch.tensor(writer.missing_rows, dtype=torch.long)
    with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="image") as bar:
        for rows in missing.split(batch_size):
            pixels = [transform(read_image(Path(images), keys[row])) for row in rows.tolist()]
            features = encoder(torch.stack(pixels).to(device)).float().cpu()
            for row, feature in zip(rows.tolist(), features, strict=True):
                writer.write(row, feature[None])
            bar.update(len(rows))
    writer.close()
    return FeatureCache(out)
