"""Attention weights and dropout masks as dense tensors, for visualisation and tests.

The ops store neither; they are recomputed here from the ops' inputs. Shapes: R rows of the token
buffer, N query blocks, Q queries, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.precision import wide_dtype
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops.checks import check_dropout
from blip2fast.ops.qformer_attention.checks import build_index, check_cross, check_self


def attention_weights(
    qkv: Tensor, layout: AttentionLayout, *, scale: float | None = None
) -> Tensor:
    """The weights of `qformer_attention`, before dropout.

    For one head, `(q @ k.T * scale).masked_fill(~visible, -inf).softmax(-1)`.

    Args:
        qkv: `[R, 3, H, D]`.
        layout: The rows of each block and text, and the mask kind of each text.
        scale: Factor of the scores; by default `D ** -0.5`.

    Returns:
        `[H, R, R]`, fp32 or fp64; 0 where a row does not see a column.

    Raises:
        ValueError: `qkv` does not fit the layout.
    """
    check_self(qkv, layout)
    q, k, _ = qkv.to(wide_dtype(qkv.dtype)).permute(1, 2, 0, 3)
    visible, _ = reference.visible_pairs(layout)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    _, _, weights = reference.attend(q * scale, k, k, visible, None, 0.0)
    return weights


def cross_attention_weights(
    q: Tensor,
    kv: Tensor,
    kv_index: KVIndex | Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The weights of `qformer_cross_attention`, before dropout.

    Args:
        q, kv, kv_index, key_lengths, key_mask, scale: As in `qformer_cross_attention`.

    Returns:
        `[N, H, Q, S]`, fp32 or fp64; a fully masked row is all 0.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    index = build_index(kv_index, kv)
    N = check_cross(q, kv, index, key_lengths, key_mask)
    if key_lengths is not None:
        key_mask = torch.arange(kv.shape[1], device=kv.device) < key_lengths[:, None]
    image = torch.arange(N, device=kv.device) if index is None else index.index.long()
    k = kv[:, :, 0].to(wide_dtype(kv.dtype))[image].transpose(1, 2)
    queries = q.to(k.dtype).transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = None if key_mask is None else key_mask[image][:, None, None, :]
    _, _, weights = reference.attend(queries, k, k, visible, None, 0.0)
    return weights


def attention_keep_mask(
    layout: AttentionLayout, heads: int, philox: Tensor, dropout_p: float
) -> Tensor:
    """The dropout mask of `qformer_attention`: which weights are kept.

    Args:
        layout: As passed to the op.
        heads: H.
        philox: `[2]` int64, seed and offset.
        dropout_p: Probability of dropping.

    Returns:
        `[H, R, R]` bool; undefined where a row does not see a column.

    Raises:
        ValueError: `philox` or `dropout_p` is invalid.
    """
    check_dropout(dropout_p, philox, layout.kinds)
    return reference.self_attention_keep(layout, heads, philox, dropout_p)


def cross_attention_keep_mask(
    shape: tuple[int, int, int, int], philox: Tensor, dropout_p: float
) -> Tensor:
    """The dropout mask of `qformer_cross_attention`: which weights are kept.

    Args:
        shape: `(N, H, Q, S)`.
        philox: `[2]` int64, seed and offset.
        dropout_p: Probability of dropping.

    Returns:
        `[N, H, Q, S]` bool.

    Raises:
        ValueError: `philox` or `dropout_p` is invalid.
    """
    check_dropout(dropout_p, philox, philox)
    N, H, Q, S = shape
    return reference.cross_attention_keep(N, Q, H, S, philox, dropout_p)
