"""Encodes images and generates text, for `Blip2` and `Chat`; each image is encoded once.

Shapes: B images, Q queries, S image tokens, E image token width, L language model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from blip2fast.evaluation.stage1 import seeded
from blip2fast.inference.inputs import (
    BATCH_SIZE,
    EncodedImages,
    GenerationOptions,
    Images,
    OneImage,
    as_list,
    generate_settings,
    to_pixels,
)
from blip2fast.inference.loading import Loaded
from blip2fast.qformer.checks import image_tokens


class Pictures:
    """Images that are encoded lazily; each once, if rows are requested in order.

    Args:
        parts: the model with its text preparation and image transform.
        images, image_embeds: as in `Blip2.encode`.

    Attributes:
        count: B.
        one: True if a single image was passed, not a list.

    Raises:
        ValueError: no images, both arguments, or pictures without an image encoder.
    """

    def __init__(
        self, parts: Loaded, images: Images | None, image_embeds: Tensor | None = None
    ) -> None:
        self._parts = parts
        self._known: dict[int, Tensor] = {}
        self._images: list[OneImage] = []
        self._embeds: Tensor | None = None
        if image_embeds is not None:
            if images is not None:
                raise ValueError("give images or image_embeds, not both")
            if image_embeds.ndim not in (2, 3) or not image_embeds.numel():
                raise ValueError(
                    f"image_embeds has shape {tuple(image_embeds.shape)}; expected [B, S, E], or "
                    "[S, E] of one image"
                )
            self.one = image_embeds.ndim == 2
            self._embeds = image_embeds[None] if self.one else image_embeds
            self.count = len(self._embeds)
        elif isinstance(images, EncodedImages):
            self.one, self.count = images.one, len(images)
            self._known = dict(enumerate(images.states))
        else:
            self._images, self.one = as_list(images)
            self.count = len(self._images)
            parts.image_transform()  # an error before anything is read

    def read(self, rows: Sequence[int]) -> Tensor:
        """Encode the given rows; returns states as in `EncodedImages`, [len(rows), ...]."""
        new = [row for row in dict.fromkeys(rows) if row not in self._known]
        if new:
            # the last image of one batch may be the first of the next
            kept = {row: self._known[row] for row in rows if row in self._known}
            self._known = kept | dict(zip(new, self._encode(new), strict=True))
        return torch.stack([self._known[row] for row in rows])

    @torch.no_grad()
    def _encode(self, rows: Sequence[int]) -> Tensor:
        model = self._parts.model
        device = model.query_tokens.device
        if self._embeds is not None:
            inputs = {"image_embeds": self._embeds[list(rows)].to(device)}
        else:
            inputs = {"images": self._pixels(rows).to(device, model.query_tokens.dtype)}
        if not model.config.text_conditioned:
            return model.encode_image(**inputs)[0]
        return image_tokens(
            inputs.get("image_embeds"),
            inputs.get("images"),
            model.image_encoder,
            model.config.encoder_hidden_size,
        )

    def _pixels(self, rows: Sequence[int]) -> Tensor:
        """Pixels of the given rows, [len(rows), 3, h, w]."""
        transform = self._parts.image_transform()
        pixels = [to_pixels(self._images[row], transform) for row in rows]
        shapes = {tuple(each.shape) for each in pixels}
        if len(shapes) > 1:
            raise ValueError(f"images of different sizes after their transform: {sorted(shapes)}")
        return torch.stack(pixels)


class Writer:
    """Encodes images and generates texts about them.

    Args:
        parts: the model with its text preparation, prompts and image transform.
    """

    def __init__(self, parts: Loaded) -> None:
        self.parts = parts

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.parts.model.query_tokens.device

    @torch.no_grad()
    def encode(
        self,
        images: Images | None = None,
        *,
        image_embeds: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> EncodedImages:
        """Encode images: see `Blip2.encode`."""
        pictures = Pictures(self.parts, images, image_embeds)
        rows = range(pictures.count)
        _check_batch_size(batch_size)
        read = [
            pictures.read(rows[start : start + batch_size])
            for start in range(0, pictures.count, batch_size)
        ]
        return EncodedImages(torch.cat(read), pictures.one)

    def write(
        self,
        pictures: Pictures,
        rows: Sequence[Sequence[int]],
        texts: Sequence[str],
        defaults: GenerationOptions,
        options: GenerationOptions,
        per_text: int = 1,
    ) -> list[str]:
        """Generate a continuation of each text, which has one marker per image of its row.

        Args:
            pictures: the images.
            rows: the image rows of each text.
            texts: prompts of the language model.
            defaults, options, per_text: as in `generate_settings`.
        """
        settings = generate_settings(defaults, options, per_text)
        text, model = self.parts.text, self.parts.model
        settings |= {"eos_token_id": self.parts.end_ids, "pad_token_id": text.pad_token_id}
        size = options.get("batch_size", BATCH_SIZE)
        _check_batch_size(size)
        form = "image_embeds" if model.config.text_conditioned else "prompts"
        seed = options.get("seed")
        written: list[str] = []
        with nullcontext() if seed is None else seeded(seed, self.device):
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                batch = text.prompt_batch(
                    texts[start : start + size], image_counts=[len(each) for each in some]
                )
                tokens = model.generate(
                    **{form: pictures.read([row for each in some for row in each])},
                    **{name: value.to(self.device) for name, value in batch.items()},
                    **settings,
                )
                written += text.decode(tokens)
        return written


def _check_batch_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"batch_size is {size}; expected at least 1")
