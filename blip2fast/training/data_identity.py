"""What a run's data and tokenizers are, by their contents, so that a resume notices a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from blip2fast.data.images import CachedImages, FileImages, ImageStore, read_bytes
from blip2fast.data.records import AnyRecord
from blip2fast.data.sources import MOST_CHECKED, checked_records
from blip2fast.data.table import RecordTable
from blip2fast.frozen.unusable import UnusableImageError

# Images that are read: the first, the last, and those evenly spaced between.
_SAMPLES = 16


def identify_data(
    records: Sequence[AnyRecord],
    images: ImageStore,
    keys: Sequence[str],
    tokenizers: Sequence[Any],
) -> dict[str, str]:
    """Digests of the training data, by what they are of.

    All records are hashed, or of more than `MOST_CHECKED` a sample and what tables state of
    themselves. Of a feature cache all keys are hashed, and the contents of a sample.

    Args:
        records: those of the run.
        images: the images of the run.
        keys: the distinct keys of the records that are hashed.
        tokenizers: the tokenizers that read the texts.
    """
    of_records = hashlib.sha256()
    for record in checked_records(records):
        of_records.update(f"{record!r}\n".encode())
    if len(records) > MOST_CHECKED and isinstance(records, RecordTable):
        of_records.update("".join(records.digests).encode())
    chosen = [keys[i * (len(keys) - 1) // max(_SAMPLES - 1, 1)] for i in range(_SAMPLES)]
    words = "".join(_words(tokenizer) for tokenizer in tokenizers).encode()
    return {
        "contents of data.records": f"{len(records)} records, {of_records.hexdigest()[:16]}",
        "contents of the images": f"{len(keys)} images, {_of_images(images, chosen)[:16]}",
        "the tokenizer": hashlib.sha256(words).hexdigest()[:16],
    }


def _of_images(images: ImageStore, chosen: Sequence[str]) -> str:
    digest = hashlib.sha256()
    if isinstance(images, CachedImages):
        cache = images.cache
        digest.update("\0".join(cache.keys).encode())
        there = [cache.row(key) for key in chosen if key in cache]
        digest.update(cache.read(there).numpy().tobytes())
    elif isinstance(images, FileImages):
        for key in chosen:
            digest.update(key.encode() + _bytes(images, key))
    return digest.hexdigest()


def _bytes(images: FileImages, key: str) -> bytes:
    """The file of an image; empty where there is none, which a run may skip (`on_error`)."""
    try:
        return read_bytes(images.folder, key)
    except (FileNotFoundError, NotADirectoryError, UnusableImageError):
        return b""


def _words(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(
            [sorted(tokenizer.get_vocab().items()), str(tokenizer.all_special_tokens)]
        )
    values = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # as of the last call
        values.pop(name, None)
    return json.dumps([values, str(tokenizer.all_special_tokens)], sort_keys=True)
