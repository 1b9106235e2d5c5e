"""Models that write captions: our own, and those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LogitsProcessorList,
)

from blip2fast._imports import needs
from blip2fast.capfilt.sampling import SeededNucleus, draws_of
from blip2fast.checkpoints.trained import is_trained
from blip2fast.frozen.hub import check_weights
from blip2fast.frozen.pictures import to_rgb
from blip2fast.inference.inputs import Transform
from blip2fast.inference.model import Blip2
from blip2fast.inference.model_folders import check_model_folder, stage_of_transformers

with needs("read images", "PIL"):
    from PIL import Image


@dataclass(frozen=True)
class Sampling:
    """How captions are sampled.

    Attributes:
        num_captions: for each image; 10 in the BLIP-2 paper.
        top_p: total probability of the tokens to draw from (BLIP: 0.9).
        max_new_tokens, min_new_tokens: of a caption.
        seed: with an image's key, decides what is drawn for it.
        prompt: of our own models; None: their own.
    """

    num_captions: int = 10
    top_p: float = 0.9
    max_new_tokens: int = 30
    min_new_tokens: int = 5
    seed: int = 0
    prompt: str | None = None

    def options(self, keys: Sequence[str]) -> dict[str, Any]:
        """Arguments of `generate` for images of these keys."""
        draws = draws_of(self.seed, keys, self.num_captions, self.max_new_tokens)
        return {
            "do_sample": True,
            "num_beams": 1,
            "top_p": 1.0,
            "top_k": 0,
            "temperature": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "logits_processor": LogitsProcessorList([SeededNucleus(draws, self.top_p)]),
        }


class Captioner(Protocol):
    """Writes captions of images.

    Attributes:
        transform: from a PIL image to a tensor, of one shape for all images.
    """

    @property
    def transform(self) -> Transform: ...

    def write(self, pixels: Tensor, keys: Sequence[str], how: Sampling) -> list[list[str]]:
        """Captions of transformed images [B, 3, h, w]: `how.num_captions` of each."""
        ...


class OwnCaptioner:
    """A `Blip2`: a run of stage 2, or a transformers BLIP-2."""

    def __init__(self, model: Blip2) -> None:
        self._model = model
        self.transform = model.transform

    def write(self, pixels: Tensor, keys: Sequence[str], how: Sampling) -> list[list[str]]:
        """See `Captioner`."""
        texts: Any = self._model.caption(
            list(pixels),
            prompt=how.prompt,
            num_captions=how.num_captions,
            batch_size=len(pixels),
            **how.options(keys),
        )
        return [[each] if isinstance(each, str) else list(each) for each in texts]


class TransformersCaptioner:
    """A captioner of transformers, such as BLIP or GIT: `AutoModelForImageTextToText`.

    Args:
        path: folder or hub name.
        dtype, device: of the model.
    """

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=False
        )
        self._model.to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self._processor = AutoImageProcessor.from_pretrained(
            path, backend="pil", trust_remote_code=False
        )

    def transform(self, image: Image.Image) -> Tensor:
        """[3, h, w], by the model's image processor."""
        pixels: Tensor = self._processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels[0]

    @torch.no_grad()
    def write(self, pixels: Tensor, keys: Sequence[str], how: Sampling) -> list[list[str]]:
        """See `Captioner`."""
        given = pixels.to(self._model.device, self._model.dtype)
        tokens = self._model.generate(
            pixel_values=given, num_return_sequences=how.num_captions, **how.options(keys)
        )
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        n = how.num_captions
        return [texts[start : start + n] for start in range(0, len(texts), n)]


def check_captioner(path: str) -> None:
    """Refuse a captioner before anything is loaded.

    Raises:
        ValueError: not found, or a model that does not write.
    """
    if is_trained(path) or (Path(path) / "checkpoints").is_dir():
        check_model_folder(path, (2,))
        return
    fault = check_weights("captioner", path)
    if fault is not None:
        raise ValueError(fault)
    if stage_of_transformers(path) == 1:
        check_model_folder(path, (2,))


def load_captioner(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    language_model: str | None = None,
    image_encoder: str | None = None,
) -> Captioner:
    """A captioner of a folder or hub name; of a run, its frozen models where they are now.

    Raises:
        ValueError: a model that cannot be loaded, or does not write.
    """
    if is_trained(path):
        model = Blip2.from_pretrained(
            path,
            dtype=dtype,
            device=device,
            language_model=language_model,
            image_encoder=image_encoder,
        )
        return OwnCaptioner(model)
    if stage_of_transformers(path) == 2:
        return OwnCaptioner(Blip2.from_pretrained(path, dtype=dtype, device=device))
    try:
        return TransformersCaptioner(path, dtype, device)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"captioner {path!r} cannot be loaded: {reason}") from error
