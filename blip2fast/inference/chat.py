"""Conversations about images."""

from __future__ import annotations

from typing import Unpack

import torch

from blip2fast.inference.inputs import EncodedImages, GenerationOptions, Images
from blip2fast.inference.writer import Pictures, Writer
from blip2fast.stage2.language_model import is_encoder_decoder, position_limit

CHAT: GenerationOptions = {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 30}


class Chat:
    """A conversation about images; call it with a question. Made by `Blip2.chat`.

    The language model reads the images, then all earlier questions and answers, then the new
    question (paper, section 4.1 and figure 4). If the prompt exceeds the position table of a
    decoder-only model, the oldest turns are dropped, together with the images added in them. An
    encoder with relative positions (T5) has no such limit; shorten `history` yourself there.

    Attributes:
        history: (question, answer) of each turn; a question has one marker per image that was
            added with it. Turns without images may be edited.
        left_out: number of oldest turns dropped from the prompt of the last question.
    """

    def __init__(
        self, writer: Writer, seen: EncodedImages, template: str, options: GenerationOptions
    ) -> None:
        self.history: list[tuple[str, str]] = []
        self.left_out = 0
        self._writer, self._template, self._options = writer, template, options
        self._marker = writer.parts.marker
        self._first = len(seen)  # images at the start of the prompt, which are never dropped
        self._states = seen.states

    def __call__(
        self, question: str, images: Images | None = None, **options: Unpack[GenerationOptions]
    ) -> str:
        """Ask a question and add the answer to the history.

        Args:
            question: the question only, without the template.
            images: more images, available from this question on. They are inserted at the
                question's markers ("<image>"), or before the question if it has none.
            options: generation options for this turn; they override those of the conversation.

        Raises:
            ValueError: an empty question, one that does not fit even without history, or a number
                of markers that differs from that of the images.
        """
        if not question.strip():
            raise ValueError(f"the question {question!r} is empty; leave it out")
        states = self._states
        if images is not None:
            more = self._writer.encode(images).states
            states = torch.cat([states, more])
            if self._marker not in question:
                question = self._marker * len(more) + question
        merged: GenerationOptions = {**self._options, **options}
        text = self._fitting(question, merged.get("max_new_tokens", CHAT["max_new_tokens"]))
        gone = sum(asked.count(self._marker) for asked, _ in self.history[: self.left_out])
        kept = torch.cat([states[: self._first], states[self._first + gone :]])
        pictures = Pictures(self._writer.parts, EncodedImages(kept, one=False))
        (answer,) = self._writer.write(pictures, [range(len(kept))], [text], CHAT, merged)
        self.history.append((question, answer))
        self._states = states
        return answer

    def prompt(self, question: str, first: int = 0) -> str:
        """The language model's prompt: the turns from `first` on, then the question."""
        turns = [
            f"{self._template.replace('{}', asked).rstrip()} {answer.rstrip('.')}."
            for asked, answer in self.history[first:]
        ]
        return " ".join([*turns, self._template.replace("{}", question)])

    def _fitting(self, question: str, new_tokens: int) -> str:
        """The prompt with as many of the latest turns as fit into the position table."""
        language_model = self._writer.parts.model.language_model
        limit = position_limit(language_model)
        self.left_out = 0
        if limit is not None and not is_encoder_decoder(language_model):
            while self.left_out < len(self.history) and (
                self._length(question) + new_tokens > limit
            ):
                self.left_out += 1
        return self._marker * self._first + self.prompt(question, self.left_out)

    def _length(self, question: str) -> int:
        """Length of a prompt in positions, soft prompts included."""
        text = self._marker * self._first + self.prompt(question, self.left_out)
        return int(self._writer.parts.text.prompt_batch([text])["input_ids"].shape[1])
