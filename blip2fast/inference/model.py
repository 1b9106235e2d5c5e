"""Captions, answers and conversations about images, in three lines.

    model = Blip2.from_pretrained("runs/stage2")
    model.caption("cat.jpg")
    model.answer("cat.jpg", "what colour is it?")

Images are PIL images, paths, arrays or tensors, one or a list; one image returns one text, a list
returns a list. Default settings are the paper's (arXiv 2301.12597, sections 4.1 and 4.2);
docs/generation.md lists them.

Shapes: B images, Q queries, S image tokens, E image token width, L language model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from blip2fast.evaluation.retrieval import evaluating
from blip2fast.inference.attention_maps import prompt_attention
from blip2fast.inference.chat import Chat
from blip2fast.inference.devices import compute_device
from blip2fast.inference.inputs import (
    BATCH_SIZE,
    EncodedImages,
    GenerationOptions,
    Images,
    OneImage,
    Questions,
    Transform,
    questions_by_image,
    to_pixels,
)
from blip2fast.inference.loading import Loaded, Residence, is_streamed, load_parts
from blip2fast.inference.writer import Pictures, Writer
from blip2fast.qformer.checks import image_tokens
from blip2fast.stage2.lora import merge_lora

Texts = str | list[str] | list[list[str]] | list[str | list[str]]

CAPTION: GenerationOptions = {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 30}
ANSWER: GenerationOptions = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}


class Blip2:
    """A trained BLIP-2 for captioning, VQA and chat; created by `from_pretrained`.

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
        """Load a model with its tokenizers, image encoder and prompts.

        Args:
            path: output folder or checkpoint of a stage-2 run of blip2fast, or folder or hub name
                of a transformers BLIP-2 or InstructBLIP (`...ForConditionalGeneration`).
            dtype: dtype of the weights.
            device: compute device; by default CUDA if available.
            offload: "stream" keeps the language model's blocks in host memory.
            language_model, image_encoder: folder or hub name, for a blip2fast run whose frozen
                models have moved since training.

        Raises:
            ValueError: not found, a model that cannot generate text, or parts that do not match.
        """
        where = compute_device(device)
        return cls(load_parts(str(path), dtype, where, offload, language_model, image_encoder))

    def check_reads_pictures(self) -> None:
        """Check that pictures can be given, not only `image_embeds`.

        Raises:
            ValueError: no image encoder; says why.
        """
        self._parts.image_transform()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._writer.device

    @property
    def transform(self) -> Transform:
        """From a PIL image to what the image encoder takes, [3, h, w].

        Raises:
            ValueError: there is no image encoder; says why.
        """
        return self._parts.image_transform()

    def to(self, device: torch.device | str) -> Blip2:
        """Move the model to a device.

        Raises:
            ValueError: the language model is streamed, which fixes its device at loading.
        """
        if is_streamed(self.model):
            raise ValueError(
                f"the language model is streamed to {self.device}; give from_pretrained "
                f"device={str(device)!r} instead"
            )
        self.model.to(torch.device(device))
        return self

    def merge_adapters(self) -> Blip2:
        """Add the language model's LoRA adapters to its weights; texts are the same up to rounding.

        Generation is then as fast as without adapters, and `self.model.language_model` is a plain
        transformers model that `save_pretrained` writes.

        Raises:
            ValueError: the run has no adapters.
        """
        merge_lora(self.model.language_model)
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
            images: PIL images, paths, uint8 pictures [h, w, 3], or transformed float images
                [3, h, w] or [B, 3, h, w].
            image_embeds: instead of images, tokens of the frozen image encoder, [B, S, E], or
                [S, E] for one image.
            batch_size: maximum number of images encoded at a time.

        Returns:
            Encoded images, accepted by `caption`, `answer` and `chat` in place of images.

        Raises:
            ValueError: no image, an unreadable one, or no image encoder for pictures.
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
            prompt: prefix of the captions, not included in the output; None: `prompts.caption`.
            num_captions: captions per image.
            options: see `GenerationOptions`; by default 5 beams, length penalty 1, at most 30
                tokens.

        Returns:
            A caption, or a list of captions for a list of images; with `num_captions` above 1,
            each caption becomes a list.

        Raises:
            ValueError: as in `encode`; a prompt with a `{}` for a question; contradictory options.
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
        """Answer questions about images; each image is encoded once for all its questions.

        Args:
            images, image_embeds: as in `encode`.
            questions: one question for all images; for a list of images, a list with one item per
                image, each a question or a list of questions; for one image, a list of questions.
            prompt: template with `{}` for the question; None: `prompts.question`.
            options: see `GenerationOptions`; by default 5 beams, length penalty -1, at most 10
                tokens.

        Returns:
            Answers in the structure of the questions: for one image an answer or a list of
            answers, for a list of images a list of these.

        Raises:
            ValueError: as in `caption`; no questions, or not one item per image.
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
        """Start a conversation about images; this call encodes them, once.

        Args:
            images, image_embeds: one image or several, as in `encode`; they open the prompt.
            prompt: template of a turn, with `{}` for the question; None: `prompts.chat`.
            options: see `GenerationOptions`; by default 5 beams, length penalty 1, at most 30
                tokens.

        Raises:
            ValueError: as in `encode`.
        """
        seen = self.encode(images, image_embeds=image_embeds)
        template = self._question_template(prompt, self.prompts.chat)
        return Chat(self._writer, seen, template, options)

    def attention(self, image: OneImage, prompt: str | None = None) -> Tensor:
        """Where each query looks in an image, [Q, p, p], fp32 on the CPU.

        The last cross-attention, mean over heads; a class token is left out.

        Args:
            image: as in `encode`, one.
            prompt: what a text-conditioned Q-Former reads beside it; None: `prompts.caption`.
                Others read the image alone.

        Raises:
            ValueError: as in `encode`, or image tokens that are no square of patches.
        """
        pixels = to_pixels(image, self.transform)[None]
        with evaluating(self.model) as device:
            tokens = image_tokens(
                None,
                pixels.to(device, self.model.query_tokens.dtype),
                self.model.image_encoder,
                self.model.config.encoder_hidden_size,
            )
        text = self._parts.marker + (self.prompts.caption if prompt is None else prompt)
        read = self._parts.text.prompt_batch([text], image_counts=[1])
        instructions = {n: each for n, each in read.items() if n.startswith("qformer_")}
        return prompt_attention(self.model, tokens, **instructions)[0]

    def _question_template(self, given: str | None, own: str) -> str:
        template = own if given is None else given
        if "{}" not in template:
            raise ValueError(f"the prompt {template!r} has no {{}} for the question; add one")
        return template
