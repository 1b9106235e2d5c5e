"""Rows of token ids in `Stage2Text`; an image is one `IMAGE_PLACE` until `expand_images`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # label value that the loss ignores
IMAGE_PLACE = -1  # token id of a soft prompt's placeholder


def num_tokens(row: list[int]) -> int:
    """Number of text tokens, images excluded."""
    return len(row) - row.count(IMAGE_PLACE)


def with_special_tokens(ids: list[int], before: list[int]) -> list[int]:
    """Insert the special tokens `before` the text, after any leading images."""
    front = next((i for i, token in enumerate(ids) if token != IMAGE_PLACE), len(ids))
    return [*ids[:front], *before, *ids[front:]]


def truncate(row: list[int], max_txt_len: int, text: str) -> list[int]:
    """Truncate a row to `max_txt_len` text tokens; it must keep all images.

    Raises:
        ValueError: an image would be cut off; the message shows `text`.
    """
    if IMAGE_PLACE not in row:
        return row[:max_txt_len]
    tokens = [i for i, token in enumerate(row) if token != IMAGE_PLACE]
    end = tokens[max_txt_len] if len(tokens) > max_txt_len else len(row)
    lost = row[end:].count(IMAGE_PLACE)
    if lost:
        raise ValueError(
            f"the text {text!r} has {len(tokens)} tokens, but max_txt_len {max_txt_len} cuts "
            f"off {lost} of {row.count(IMAGE_PLACE)} images; raise max_txt_len or shorten the text"
        )
    return row[:end]


def expand_images(row: list[int], value: int, Q: int) -> list[int]:
    """Replace each image placeholder with Q copies of `value`."""
    if IMAGE_PLACE not in row:
        return row
    return [x for token in row for x in ([value] * Q if token == IMAGE_PLACE else [token])]


def split_at_markers(text: str, marker: str) -> list[str]:
    """The text between markers, without the spaces around them."""
    parts = text.split(marker)
    last = len(parts) - 1
    parts = [part.lstrip() if i > 0 else part for i, part in enumerate(parts)]
    return [part.rstrip() if i < last else part for i, part in enumerate(parts)]


def pad_rows(rows: list[list[int]], value: int, side: str) -> Tensor:
    """Stack rows to [B, T], padded with `value` on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def common_prefix(left: list[int], right: list[int]) -> int:
    """Length of the common prefix of two rows."""
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text.

    Found by tokenizing a sample text: OPT uses one token id as both bos and eos, so the ids alone
    do not tell which side it is added on.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise ValueError(f"the tokenizer turns 'a' into {plain}, and with special tokens into {full}")


def end_token_id(tokenizer: Any, is_encoder_decoder: bool, end_text: str | None) -> int:
    """The token that ends a target: the tokenizer's eos, or `end_text`.

    Raises:
        ValueError: there is no end token, or `end_text` is not exactly one known token.
    """
    if end_text is not None and is_encoder_decoder:
        raise ValueError(
            f"end_text is {end_text!r}; an encoder-decoder's targets end with its eos token; "
            "leave end_text unset"
        )
    if end_text is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token; set one, or end_text='\\n'")
        return int(tokenizer.eos_token_id)
    ids = tokenizer(end_text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"end_text {end_text!r} must be one token of the tokenizer, but it is {list(ids)}; "
            "leave end_text unset to end with the eos token"
        )
    return int(ids[0])
