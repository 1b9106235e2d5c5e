"""Reference for the Q-Former's attentions in plain PyTorch; every kernel is tested against it.

Scores, softmax and sums are computed in fp32 (fp64 where the inputs are fp64). Shapes: R rows of
the token buffer, N query blocks, Q queries, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.philox import keep_mask
from blip2fast.kernels.precision import wide
from blip2fast.kernels.qformer_attention.layout import KIND_CODES, AttentionLayout, MaskKind


def visible_pairs(layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """The dense self-attention mask of a token buffer.

    Returns:
        `(visible [R, R] bool, position [R])`: whether a row may attend to a column, and each row's
        position as a key (queries from 0, text from Q), int64.
    """
    device, Q, N = layout.kinds.device, layout.num_queries, layout.num_blocks
    text_row = torch.arange(layout.num_text_rows, device=device)
    # text 0 covers the rows before the second offset, and so on
    text = torch.searchsorted(layout.cu_seqlens[1:].long(), text_row, right=True)
    place = text_row - layout.cu_seqlens.long()[text]
    kind = layout.kinds[text]
    query_row = torch.arange(N * Q, device=device)
    block_of_query = query_row // max(Q, 1)
    position = torch.cat([query_row % max(Q, 1), Q + place])

    same_block = block_of_query[:, None] == block_of_query[None, :]
    sees_queries = (kind != KIND_CODES[MaskKind.UNIMODAL])[:, None] & (
        layout.blocks.long()[text][:, None] == block_of_query[None, :]
    )
    sees_text = (kind == KIND_CODES[MaskKind.BIDIRECTIONAL])[None, :] & sees_queries.T
    causal = (kind == KIND_CODES[MaskKind.MULTIMODAL_CAUSAL])[:, None]
    same_text = (text[:, None] == text[None, :]) & (~causal | (place[None, :] <= place[:, None]))
    rows = [torch.cat([same_block, sees_text], 1), torch.cat([sees_queries, same_text], 1)]
    return torch.cat(rows), position


def self_attention_keep(layout: AttentionLayout, heads: int, philox: Tensor, p: float) -> Tensor:
    """The dropout mask of `qformer_attention`, `[H, R, R]` bool; undefined where masked.

    The counter's row is the row of the token buffer, its column the key's `position`.
    """
    _, position = visible_pairs(layout)
    rows = torch.arange(layout.num_rows, device=position.device)
    head = torch.arange(heads, device=position.device)
    width = layout.num_queries + layout.max_seqlen
    keep = keep_mask(philox, p, rows[None, :], head[:, None], width)
    return keep[..., position]


def cross_attention_keep(
    blocks: int, queries: int, heads: int, keys: int, philox: Tensor, p: float
) -> Tensor:
    """The dropout mask of `qformer_cross_attention`, `[N, H, Q, S]` bool.

    The counter's row is `block * Q + query`, its column the key's index.
    """
    rows = torch.arange(blocks * queries, device=philox.device).view(blocks, 1, queries)
    head = torch.arange(heads, device=philox.device)
    return keep_mask(philox, p, rows, head[:, None], keys)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, keep: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked softmax attention; a fully masked row gives 0 and an lse of -inf.

    Args:
        q: `[..., L, D]`, already scaled; fp32 or fp64, like `k` and `v`.
        k, v: `[..., M, D]`.
        visible: `[..., L, M]` bool, or None.
        keep: `[..., L, M]` bool, the dropout mask, or None.
        p: Dropout probability.

    Returns:
        `(output [..., L, D], lse [..., L], probabilities [..., L, M])`, the last before dropout.
    """
    scores = q @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -torch.inf
    # a finite lse in fully masked rows keeps NaN out of their gradients
    finite = lse.masked_fill(blind, 0.0)
    probabilities = (scores - finite[..., None]).exp()
    dropped = probabilities if keep is None else probabilities * keep / (1 - p)
    return dropped @ v, lse, probabilities


def qformer_attention(
    qkv: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention of a token buffer.

    Args:
        qkv: `[R, 3, H, D]`.
        layout: Which rows attend to which.
        scale: Factor of the scores.
        dropout_p: Probability of dropping an attention weight.
        philox: `[2]` int64 seed and offset of the dropout mask.

    Returns:
        `(output [R, H, D], lse [R, H])`; the lse in fp32, or fp64.
    """
    q, k, v = wide(qkv).permute(1, 2, 0, 3)  # each [H, R, D]
    visible, _ = visible_pairs(layout)
    keep = None
    if dropout_p > 0 and philox is not None:
        keep = self_attention_keep(layout, qkv.shape[2], philox, dropout_p)
    output, lse, _ = attend(q * scale, k, v, visible, keep, dropout_p)
    return output.transpose(0, 1).to(qkv.dtype), lse.T


def qformer_cross_attention(
    q: Tensor,
    kv: Tensor,
    kv_index: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks to the tokens of images.

    Args:
        q: `[N, Q, H, D]`, or `[1, Q, H, D]`: the same queries for every block.
        kv: `[B, S, 2, H, D]`, keys and values.
        kv_index: `[N]`, the image that each block reads; by default block i reads image i.
        key_mask: `[B, S]` bool, true where an image token is real.
        scale, dropout_p, philox: As in `qformer_attention`.

    Returns:
        `(output [N, Q, H, D], lse [N, Q, H])`.
    """
    image = torch.arange(len(kv), device=kv.device) if kv_index is None else kv_index.long()
    k, v = wide(kv)[image].permute(2, 0, 3, 1, 4)  # each [N, H, S, D]
    queries = wide(q).transpose(1, 2) * scale  # [N or 1, H, Q, D]
    visible = None if key_mask is None else key_mask[image][:, None, None, :]
    keep = None
    if dropout_p > 0 and philox is not None:
        heads, rows, keys = q.shape[2], q.shape[1], kv.shape[1]
        keep = cross_attention_keep(len(image), rows, heads, keys, philox, dropout_p)
    output, lse, _ = attend(queries, k, v, visible, keep, dropout_p)
    return output.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
