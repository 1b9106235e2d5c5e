"""The text side of a run: records, tokenizers, and what makes batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from blip2fast.data.batches import (
    AnswerTargets,
    CaptionTargets,
    SequenceTargets,
    Stage1TextMaker,
    read_captions,
    read_questions,
    read_sequences,
)
from blip2fast.frozen.hub import not_there
from blip2fast.stage2.text import Stage2Text
from blip2fast.training.config import RunConfig

# by data.task
READERS: dict[str, Callable[..., Sequence[Any]]] = {
    "caption": read_captions,
    "vqa": read_questions,
    "sequence": read_sequences,
}


def qformer_tokenizer(name: str) -> Any:
    """The Q-Former's tokenizer, with [DEC] as its bos token (paper, section 3.2).

    Raises:
        ValueError: not there, or one that does not write [CLS] words [SEP] with padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(not_there("model.tokenizer", name, error)) from error
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


def qformer_words(config: RunConfig, sizes: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The Q-Former's tokenizer, and the sizes that follow from it.

    Args:
        sizes: of the model to start from, which must have the same words.

    Raises:
        ValueError: it has other ones, or there is no tokenizer.
    """
    if config.model.tokenizer is None:
        raise ValueError(
            f"init_from {config.init_from!r} has a Q-Former that reads text: set model.tokenizer "
            "and model.text_conditioned: true"
        )
    tokenizer = qformer_tokenizer(str(config.model.tokenizer))
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in words.items():
        if sizes.get(name, value) != value:
            raise ValueError(
                f"init_from {config.init_from!r} has {name} {sizes[name]}, the tokenizer "
                f"{config.model.tokenizer!r} has {value}"
            )
    return tokenizer, words


def check_positions(config: RunConfig, positions: int) -> None:
    """Refuse texts that may be longer than the Q-Former's position table."""
    if config.data.max_txt_len > positions:
        raise ValueError(
            f"data.max_txt_len {config.data.max_txt_len} is longer than the position table, "
            f"model.max_position_embeddings {positions}"
        )


def text_maker(
    config: RunConfig, tokenizer: Any, text: Stage2Text | None, records: Sequence[Any]
) -> Any:
    """What makes the texts of a batch: of stage 1, or of a stage-2 task."""
    if text is None:
        numbers = {key: n for n, key in enumerate(dict.fromkeys(r.image for r in records))}
        return Stage1TextMaker(tokenizer, config.data.max_txt_len, numbers, config.seed)
    if config.data.task == "sequence":
        return SequenceTargets(text, config.seed)
    return (
        CaptionTargets(text, config.seed) if config.data.task == "caption" else AnswerTargets(text)
    )
