"""Loads the tokenizer of a Q-Former with text input."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from blip2fast.frozen.local_models import not_found


def qformer_tokenizer(name: str) -> Any:
    """The Q-Former's tokenizer, with [DEC] as its bos token (paper, section 3.2).

    Raises:
        ValueError: not found, or a tokenizer that does not produce [CLS] words [SEP] with padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("model.tokenizer", name, error)) from error
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    ids = tokenizer("a")["input_ids"]
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    if None in ends or (ids[0], ids[-1]) != ends or tokenizer.pad_token_id is None:
        raise ValueError(
            f"model.tokenizer {name!r} turns 'a' into {ids}; the Q-Former needs [CLS] words [SEP] "
            f"and a padding token (cls {ends[0]}, sep {ends[1]}, pad {tokenizer.pad_token_id})"
        )
    return tokenizer
