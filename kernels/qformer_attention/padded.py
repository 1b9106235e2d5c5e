"""The backend `sdpa` on an accelerator: PyTorch's attention on padded tensors, under autograd.

Indices are computed on the device, without a host sync. Memory holds the padded tensors and, if
blocks share images, the gathered keys and values; with dropout, or if the lse is requested, also
the scores. Shapes: R rows of the token buffer, N query blocks,
Q queries, n texts padded to T, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2fast.kernels.philox import keep_mask
from blip2fast.kernels.precision import wide_dtype
from blip2fast.kernels.qformer_attention.layout import KIND_CODES, AttentionLayout, MaskKind


def self_attention(
    qkv: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`(out [R, H, D], lse [R, H])` from `qkv` `[R, 3, H, D]`; lse is None if not requested."""
    N, Q, R, H = layout.num_blocks, layout.num_queries, layout.num_rows, qkv.shape[2]
    results: list[tuple[Tensor, Tensor | None]] = []
    device = qkv.device
    T = layout.max_seqlen if layout.num_text_rows else 0
    if T:
        starts, lengths = layout.cu_seqlens[:-1].long(), layout.cu_seqlens.long().diff()
        place = torch.arange(T, device=device)
        real = place < lengths[:, None]  # [n, T]
        text_rows = (N * Q + starts[:, None] + place).clamp(max=R - 1)
    if N * Q:
        query_rows = torch.arange(N * Q, device=device).view(N, Q)
        keys, visible = query_rows, None
        if T and layout.has_bidirectional:
            text = layout.block_text.long()
            keys = torch.cat([query_rows, text_rows[text]], 1)
            shown = real[text] & (text >= 0)[:, None]
            visible = F.pad(shown, (Q, 0), value=True)[:, None, None]
        options = scale, dropout_p, philox, with_lse
        out, lse = _attend(qkv, query_rows, keys, visible, *options, first_column=0)
        results.append((out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)))
    if T:
        out, lse = _texts(qkv, layout, text_rows, real, scale, dropout_p, philox, with_lse)
        text_row = torch.arange(layout.num_text_rows, device=device)
        text = torch.searchsorted(layout.cu_seqlens[1:].long(), text_row, right=True)
        where = text, text_row - starts[text]
        results.append((out[where], None if lse is None else lse[where]))
    if not results:
        return qkv[:, 0], qkv.new_zeros(R, H, dtype=wide_dtype(qkv.dtype))
    lses = [lse for _, lse in results if lse is not None]
    return torch.cat([out for out, _ in results]), torch.cat(lses) if with_lse else None


def _texts(
    qkv: Tensor,
    layout: AttentionLayout,
    text_rows: Tensor,
    real: Tensor,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`(out [n, T, H, D], lse [n, T, H])`; padding rows are undefined."""
    N, Q = layout.num_blocks, layout.num_queries
    kinds, T = layout.kinds, text_rows.shape[1]
    causal = kinds == KIND_CODES[MaskKind.MULTIMODAL_CAUSAL]
    not_later = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
    # a padding row sees everything, so that it is finite; it gets no gradient
    visible = (~causal[:, None, None] | not_later) & real[:, None, :] | ~real[:, :, None]
    keys, first_column = text_rows, Q
    if N * Q:
        sees_queries = kinds != KIND_CODES[MaskKind.UNIMODAL]
        block = layout.blocks.long().clamp(0, N - 1)
        queries = torch.arange(Q, device=qkv.device)
        keys, first_column = torch.cat([block[:, None] * Q + queries, text_rows], 1), 0
        shown = (sees_queries[:, None] | ~real)[:, :, None].expand(-1, -1, Q)
        visible = torch.cat([shown, visible], 2)
    options = scale, dropout_p, philox, with_lse
    return _attend(qkv, text_rows, keys, visible[:, None], *options, first_column)


def _attend(
    qkv: Tensor,
    rows: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    with_lse: bool,
    first_column: int,
) -> tuple[Tensor, Tensor | None]:
    """Rows `[m, L]` of a token buffer attend to its rows `keys` `[m, M]`."""
    keep = None
    if dropout_p > 0 and philox is not None:
        head = torch.arange(qkv.shape[2], device=qkv.device)[:, None]
        keep = keep_mask(philox, dropout_p, rows[:, None], head, keys.shape[1], first_column)
    k, v = qkv[:, 1:][keys].unbind(2)
    return attend(qkv[:, 0][rows], k, v, visible, keep, scale, dropout_p, with_lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Padded attention; every row must see at least one key.

    Args:
        q: `[m, L, H, D]`.
        k, v: `[m, M, H, D]`.
        visible: bool that broadcasts to `[m, H, L, M]`, or None.
        keep: `[m, H, L, M]` bool, the weights that dropout keeps, or None.
        scale: Factor of the scores.
        dropout_p: Probability of dropping.
        with_lse: Whether to compute the lse, which needs the scores; otherwise it is None.

    Returns:
        `(out [m, L, H, D], lse [m, L, H])`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lse = None
    if with_lse:
        with torch.no_grad():
            lse = _scores(q, k, visible, scale).logsumexp(-1).transpose(1, 2)
    if keep is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    else:
        weights = _scores(q, k, visible, scale).softmax(-1) * keep / (1 - dropout_p)
        out = (weights @ v.to(weights.dtype)).to(q.dtype)
    return out.transpose(1, 2), lse


def _scores(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    wide = wide_dtype(q.dtype)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def cross_attention(
    q: Tensor,
    kv: Tensor,
    kv_index: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`(out [N, Q, H, D], lse [N, Q, H])` from `q` `[N or 1, Q, H, D]`, `kv` `[B, S, 2, H, D]`."""
    # indexing has a deterministic gradient; index_select's is not deterministic on a GPU
    read = kv if kv_index is None else kv[kv_index.long()]
    (N, S), (_, Q, H, _) = read.shape[:2], q.shape
    visible = blind = keep = None
    if key_mask is not None:
        visible = key_mask if kv_index is None else key_mask[kv_index.long()]
        blind = ~visible.any(1)[:, None, None, None]
        # a fully masked block attends to every key, and its results are then replaced
        visible = visible[:, None, None] | blind
    if dropout_p > 0 and philox is not None:
        rows = torch.arange(N * Q, device=q.device).view(N, 1, Q)
        head = torch.arange(H, device=q.device)[:, None]
        keep = keep_mask(philox, dropout_p, rows, head, S)
    k, v = read.unbind(2)
    q = q.expand(N, -1, -1, -1)
    out, lse = attend(q, k, v, visible, keep, scale, dropout_p, with_lse)
    if blind is not None:
        out = out.masked_fill(blind, 0)
        lse = None if lse is None else lse.masked_fill(blind[..., 0], -torch.inf)
    return out, lse


def one_call(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """`[N, Q, H, D]` from `q` `[N or 1, Q, H, D]` and `kv` `[N, S, 2, H, D]`, on any device."""
    q = q.expand(kv.shape[0], -1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
