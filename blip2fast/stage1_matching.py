"""Images and texts compared by the stage-1 model: features of each alone, scores of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.masks import MaskKind
from blip2fast.packed_pass import Dropout, PackedPass
from blip2fast.qformer.packed import PackedQFormer
from blip2fast.stage1 import inputs as stage1_inputs
from blip2fast.stage1 import losses
from blip2fast.stage1.passes import matching_pass

if TYPE_CHECKING:
    from blip2fast.stage1.model import Blip2Stage1


def encode_image(
    model: Blip2Stage1, image_embeds: Tensor, image_attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features and states of queries: see `Blip2Stage1.encode_image`."""
    image_embeds = model.image_tokens(image_embeds)
    visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
    layout = AttentionLayout.build(
        len(image_embeds), model.config.num_query_tokens, device=image_embeds.device
    )
    states, _ = _one_pass(model, image_embeds, None, PackedPass(layout, image_mask=visible))
    return losses.unit(model.vision_projection(states)), states


def encode_text(model: Blip2Stage1, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Features of texts: see `Blip2Stage1.encode_text`."""
    texts = model.packed_texts(input_ids, attention_mask)
    layout = AttentionLayout.build(0, 0, texts.lengths, MaskKind.UNIMODAL, device=texts.ids.device)
    packed = PackedPass(layout, kept_text=texts.cu_seqlens[:-1])
    _, states = _one_pass(model, None, (texts.ids, texts.positions), packed)
    return losses.unit(model.text_projection(states))


def match(
    model: Blip2Stage1,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_attention_mask: Tensor | None,
    image_index: Tensor | None,
) -> Tensor:
    """ITM logits of pairs: see `Blip2Stage1.match`."""
    image_embeds = model.image_tokens(image_embeds)
    texts = model.packed_texts(input_ids, attention_mask)
    index = None
    if image_index is None:
        stage1_inputs.check_pairs(image_embeds, texts)
    else:
        index = KVIndex.build(image_index.to(image_embeds.device), len(image_embeds))
    visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
    pairs = matching_pass(texts, None, model.config.num_query_tokens, index, visible)
    states, _ = _one_pass(model, image_embeds, (pairs.ids, pairs.positions), pairs.packed)
    return match_logits(model, states)


def match_logits(model: Blip2Stage1, states: Tensor) -> Tensor:
    """ITM logits of query states `[N, Q, C]`; the mean over queries goes through the head."""
    return losses.wide(model.itm_head(losses.wide(states).mean(1).to(states.dtype)))


def _one_pass(
    model: Blip2Stage1,
    image_embeds: Tensor | None,
    words: tuple[Tensor, Tensor] | None,
    packed: PackedPass,
) -> tuple[Tensor, Tensor]:
    """Query and text states of a pass of its own; words are ids and positions."""
    device = model.query_tokens.device
    runner = PackedQFormer(model.qformer, model.computing_dtype(device))
    keys_values = []
    if image_embeds is not None:
        keys_values = runner.image_keys_values(image_embeds, model.ln_vision)
    text = model.query_tokens.new_empty(0, model.config.hidden_size)
    if words is not None:
        text = model.embeddings(*words)
    dropout = Dropout.of(model.qformer, philox_state(device=device), 0)
    return runner(model.query_tokens[0], text, keys_values, packed, dropout)
