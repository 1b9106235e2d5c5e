"""How an encoder's checkpoint wants its images: size, mean, deviation and resampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2fast.frozen.lavis_files import is_lavis_file
from blip2fast.frozen.timm_models import is_timm, timm_preprocessing

# CLIP's statistics, which BLIP-2's encoders use; per channel, for pixels in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # of PIL's numbers, which preprocessor_config.json has
_RESCALE = 1 / 255


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint states; BLIP-2's own where it states nothing.

    Attributes:
        size: side of the square image, in pixels; None: not stated.
        mean, std: per channel, for pixels in [0, 1].
        resample: number of PIL's filter.
    """

    size: int | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = BICUBIC


def read_preprocessing(encoder: str) -> Preprocessing:
    """The preprocessing of an encoder: a folder or hub name, or `timm:NAME`.

    Raises:
        ValueError: one that this library does not do.
    """
    if is_timm(encoder):
        return Preprocessing(**timm_preprocessing(encoder))
    if is_lavis_file(encoder):
        return Preprocessing()
    from transformers.utils import cached_file

    values: Mapping[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = cached_file(encoder, name)
        except OSError:
            path = None
        if path is not None:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            values = found.get("image_processor", found)
            break
    if abs(values.get("rescale_factor", _RESCALE) - _RESCALE) > 1e-6:
        raise ValueError(
            f"{encoder}: rescales pixels by {values['rescale_factor']}, where 1/255 is known; "
            "cache its features with code of your own (docs/own_encoder.md)"
        )
    mean, std = values.get("image_mean") or CLIP_MEAN, values.get("image_std") or CLIP_STD
    if values.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    resample = values.get("resample")
    return Preprocessing(
        _side(values), tuple(mean), tuple(std), BICUBIC if resample is None else int(resample)
    )


def _side(values: Mapping[str, Any]) -> int | None:
    """The side of the crop, or of the resized image without one."""
    crops = values.get("do_center_crop") and values.get("crop_size")
    size = values["crop_size"] if crops else values.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return int(size) if isinstance(size, int) else None
