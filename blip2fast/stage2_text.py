"""Text for stage 2: prompts, targets, padding and the prefix/suffix split (paper section 3.2).

A decoder-only language model (OPT) reads one sequence and is trained to continue it:

    input_ids  [bos]  a  photo  of   a    cat   end   pad
    labels       .    .    .    .    a    cat   end    .      (. = -100, ignored)

An encoder-decoder (FlanT5) reads a prefix in its encoder and is trained on a suffix:

    input_ids  a  photo  eos        labels  of  a  cat  eos

The soft prompts are no part of these tensors: `Blip2Stage2` prepends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label that no loss counts
IMAGE_PLACE = -1  # in token ids: the place of a soft prompt
# Texts whose tokens are kept; questions and the captions of a small data set return every epoch.
KNOWN_TEXTS = 50_000


class Stage2Text:
    """Turns captions, prompts and questions into the tensors that `Blip2Stage2` takes.

    Args:
        tokenizer: the language model's tokenizer (a `transformers` one).
        is_encoder_decoder: whether the language model is one (`model.config.is_encoder_decoder`).
        prompt: text put before every caption, such as `"a photo of"`; with a `{}` in it, the
            question goes there: `"Question: {} Short answer:"`.
        end_text: what ends a decoder-only target. None: the tokenizer's eos token. LAVIS trained
            its OPT models with `"\\n"`, so OPT recipes that continue its checkpoints set that.
        max_txt_len: most tokens of a sequence, special tokens included, soft prompts not.
            Captions and answers are cut to it; a prompt that does not fit is an error.
        seed: seed of the random prefix/suffix split.

    Raises:
        ValueError: `max_txt_len` too small, an `end_text` that is not one known token, an
            `end_text` for an encoder-decoder, or no eos token where one is needed.
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
        self.end_token_id = _end_token_id(tokenizer, is_encoder_decoder, end_text)
        self._known: dict[str, list[int]] = {}
        self._before, self._after = _special_tokens(tokenizer)
        # masked and ignored everywhere, so a tokenizer without a pad token works as well
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
    ) -> dict[str, Tensor]:
        """Tensors of one training step, right-padded.

        Decoder-only: the targets are the text and the end token; the prompt, where there is one,
        is read and not counted. Encoder-decoder: a prompt or question goes to the encoder and the
        text to the decoder; without either, the text is split at a random point, from after its
        first token to its middle, drawn from `(seed, epoch, index)` alone, so that a resumed run
        splits as the uninterrupted one.

        Args:
            texts: B captions or answers.
            questions: B questions for the prompt's `{}`; the prompt itself where it is empty.
            indices: B sample numbers, needed for the random split.
            epoch: number of the pass over the data, part of the split's seed.

        Returns:
            `input_ids`, `attention_mask` [B, T] and `labels` [B, T] (decoder-only) or [B, T']
            (encoder-decoder), int64, ready for `Blip2Stage2.forward`.

        Raises:
            ValueError: an empty batch or text, lengths that differ, missing questions or indices,
                a prompt that leaves no room for its text.
        """
        if len(texts) == 0:
            raise ValueError("an empty batch: texts has no entry")
        for text in texts:
            if not text.strip():
                raise ValueError(f"the text {text!r} is empty; leave such samples out")
        prompts = self._prompts(questions, len(texts))
        if not self.is_encoder_decoder:
            pairs = self._continuations(prompts, texts)
        elif any(prompts):
            targets = [self._target(ids) for ids in self._ids(texts)]
            pairs = list(zip(self._prompt_ids(prompts), targets, strict=True))
        else:
            pairs = self._random_splits(texts, indices, epoch)
        batch = self._pad([ids for ids, _ in pairs], "right")
        batch["labels"] = _stack([labels for _, labels in pairs], IGNORED, "right")
        return batch

    def prompt_batch(
        self, questions: Sequence[str] | None = None, *, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        """What the language model reads before it generates.

        Decoder-only prompts are padded on the left, so that every row's continuation starts at
        the same column; an encoder's on the right.

        Args:
            questions: B questions for the prompt's `{}`, or whole prompts where it is empty.
            batch_size: B, where there are no questions.

        Returns:
            `input_ids`, `attention_mask` [B, T], int64, ready for `Blip2Stage2.generate`, which
            should stop at this text's end: `eos_token_id=text.end_token_id`.

        Raises:
            ValueError: neither questions nor batch size, or a prompt longer than `max_txt_len`.
        """
        count = batch_size if questions is None else len(questions)
        if not count:
            raise ValueError(
                f"an empty batch: questions={questions}, batch_size={batch_size}; give either"
            )
        rows = self._prompt_ids(self._prompts(questions, count))
        return self._pad(rows, "right" if self.is_encoder_decoder else "left")

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated tokens [B, T], cut at the first end token, without outer spaces."""
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

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without special ones; texts that return are not read again."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > KNOWN_TEXTS:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            ids = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            self._known.update(zip(new, ids, strict=True))
        return [self._known[text] for text in texts]

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        """What the model reads before it writes, special tokens included."""
        unique = list(dict.fromkeys(prompts))  # mostly one prompt for all
        after = self._after if self.is_encoder_decoder else []
        rows = {}
        for prompt, ids in zip(unique, self._ids(unique), strict=True):
            rows[prompt] = [*self._before, *ids, *after]
            if len(rows[prompt]) > self.max_txt_len:
                raise ValueError(
                    f"the prompt {prompt!r} has {len(rows[prompt])} tokens, max_txt_len is "
                    f"{self.max_txt_len}; raise max_txt_len or shorten the prompt"
                )
        return [rows[prompt] for prompt in prompts]

    def _continuations(
        self, prompts: list[str], texts: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Decoder-only: ids and labels of prompt + text + end, cut at `max_txt_len`."""
        joined = [f"{p} {t.lstrip()}" if p else t for p, t in zip(prompts, texts, strict=True)]
        pairs = []
        for prompt, text, read, ids in zip(
            prompts, texts, self._prompt_ids(prompts), self._ids(joined), strict=True
        ):
            row = [*self._before, *ids, self.end_token_id][: self.max_txt_len]
            # a token that straddles the border holds text too: only the common part is the prompt
            ignored = _common_length(row, read) if prompt else 0
            if ignored == len(row):
                raise ValueError(
                    f"the prompt {prompt!r} leaves no room for the text {text!r}: max_txt_len is "
                    f"{self.max_txt_len}; raise it"
                )
            pairs.append((row, [IGNORED] * ignored + row[ignored:]))
        return pairs

    def _random_splits(
        self, texts: Sequence[str], indices: Sequence[int] | None, epoch: int
    ) -> list[tuple[list[int], list[int]]]:
        """Encoder-decoder without prompts: the halves of each text, for encoder and decoder."""
        if indices is None or len(indices) != len(texts):
            given = "none" if indices is None else len(indices)
            raise ValueError(
                f"the random split needs one sample index a text: {len(texts)} texts, "
                f"{given} indices"
            )
        room = self.max_txt_len - len(self._before) - max(1, len(self._after))
        pairs = []
        for ids, index in zip(self._ids(texts), indices, strict=True):
            kept = ids[:room]
            split = split_point(len(kept), self.seed, epoch, int(index))
            prefix = [*self._before, *kept[:split], *self._after]
            pairs.append((prefix, self._target(kept[split:])))
        return pairs

    def _target(self, ids: list[int]) -> list[int]:
        after = self._after if self.end_token_id in self._after else [self.end_token_id]
        room = self.max_txt_len - len(self._before) - len(after)
        return [*self._before, *ids[:room], *after]

    def _pad(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        return {
            "input_ids": _stack(rows, self.pad_token_id, side),
            "attention_mask": _stack([[1] * len(row) for row in rows], 0, side),
        }


def split_point(num_tokens: int, seed: int, epoch: int, index: int) -> int:
    """Length of the prefix: uniform from 1 to the middle, the same for the same arguments.

    Args:
        num_tokens: length of the text.
        seed, epoch, index: what the draw depends on, and all that it depends on.

    Returns:
        A length in [1, num_tokens // 2]; 0 for a text of one token, which is all suffix.
    """
    middle = num_tokens // 2
    if middle < 1:
        return 0
    return int(np.random.default_rng([seed, epoch, index]).integers(1, middle + 1))


def _stack(rows: list[list[int]], value: int, side: str) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _common_length(left: list[int], right: list[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after a text.

    Found by trying: OPT's bos and eos are the same token, so its number does not tell the side.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ValueError(f"the tokenizer turns 'a' into {plain}, and with special tokens into {full}")


def _end_token_id(tokenizer: Any, is_encoder_decoder: bool, end_text: str | None) -> int:
    if end_text is not None and is_encoder_decoder:
        raise ValueError(
            f"end_text is {end_text!r}; an encoder-decoder's targets end with its eos token, "
            "leave end_text unset"
        )
    if end_text is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token; set one, or end_text='\\n'")
        return int(tokenizer.eos_token_id)
    ids = tokenizer(end_text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"end_text {end_text!r} must be one token the tokenizer knows, it is {list(ids)}; "
            "leave end_text unset to end with the eos token"
        )
    return int(ids[0])
