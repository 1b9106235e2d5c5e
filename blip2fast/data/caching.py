"""Compute a feature cache from a folder of images.

    python -m blip2fast.data.caching --images DIR --records FILE --encoder PATH --out DIR

The images that the records name are read in sorted order, each once. An interrupted run goes on
where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from blip2fast.data.batches import image_keys
from blip2fast.data.feature_cache import CacheDtype, FeatureCache
from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m blip2fast.data.caching", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--images", required=True, help="folder of image files")
    parser.add_argument("--records", required=True, help="JSON lines that name the images")
    parser.add_argument("--encoder", required=True, help="folder or hub name of a vision model")
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--layer", type=int, help="blocks to run; by default BLIP-2's choice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(arguments)
    try:
        keys = image_keys(given.records)
        on_gpu = torch.cuda.is_available()
        compute = torch.bfloat16 if on_gpu else torch.float32
        encoder = load_image_encoder(given.encoder, given.layer, compute)
        cache = cache_images(
            given.images,
            keys,
            encoder.to("cuda" if on_gpu else "cpu"),
            given.out,
            name=given.encoder,
            dtype=given.dtype,
            batch_size=given.batch_size,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{cache.path}: {cache.num_images} images of {cache.num_tokens} tokens x {cache.width}, "
        f"{cache.dtype}, relative error {cache.relative_error:.2g}"
    )


if __name__ == "__main__":
    main()
