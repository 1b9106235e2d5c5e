"""Words from the stage-1 model: greedy captions, and the scores of every position of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.masks import MaskKind, qformer_mask
from blip2fast.packed_pass import PackedPass
from blip2fast.qformer.packed import PackedQFormer
from blip2fast.stage1 import inputs as stage1_inputs
from blip2fast.stage1.passes import PackedTexts

if TYPE_CHECKING:
    from blip2fast.stage1.model import Blip2Stage1


@torch.no_grad()
def generate(
    model: Blip2Stage1,
    image_embeds: Tensor,
    eos_token_id: int,
    max_new_tokens: int,
    image_attention_mask: Tensor | None,
) -> Tensor:
    """Caption images greedily: see `Blip2Stage1.generate`."""
    stage1_inputs.check_new_tokens(max_new_tokens, model.config.max_position_embeddings)
    image_embeds = model.image_tokens(image_embeds)
    visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
    B, device = len(image_embeds), image_embeds.device
    packed = PackedQFormer(model.qformer, model.computing_dtype(device))
    keys_values = packed.image_keys_values(image_embeds, model.ln_vision)
    ids = torch.full((B, 1), model.config.bos_token_id, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for length in range(1, max_new_tokens + 1):
        layout = AttentionLayout.build(
            B,
            model.config.num_query_tokens,
            [length] * B,
            MaskKind.MULTIMODAL_CAUSAL,
            device=device,
        )
        last = torch.arange(1, B + 1, device=device) * length - 1
        _, states = packed(
            model.query_tokens[0],
            model.embeddings(ids).flatten(0, 1),
            keys_values,
            PackedPass(layout, image_mask=visible, kept_text=last),
        )
        logits = model.lm_head(states, model.embeddings.word_embeddings.weight)
        word = logits.argmax(-1).masked_fill(ended, model.config.pad_token_id)
        ids = torch.cat([ids, word[:, None]], dim=1)
        ended = ended | (word == eos_token_id)
        if bool(ended.all()):
            break
    return ids[:, 1:]


def padded_logits(
    model: Blip2Stage1,
    image_embeds: Tensor,
    texts: PackedTexts,
    length: int,
    visible: Tensor | None,
) -> Tensor:
    """ITG's word scores `[B, length, V]`, those of padding included."""
    B, Q = texts.count, model.config.num_query_tokens
    ids, lengths = texts.padded(length, model.config.pad_token_id)
    ids = torch.cat([torch.full_like(ids[:, :1], model.config.bos_token_id), ids[:, 1:]], 1)
    real = torch.arange(length, device=ids.device) < lengths[:, None]
    text = model.embeddings(ids)
    queries = model.query_tokens.expand(B, -1, -1).to(text.dtype)
    states = model.qformer(
        query_embeds=torch.cat([queries, text], dim=1),
        query_length=Q,
        attention_mask=qformer_mask(MaskKind.MULTIMODAL_CAUSAL, Q, real),
        encoder_hidden_states=model.ln_vision(image_embeds.to(model.ln_vision.weight.dtype)),
        encoder_attention_mask=visible,
    ).last_hidden_state
    logits: Tensor = model.lm_head(states[:, Q:], model.embeddings.word_embeddings.weight)
    return logits
