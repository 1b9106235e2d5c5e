"""Captions, answers and conversations about images, in three lines.

    model = Blip2.from_pretrained("runs/stage2")
    model.caption("cat.jpg")
    model.answer("cat.jpg", "what colour is it?")

Images are PIL images, paths, arrays or tensors, one or a list; one image gives one text, a list
gives a list. The settings are the paper's (arXiv 2301.12597, sections 4.1 and 4.2) unless the
caller says otherwise; docs/generation.md has them in a table.

Shapes: B images, Q queries, S image tokens, E image token width, L language model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from blip2fast.inference.chat import Chat
from blip2fast.inference.inputs import (
    BATCH_SIZE,
    EncodedImages,
    GenerationOptions,
    Images,
    Questions,
    questions_by_image,
)
from blip2fast.inference.loading import Loaded, Residence, is_streamed, load_parts
from blip2fast.inference.writer import Pictures, Writer

Texts = str | list[str] | list[list[str]] | list[str | list[str]]

CAPTION: GenerationOptions = {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 30}
ANSWER: GenerationOptions = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}


class Blip2:
    """A trained BLIP-2 for captioning, VQA and chat; made by `from_pretrained`.

    Args:
        parts: the model with its text preparation, prompts and image transform.

    Attributes:
        model: the `Blip2Stage2` inside.
        prompts: templates of captions, questions and conversations.
    """

    def __init__(self, parts: Loaded) -> None:
        self.model = parts.model
        self.prompts = parts.prompts
        self._parts, self._writer = parts, Writer(parts)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        offload: Residence = "none",
        language_model: str | None = None,
        image_encoder: str | None = None,
    ) -> Blip2:
        """Load a model with everything it needs.

        Args:
            path: output folder or checkpoint of a stage-2 run of blip2fast, or folder or hub name
                of a transformers BLIP-2 or InstructBLIP (`...ForConditionalGeneration`).
            dtype: of all weights.
            device: where it computes; by default CUDA where there is one.
            offload: "stream" keeps the language model's blocks in host memory.
            language_model, image_encoder: folder or hub name, for a run of blip2fast whose own
                are no longer where it was trained with them.

        Raises:
            ValueError: nothing there, a model that cannot write, or parts that do not fit.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        return cls(load_parts(str(path), dtype, device, offload, language_model, image_encoder))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._writer.device

    def to(self, device: torch.device | str) -> Blip2:
        """Move it to a device.

        Raises:
            ValueError: the language model is streamed to the device that it was loaded for.
        """
        if is_streamed(self.model):
            raise ValueError(
                f"the language model is streamed to {self.device}; give from_pretrained "
                f"device={str(device)!r} instead"
            )
        self.model.to(torch.device(device))
        return self

    def encode(
        self,
        images: Images | None = None,
        *,
        image_embeds: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> EncodedImages:
        """Encode images once, for several captions, questions or conversations.

        Args:
            images: PIL images, paths, pictures uint8 [h, w, 3], or transformed images, float
                [3, h, w] or [B, 3, h, w].
            image_embeds: instead, tokens of the frozen image encoder, [B, S, E], or [S, E] of one.
            batch_size: most images that are read at a time.

        Returns:
            What `caption`, `answer` and `chat` take in place of images.

        Raises:
            ValueError: no image, one that cannot be read, or no known image encoder.
        """
        return self._writer.encode(images, image_embeds=image_embeds, batch_size=batch_size)

    def caption(
        self,
        images: Images | None = None,
        *,
        image_embeds: Tensor | None = None,
        prompt: str | None = None,
        num_captions: int = 1,
        **options: Unpack[GenerationOptions],
    ) -> Texts:
        """Describe images.

        Args:
            images, image_embeds: as in `encode`.
            prompt: what the captions begin with, not repeated in them; None: `prompts.caption`.
            num_captions: texts an image.
            options: see `GenerationOptions`; by default 5 beams, length penalty 1, at most 30
                tokens.

        Returns:
            A caption, or a list of them for a list of images; with `num_captions` above 1 a list
            in the place of each caption.

        Raises:
            ValueError: as in `encode`; a prompt with a place for a question; options that do not
                go together.
        """
        prompt = self.prompts.caption if prompt is None else prompt
        if "{}" in prompt:
            raise ValueError(
                f"the prompt {prompt!r} has a place for a question; use answer, or leave it out"
            )
        pictures = Pictures(self._parts, images, image_embeds)
        rows = [[row] for row in range(pictures.count)]
        texts = [self._parts.marker + prompt] * len(rows)
        written = self._writer.write(pictures, rows, texts, CAPTION, options, num_captions)
        if num_captions == 1:
            return written[0] if pictures.one else written
        nested = [
            written[start : start + num_captions] for start in range(0, len(written), num_captions)
        ]
        return nested[0] if pictures.one else nested

    def answer(
        self,
        images: Images | None = None,
        questions: Questions = (),
        *,
        image_embeds: Tensor | None = None,
        prompt: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Texts:
        """Answer questions about images; an image is read once for all its questions.

        Args:
            images, image_embeds: as in `encode`.
            questions: one for all images; or for a list of images a list with an item for each,
                a question or a list of questions; or for one image a list of questions.
            prompt: template with `{}` for the question; None: `prompts.question`.
            options: see `GenerationOptions`; by default 5 beams, length penalty -1, at most 10
                tokens.

        Returns:
            An answer in the place of each question: of one image an answer or a list of them, of
            a list of images a list of these.

        Raises:
            ValueError: as in `caption`; no questions, or not as many as images.
        """
        template = self._question_template(prompt, self.prompts.question)
        pictures = Pictures(self._parts, images, image_embeds)
        asked, alone = questions_by_image(questions, pictures.count, pictures.one)
        rows = [[row] for row, each in enumerate(asked) for _ in each]
        template = self._parts.marker + template
        texts = [template.replace("{}", question) for each in asked for question in each]
        written = iter(self._writer.write(pictures, rows, texts, ANSWER, options))
        answers = [[next(written) for _ in each] for each in asked]
        found = [each[0] if single else each for each, single in zip(answers, alone, strict=True)]
        return found[0] if pictures.one else found

    def chat(
        self,
        images: Images | None = None,
        *,
        image_embeds: Tensor | None = None,
        prompt: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Chat:
        """Start a conversation about images, which are encoded once, here.

        Args:
            images, image_embeds: one image or several, as in `encode`; they stand in front.
            prompt: template of a question; None: `prompts.chat`.
            options: see `GenerationOptions`; by default 5 beams, length penalty 1, at most 30
                tokens.

        Raises:
            ValueError: as in `encode`.
        """
        seen = self.encode(images, image_embeds=image_embeds)
        template = self._question_template(prompt, self.prompts.chat)
        return Chat(self._writer, seen, template, options)

    def _question_template(self, given: str | None, own: str) -> str:
        template = own if given is None else given
        if "{}" not in template:
            raise ValueError(f"the prompt {template!r} has no {{}} for the question; add one")
        return template
