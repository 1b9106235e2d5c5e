"""The images and held-out records of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blip2fast.checkpoints.trained import Description, load_parameters, read_parameters
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages, FileImages, ImageStore, unusable_images
from blip2fast.data.records import images_of
from blip2fast.data.skipping import LeftOut, check_skipped, most_skipped
from blip2fast.data.source_config import Given
from blip2fast.data.sources import open_records, whereabouts
from blip2fast.data.table import RecordTable
from blip2fast.frozen.identity import FrozenIdentity
from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
from blip2fast.frozen.images import transform_for
from blip2fast.training.config import RunConfig
from blip2fast.training.precision import DTYPE_OF

Records = Sequence[Any]  # CaptionRecord, or QuestionRecord for vqa


@dataclass
class ImageSource:
    """The source of a run's image tokens.

    Attributes:
        encoder: runs in the training loop if images are files; else None.
        width: E.
        encoder_id: name of the encoder.
        identity: the encoder's identity, if known; of one that is trained, before its training.
        is_own: whether the encoder becomes part of the model and is stored with it.
    """

    store: ImageStore
    encoder: FrozenImageEncoder | None
    width: int
    encoder_id: str
    identity: FrozenIdentity | None
    is_own: bool = False


@dataclass
class HeldOut:
    """The held-out set: records and their images."""

    records: Records
    images: ImageStore

    def keys(self) -> list[str]:
        """The distinct image keys, in the order of their first record."""
        return list(dict.fromkeys(key for record in self.records for key in images_of(record)))


def image_folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def check_unusable(
    config: RunConfig, store: ImageStore, keys: Sequence[str], bad: Sequence[LeftOut], usable: int
) -> None:
    """Refuse training data that are plainly beyond `data.max_skipped` before anything is drawn."""
    most, total = config.data.max_skipped, usable + len(bad)
    check_skipped(bad, most, total, "records (data.on_error: skip)")
    missing = list(islice(store.missing(keys), most_skipped(most, total) + 1))
    check_skipped(missing, most, total, "images or more (data.on_error: skip)")


def held_out_data(
    config: RunConfig, source: ImageSource, note: Callable[[str], None] | None
) -> tuple[HeldOut | None, list[LeftOut]]:
    """The held-out set, and what is left out of it where `data.on_error` is `skip`."""
    data = config.data
    if data.eval_records is None:
        return None, []
    store, folder = _eval_images(config, source), image_folder(data.eval_images)
    if data.on_error == "raise":
        held_out = HeldOut(open_records(data.eval_records, data.task, folder, note), store)
        held_out.images.check(set(held_out.keys()))
        return held_out, []
    left_out: list[LeftOut] = []
    table = open_records(data.eval_records, data.task, folder, note, left_out)
    total = len(table) + len(left_out)
    held_out, unusable = _without_unusable(data.eval_records, table, store, folder)
    left_out += unusable
    check_skipped(left_out, data.max_skipped, total, "held-out records (data.on_error: skip)")
    return held_out, left_out


def _without_unusable(
    given: Given | Sequence[Given], table: RecordTable, store: ImageStore, folder: Path | None
) -> tuple[HeldOut, list[LeftOut]]:
    """The held-out records whose images can all be used, and the others."""
    held_out = HeldOut(table, store)
    faults = unusable_images(store, held_out.keys())
    if not faults:
        return held_out, []
    rows = {n: key for n, record in enumerate(table) for key in images_of(record) if key in faults}
    found = [
        LeftOut(where, faults[rows[row]], rows[row])
        for row, where in whereabouts(given, table, folder, rows).items()
    ]
    held_out.records = [record for row, record in enumerate(table) if row not in rows]
    return held_out, found


def train_images(config: RunConfig, start: Description | None) -> ImageSource:
    """The source of the training images.

    Raises:
        ValueError: a feature cache, int8 or compilation, where `init_from` has its own encoder.
    """
    data = config.data
    inherits = start is not None and start.trains_encoder
    if data.features is not None:
        if inherits:
            raise ValueError(
                f"init_from {config.init_from!r} has an image encoder that was trained with it, "
                f"and data.features {data.features!r} are the tokens of another: give data.images "
                "and data.image_encoder instead"
            )
        cache = FeatureCache(data.features)
        reader = CachedImages(cache)
        return ImageSource(reader, None, cache.width, cache.encoder_id, cache.encoder)
    own = config.image_encoder.train or inherits
    if inherits and (config.image_encoder.quantization != "none" or config.image_encoder.compile):
        raise ValueError(
            f"init_from {config.init_from!r} has an image encoder that was trained with it and is "
            "stored again: leave out image_encoder.quantization and compile"
        )
    if inherits and start is not None:
        encoder = _inherited_encoder(config, start)
    else:
        # one that is trained begins in fp32, from which the engine makes its copy
        dtype = torch.float32 if own else DTYPE_OF[config.precision]
        name, layer = str(data.image_encoder), data.image_encoder_layer
        quantization = config.image_encoder.quantization
        encoder = load_image_encoder(name, layer, dtype, data.image_size, quantization)
    if config.image_encoder.compile:
        encoder.compile_blocks()
    files = _image_files(config, data.images, data.augment, encoder.image_size)
    return ImageSource(files, encoder, encoder.width, encoder.encoder_id, encoder.identity, own)


def _inherited_encoder(config: RunConfig, start: Description) -> FrozenImageEncoder:
    """The image encoder of `init_from`, for this run's image size.

    Raises:
        ValueError: the weights do not fit the encoder in `data.image_encoder`.
    """
    data, where = config.data, f"init_from {config.init_from!r}"
    state = {
        name.removeprefix("image_encoder."): value
        for name, value in read_parameters(str(config.init_from)).items()
        if name.startswith("image_encoder.")
    }
    # positions that are never trained are interpolated once, from those of the checkpoint
    trained_size = any("position_embedding" in name for name in state)
    size = start.image_size if trained_size or data.image_size is None else data.image_size
    name, layer = str(data.image_encoder), data.image_encoder_layer
    encoder = load_image_encoder(name, layer, torch.float32, size)
    encoder.unfreeze()
    load_parameters(encoder, state, where)
    encoder.requires_grad_(False)
    if data.image_size is not None:
        encoder.resize(data.image_size)
    return encoder


def _eval_images(config: RunConfig, source: ImageSource) -> ImageStore:
    if config.data.eval_features is not None:
        return CachedImages(FeatureCache(config.data.eval_features))
    size = 0 if source.encoder is None else source.encoder.image_size
    return _image_files(config, config.data.eval_images, augment=False, size=size)


def _image_files(config: RunConfig, folder: str | None, augment: bool, size: int) -> FileImages:
    data = config.data
    if folder is None or data.image_encoder is None:
        raise ValueError("data: give features, or images and image_encoder")
    transform = transform_for(data.image_encoder, size, augment)
    return FileImages(Path(folder), transform, config.seed, data.max_pixels)
