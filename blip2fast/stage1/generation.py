"""Greedy caption generation with the stage-1 model."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.modules import LMHead
from blip2fast.stage1.padded import PaddedReader
from blip2fast.stage1.passes import ProjectedImages, Reader


@torch.no_grad()
def generate(
    reader: Reader | PaddedReader,
    lm_head: LMHead,
    words: Tensor,
    config: Stage1Config,
    images: ProjectedImages,
    eos_token_id: int,
    max_new_tokens: int,
) -> Tensor:
    """Caption images greedily: see `Blip2Stage1.generate`.

    Args:
        reader: The Q-Former.
        lm_head: Maps text states to vocabulary logits.
        words: `[V, C]`, the word embeddings, tied to the head's decoder.
        config: Provides `bos_token_id` and `pad_token_id`.
        images: The images to caption.
        eos_token_id: Ends a text.
        max_new_tokens: Maximum number of tokens to generate.
    """
    B, device = len(images.tokens), images.tokens.device
    ids = torch.full((B, 1), config.bos_token_id, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        states = reader.next_word(images, ids)
        word = lm_head(states, words).argmax(-1).masked_fill(ended, config.pad_token_id)
        ids = torch.cat([ids, word[:, None]], dim=1)
        ended = ended | (word == eos_token_id)
        if bool(ended.all()):
            break
    return ids[:, 1:]
