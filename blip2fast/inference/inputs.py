"""Inputs of `Blip2`: images in any form, questions, and generation options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from blip2fast._imports import needs
from blip2fast.frozen.pictures import load_image

with needs("read images", "PIL"):
    from PIL import Image

Transform = Callable[[Image.Image], Tensor]
OneImage = Image.Image | str | Path | np.ndarray[Any, Any] | Tensor
Questions = str | Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class EncodedImages:
    """Images encoded once and reused for several texts; created by `Blip2.encode`.

    Attributes:
        states: soft prompts [B, Q, L]; or image encoder tokens [B, S, E] for a text-conditioned
            Q-Former, which has to run again for every text.
        one: True if a single image was passed, not a list.
    """

    states: Tensor
    one: bool

    def __len__(self) -> int:
        return len(self.states)


Images = OneImage | Sequence[OneImage] | EncodedImages


class GenerationOptions(TypedDict, total=False):
    """Options of text generation; any other option is passed to transformers' `generate`.

    Attributes:
        num_beams: beam width; 1 is greedy decoding.
        do_sample: sample instead of beam search (one beam).
        top_p: nucleus sampling: total probability of the tokens to sample from; 0.9 by default.
        temperature: divides the logits before sampling.
        max_new_tokens, min_new_tokens: limits on the output length.
        length_penalty: exponent of the length by which a beam's score is divided; values below 0
            favour short texts.
        seed: seed for sampling; by default PyTorch's global generator is used as it is.
        batch_size: maximum number of texts generated at a time.
    """

    num_beams: int
    do_sample: bool
    top_p: float
    temperature: float
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    repetition_penalty: float
    seed: int
    batch_size: int


BATCH_SIZE = 32


def generate_settings(
    defaults: GenerationOptions, options: GenerationOptions, per_text: int = 1
) -> dict[str, Any]:
    """Arguments of `generate`, from the task's defaults and the caller's options.

    Args:
        defaults: defaults of the task.
        options: options set by the caller.
        per_text: number of sequences to return per text.

    Raises:
        ValueError: contradictory options, with their values.
    """
    given: dict[str, Any] = dict(options)
    for name in ("batch_size", "seed"):
        given.pop(name, None)
    sampled = bool(given.get("do_sample", False))
    settings: dict[str, Any] = {**defaults, "do_sample": sampled, "num_return_sequences": per_text}
    if sampled:
        # transformers' default `top_k` would truncate the nucleus
        settings |= {"num_beams": 1, "top_p": 0.9, "temperature": 1.0, "top_k": 0}
    else:
        idle = [name for name in ("top_p", "top_k", "temperature") if name in given]
        if idle:
            raise ValueError(f"{idle[0]}={given[idle[0]]} has no effect; set do_sample=True too")
    settings |= given
    if settings["num_beams"] < 1 or per_text < 1:
        raise ValueError(
            f"num_beams={settings['num_beams']}, num_captions={per_text}: expected at least 1"
        )
    if not sampled and per_text > settings["num_beams"]:
        raise ValueError(
            f"num_captions={per_text} of num_beams={settings['num_beams']}: raise num_beams, or "
            "set do_sample=True"
        )
    if settings["num_beams"] == 1:
        settings.pop("length_penalty", None)
    return settings


def as_list(images: Images | None) -> tuple[list[OneImage], bool]:
    """The images as a list, and whether a single image was passed.

    Raises:
        ValueError: no images, or something that is not an image.
    """
    if images is None or isinstance(images, EncodedImages):
        raise ValueError("no images: give images=..., or image_embeds=...")
    if isinstance(images, str | Path | Image.Image):
        return [images], True
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim == 3:
            return [images], True
        if images.ndim == 4 and len(images):
            return list(images), False
        raise ValueError(
            f"an array of shape {tuple(images.shape)}: expected pictures uint8 [h, w, 3] or "
            "[B, h, w, 3], or what the image encoder takes, float [3, h, w] or [B, 3, h, w]"
        )
    if not isinstance(images, Sequence):
        raise ValueError(f"images is a {type(images).__name__}; give a list of images, or one")
    if not images:
        raise ValueError("no images: the list is empty; give at least one")
    return list(images), False


def to_pixels(image: OneImage, transform: Transform) -> Tensor:
    """Convert one image to the encoder's input, [3, h, w].

    uint8 arrays are raw pictures; float arrays are assumed to be transformed already.

    Raises:
        ValueError: an unreadable file, or an array of an unsupported shape or dtype.
    """
    if isinstance(image, str | Path):
        return transform(load_image(image))
    if isinstance(image, Image.Image):
        return transform(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(
            f"an image is a {type(image).__name__}; give a PIL image, a path, an array or a tensor"
        )
    array = torch.tensor(image) if isinstance(image, np.ndarray) else image
    if array.dtype == torch.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return transform(Image.fromarray(array.cpu().numpy()))
    if array.is_floating_point() and array.ndim == 3 and array.shape[0] == 3:
        return array
    raise ValueError(
        f"an image of shape {tuple(array.shape)} and {array.dtype}: expected a picture, uint8 "
        "[h, w, 3], or what the image encoder takes, float [3, h, w]"
    )


def questions_by_image(
    questions: Questions, num_images: int, one: bool
) -> tuple[list[list[str]], list[bool]]:
    """The list of questions of each image, and for each image whether it was a single question.

    Args:
        questions: one question for all images, or a list with one item per image, each a question
            or a list of questions. For a single image, a list of questions.
        num_images: number of images.
        one: True if a single image was passed, not a list.

    Raises:
        ValueError: no questions, an empty one, or a number of items other than `num_images`.
    """
    if isinstance(questions, str):
        items: list[str | Sequence[str]] = [questions] * num_images
    elif one:
        items = [[question for question in questions if isinstance(question, str)]]
        if len(items[0]) != len(questions):
            raise ValueError(f"questions of one image: expected a list of texts, got {questions}")
    else:
        items = list(questions)
    if len(items) != num_images:
        raise ValueError(
            f"{len(items)} questions for {num_images} images: give one for all, or one (or a list) "
            "for each image"
        )
    asked = [[item] if isinstance(item, str) else list(item) for item in items]
    for each in asked:
        if not each:
            raise ValueError("no questions: a list of them is empty; give each image at least one")
        for question in each:
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"the question {question!r} is empty; leave it out")
    return asked, [isinstance(item, str) for item in items]
