"""Cross-attention of the queries as maps over an image's patches.

Shapes: B images, Q queries, H heads, S image tokens, E their width, p patches a side.
"""

from __future__ import annotations

import math

from torch import Tensor

from blip2fast.evaluation.retrieval import evaluating
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.sequence import instruction


def patches_a_side(tokens: int) -> int:
    """p of S image tokens: a square of patches, with a class token or without.

    Raises:
        ValueError: S is neither a square nor one more.
    """
    side = math.isqrt(tokens)
    if tokens not in (side**2, side**2 + 1):
        raise ValueError(f"{tokens} image tokens are no square of patches, so they cannot be drawn")
    return side


def patch_maps(weights: Tensor) -> Tensor:
    """[B, Q, p, p] on the CPU, fp32: attention weights [B, H, Q, S], mean over heads.

    They sum to at most 1 over the patches: a leading class token, which no patch belongs to, is
    left out.

    Raises:
        ValueError: as `patches_a_side`.
    """
    side = patches_a_side(weights.shape[-1])
    return weights.mean(1).float().cpu()[:, :, -side * side :].unflatten(2, (side, side))


def prompt_attention(
    model: Blip2Stage2,
    image_embeds: Tensor,
    qformer_input_ids: Tensor | None = None,
    qformer_attention_mask: Tensor | None = None,
) -> Tensor:
    """[B, Q, p, p] on the CPU: the last cross-attention of what makes the soft prompts.

    Args:
        model: a `Blip2Stage2`.
        image_embeds: [B, S, E].
        qformer_input_ids, qformer_attention_mask: [B, T], of a text-conditioned Q-Former.

    Raises:
        ValueError: as `patches_a_side`, or instructions that are missing.
    """
    B, S, _ = image_embeds.shape
    patches_a_side(S)
    given = (qformer_input_ids, qformer_attention_mask)
    with evaluating(model) as device:
        ids, mask = (None if each is None else each.to(device) for each in given)
        tokens = image_embeds.to(device, model.query_tokens.dtype)
        outputs = model.qformer(
            query_embeds=model.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=model.ln_vision(tokens),
            output_attentions=True,
            **instruction(model.config, B, ids, mask),
        )
    weights: Tensor = outputs.cross_attentions[-1]
    return patch_maps(weights[:, :, : model.config.num_query_tokens])
