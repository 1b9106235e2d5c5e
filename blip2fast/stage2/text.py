"""Text for stage 2: prompts, targets, padding and the prefix/suffix split (paper section 3.2).

A decoder-only language model (OPT) reads one sequence and is trained to continue it:

    input_ids  [bos]  a  photo  of   a    cat   end   pad
    labels       .    .    .    .    a    cat   end    .      (. = -100, ignored)

An encoder-decoder (FlanT5) reads a prefix in its encoder and is trained on a suffix:

    input_ids  a  photo  eos        labels  of  a  cat  eos

These tensors do not contain the soft prompts: `Blip2Stage2` prepends them. With an `image_marker`,
a text may have any number of images anywhere, and each marker becomes Q placeholders for its soft
prompts (P, `IMAGE_PLACE`). Leading images stay before the first special token:

    "<image> a cat. <image>" continued by "a dog"
    input_ids  P P [bos] a cat .  P P  a   dog  end
    labels     . .   .   . .   .  . .  a   dog  end      (Q = 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2fast.stage2.token_rows import (
    IGNORED,
    IMAGE_PLACE,
    common_prefix,
    end_token_id,
    expand_images,
    num_tokens,
    pad_rows,
    special_tokens,
    split_at_markers,
    truncate,
    with_special_tokens,
)

# Maximum number of texts in the token cache; questions and small caption sets repeat every epoch.
KNOWN_TEXTS = 50_000


class Stage2Text:
    """Turns captions, prompts and questions into the tensors that `Blip2Stage2` takes.

    Args:
        tokenizer: the language model's tokenizer (a `transformers` one).
        is_encoder_decoder: `model.config.is_encoder_decoder` of the language model.
        prompt: text put before every caption, such as `"a photo of"`; a `{}` in it is replaced by
            the question: `"Question: {} Short answer:"`.
        end_text: ends a decoder-only target. None: the tokenizer's eos token. LAVIS trained its OPT
            models with `"\\n"`, so recipes that start from its OPT checkpoints set that.
        max_txt_len: maximum number of tokens in a sequence, including special tokens but not soft
            prompts. Captions and answers are truncated to it; a prompt that does not fit is an
            error.
        seed: seed of the random prefix/suffix split.
        image_marker: placeholder for an image in prompts and texts, such as `"<image>"`; spaces
            around it are dropped. None: one image per text, in front.
        num_query_tokens: Q, soft prompts per image; not counted in `max_txt_len`.
        qformer_tokenizer: tokenizer of a text-conditioned Q-Former, which reads the language
            model's prompt without image markers (InstructBLIP, arXiv 2305.06500, 2.4).

    Raises:
        ValueError: `max_txt_len` too small, an `end_text` that is not one known token, an
            `end_text` for an encoder-decoder, or no eos token and no `end_text`.
    """

    def __init__(
        self,
        tokenizer: Any,
        is_encoder_decoder: bool,
        *,
        prompt: str = "",
        end_text: str | None = None,
        max_txt_len: int = 32,
        seed: int = 0,
        image_marker: str | None = None,
        num_query_tokens: int = 32,
        qformer_tokenizer: Any = None,
    ) -> None:
        if max_txt_len < 2:
            raise ValueError(f"max_txt_len is {max_txt_len}; a text needs at least 2 tokens")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.seed = seed
        if image_marker is not None and not image_marker.strip():
            raise ValueError(f"image_marker is {image_marker!r}; give a word such as '<image>'")
        self.image_marker = image_marker
        self.num_query_tokens = num_query_tokens
        self.qformer_tokenizer = qformer_tokenizer
        self.end_token_id = end_token_id(tokenizer, is_encoder_decoder, end_text)
        self._known: dict[str, list[int]] = {}
        self._before, self._after = special_tokens(tokenizer)
        # padding is masked and ignored, so any token works if the tokenizer has no pad token
        self.pad_token_id = (
            self.end_token_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        )

    def train_batch(
        self,
        texts: Sequence[str],
        questions: Sequence[str] | None = None,
        *,
        indices: Sequence[int] | None = None,
        epoch: int = 0,
        image_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of one training step, right-padded.

        Decoder-only: the targets are the text and the end token; a prompt is input only and has no
        loss. Encoder-decoder: a prompt or question goes to the encoder and the text to the decoder.
        Without either, the text is split at a random point, from after its first token to its
        middle. The split depends only on `(seed, epoch, index)`, so a resumed run draws the same
        splits. It is never before the text's last image.

        Args:
            texts: B captions or answers.
            questions: B questions for the prompt's `{}`, or whole prompts if `prompt` is empty.
            indices: B sample indices, needed for the random split.
            epoch: epoch number, part of the split's seed.
            image_counts: B image counts, checked against the number of markers.

        Returns:
            `input_ids`, `attention_mask` [B, T] and `labels` [B, T] (decoder-only) or [B, T']
            (encoder-decoder), int64, ready for `Blip2Stage2.forward`; with an `image_marker` also
            `image_counts` [B], with a `qformer_tokenizer` also `qformer_input_ids` and
            `qformer_attention_mask` [B, T''].

        Raises:
            ValueError: an empty batch or text, mismatched lengths, missing questions or indices, a
                prompt that leaves no room for its text; markers that do not match the number of
                images, are cut off by `max_txt_len`, or are in a decoder's target.
        """
        if len(texts) == 0:
            raise ValueError("an empty batch: texts has no entry")
        for text in texts:
            if not self._without_markers(text).strip():
                raise ValueError(f"the text {text!r} is empty; leave such samples out")
        prompts = self._prompts(questions, len(texts))
        if not self.is_encoder_decoder:
            pairs = self._continuations(prompts, texts)
        else:
            pairs = self._prefixes(prompts, texts, indices, epoch)
        batch = self._pad([ids for ids, _ in pairs], "right")
        self._check_counts(batch, image_counts)
        labels = [expand_images(ids, IGNORED, self.num_query_tokens) for _, ids in pairs]
        batch["labels"] = pad_rows(labels, IGNORED, "right")
        return batch | self._instructions(prompts)

    def prompt_batch(
        self,
        questions: Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        image_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Prompt tensors for generation.

        Decoder-only prompts are padded on the left, so that every row's continuation starts at
        the same column; encoder prompts are padded on the right.

        Args:
            questions: B questions for the prompt's `{}`, or whole prompts if `prompt` is empty.
            batch_size: B, if there are no questions.
            image_counts: B image counts, checked against the number of markers.

        Returns:
            `input_ids`, `attention_mask` [B, T], int64, and the other inputs of `train_batch`,
            without labels. Pass them to `Blip2Stage2.generate` with
            `eos_token_id=text.end_token_id`.

        Raises:
            ValueError: neither questions nor batch size, a prompt longer than `max_txt_len`, or
                markers that do not match the number of images.
        """
        count = batch_size if questions is None else len(questions)
        if not count:
            raise ValueError(
                f"an empty batch: questions={questions}, batch_size={batch_size}; give either"
            )
        prompts = self._prompts(questions, count)
        rows = self._prompt_ids(prompts)
        batch = self._pad(rows, "right" if self.is_encoder_decoder else "left")
        self._check_counts(batch, image_counts)
        return batch | self._instructions(prompts)

    def decode(self, ids: Tensor) -> list[str]:
        """Decode generated tokens [B, T] up to the first end token; strips whitespace."""
        texts = []
        for row in ids.tolist():
            kept = row[: row.index(self.end_token_id)] if self.end_token_id in row else row
            texts.append(self.tokenizer.decode(kept, skip_special_tokens=True).strip())
        return texts

    def _prompts(self, questions: Sequence[str] | None, count: int) -> list[str]:
        if questions is None:
            if "{}" in self.prompt:
                raise ValueError(f"the prompt {self.prompt!r} has a place for questions; give them")
            return [self.prompt.rstrip()] * count
        if len(questions) != count:
            raise ValueError(f"{len(questions)} questions for {count} texts; give one each")
        if self.prompt and "{}" not in self.prompt:
            raise ValueError(f"the prompt {self.prompt!r} has no {{}} for the questions; add one")
        template = self.prompt or "{}"
        return [template.replace("{}", question).rstrip() for question in questions]

    def _instructions(self, prompts: list[str]) -> dict[str, Tensor]:
        """Inputs of a text-conditioned Q-Former: the prompts without image markers."""
        if self.qformer_tokenizer is None:
            return {}
        words = [" ".join(self._without_markers(prompt).split()) for prompt in prompts]
        tokens = self.qformer_tokenizer(words, padding="longest", return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {f"qformer_{name}": tokens[name] for name in names}

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without special tokens; cached by text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > KNOWN_TEXTS:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._known.update(zip(new, self._tokenize(new), strict=True))
        return [self._known[text] for text in texts]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Replace each marker with one `IMAGE_PLACE`; tokenize the text between markers."""
        if self.image_marker is None:
            return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        parts = [split_at_markers(text, self.image_marker) for text in texts]
        words = list(dict.fromkeys(part for row in parts for part in row if part))
        found = self.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        known = {"": []} | dict(zip(words, found, strict=True))
        rows = []
        for first, *others in parts:
            row = list(known[first])
            for part in others:
                row += [IMAGE_PLACE, *known[part]]
            rows.append(row)
        return rows

    def _without_markers(self, text: str) -> str:
        return text if self.image_marker is None else text.replace(self.image_marker, " ")

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, special tokens included."""
        unique = list(dict.fromkeys(prompts))  # usually one prompt for the whole batch
        after = self._after if self.is_encoder_decoder else []
        rows = {}
        for prompt, ids in zip(unique, self._ids(unique), strict=True):
            rows[prompt] = [*with_special_tokens(ids, self._before), *after]
            if num_tokens(rows[prompt]) > self.max_txt_len:
                raise ValueError(
                    f"the prompt {prompt!r} has {num_tokens(rows[prompt])} tokens, but max_txt_len "
                    f"is {self.max_txt_len}; raise max_txt_len or shorten the prompt"
                )
        return [rows[prompt] for prompt in prompts]

    def _continuations(
        self, prompts: list[str], texts: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Decoder-only: ids and labels of prompt + text + end, truncated to `max_txt_len`."""
        joined = [f"{p} {t.lstrip()}" if p else t for p, t in zip(prompts, texts, strict=True)]
        pairs = []
        for prompt, text, read, ids in zip(
            prompts, texts, self._prompt_ids(prompts), self._ids(joined), strict=True
        ):
            row = truncate(
                [*with_special_tokens(ids, self._before), self.end_token_id], self.max_txt_len, text
            )
            # a token may span the end of the prompt and the start of the text; it is a target
            ignored = common_prefix(row, read) if prompt else 0
            if ignored == len(row):
                raise ValueError(
                    f"the prompt {prompt!r} leaves no room for the text {text!r}: max_txt_len is "
                    f"{self.max_txt_len}; raise it"
                )
            read_only = [IMAGE_PLACE if i == IMAGE_PLACE else IGNORED for i in row[:ignored]]
            pairs.append((row, [*read_only, *row[ignored:]]))
        return pairs

    def _prefixes(
        self,
        prompts: list[str],
        texts: Sequence[str],
        indices: Sequence[int] | None,
        epoch: int,
    ) -> list[tuple[list[int], list[int]]]:
        """Encoder-decoder: ids for the encoder and labels for the decoder.

        With an `image_marker`, samples without a prompt are split and the others are not.
        """
        all_given = any(prompts) and self.image_marker is None
        if not all_given and not all(prompts) and (indices is None or len(indices) != len(texts)):
            given = "none" if indices is None else len(indices)
            raise ValueError(
                f"the random split needs one sample index a text: {len(texts)} texts, "
                f"{given} indices"
            )
        pairs = []
        read, written = self._prompt_ids(prompts), self._ids(texts)
        for i, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
            if not prompt and not all_given and indices is not None:
                pairs.append(self._random_split(texts[i], ids, int(indices[i]), epoch))
                continue
            if IMAGE_PLACE in ids:
                raise ValueError(
                    f"the text {texts[i]!r} has images, but a decoder writes it and reads none; "
                    "put them into its prompt"
                )
            pairs.append((read[i], self._target(ids)))
        return pairs

    def _random_split(
        self, text: str, ids: list[int], index: int, epoch: int
    ) -> tuple[list[int], list[int]]:
        """Split a text at a random point: encoder ids and decoder labels."""
        room = self.max_txt_len - len(self._before) - max(1, len(self._after))
        start = max((i + 1 for i, token in enumerate(ids) if token == IMAGE_PLACE), default=0)
        kept = ids[start : start + max(0, room - num_tokens(ids[:start]))]
        if not kept:
            raise ValueError(
                f"the text {text!r} leaves nothing to write after its last image within "
                f"max_txt_len {self.max_txt_len}; raise it, or leave such samples out"
            )
        split = split_point(len(kept), self.seed, epoch, index)
        prefix = [*with_special_tokens([*ids[:start], *kept[:split]], self._before), *self._after]
        return prefix, self._target(kept[split:])

    def _target(self, ids: list[int]) -> list[int]:
        after = self._after if self.end_token_id in self._after else [self.end_token_id]
        room = self.max_txt_len - len(self._before) - len(after)
        return [*self._before, *ids[:room], *after]

    def _pad(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        counts = [row.count(IMAGE_PLACE) for row in rows]
        rows = [expand_images(row, IMAGE_PLACE, self.num_query_tokens) for row in rows]
        batch = {
            "input_ids": pad_rows(rows, self.pad_token_id, side),
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0, side),
        }
        if self.image_marker is not None:
            batch["image_counts"] = torch.tensor(counts)
        return batch

    def _check_counts(self, batch: dict[str, Tensor], image_counts: Sequence[int] | None) -> None:
        if image_counts is None:
            return
        if self.image_marker is None:
            raise ValueError(
                "image_counts: this text has no image_marker; set image_marker='<image>'"
            )
        for i, (found, given) in enumerate(
            zip(batch["image_counts"].tolist(), image_counts, strict=True)
        ):
            if found != given:
                raise ValueError(
                    f"text {i} has {found} image markers {self.image_marker!r}, but {given} images "
                    "are given for it; one marker an image"
                )


def split_point(num_tokens: int, seed: int, epoch: int, index: int) -> int:
    """Length of the prefix: uniform from 1 to the middle, deterministic in its arguments.

    Args:
        num_tokens: length of the text.
        seed, epoch, index: seed of the draw.

    Returns:
        A length in [1, num_tokens // 2]; 0 for a text of one token, which is all suffix.
    """
    middle = num_tokens // 2
    if middle < 1:
        return 0
    return int(np.random.default_rng([seed, epoch, index]).integers(1, middle + 1))
