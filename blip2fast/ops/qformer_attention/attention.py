"""The Q-Former's attentions: self-attention over a token buffer, and cross-attention to images.

Masks are computed from indices, scores are not stored, and gradients are summed in a fixed order.
Shapes: R rows of the token buffer, N query blocks, Q queries, B images, S image tokens, H heads,
D head width.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from blip2fast.kernels.cuda_needs import capability_of
from blip2fast.kernels.qformer_attention import memory_efficient, padded, reference
from blip2fast.kernels.qformer_attention.cpu import self_attention
from blip2fast.kernels.qformer_attention.cpu.core import WIDEN_BELOW_KEYS, is_explicit
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops.calls import AttentionCall
from blip2fast.ops.checks import check_dropout
from blip2fast.ops.dispatch import choose
from blip2fast.ops.qformer_attention.backends import BACKENDS
from blip2fast.ops.qformer_attention.checks import build_index, check_cross, check_self
from blip2fast.ops.qformer_attention.operators import unpack_index, unpack_layout
from blip2fast.ops.tracing import has_values


@overload
def qformer_attention(
    qkv: Tensor,
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def qformer_attention(
    qkv: Tensor,
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def qformer_attention(
    qkv: Tensor,
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of queries and packed texts, each text with its own mask kind.

    A block's Q queries see each other, and a text sees itself; the mask kind of the text decides
    the rest (arXiv 2301.12597, Figure 2; `q` is a query of the text's block, `t` a text token, `#`
    visible)::

        UNIMODAL            BIDIRECTIONAL       MULTIMODAL_CAUSAL
             q q t t t           q q t t t           q q t t t
           q # # . . .         q # # # # #         q # # . . .
           q # # . . .         q # # # # #         q # # . . .
           t . . # # #         t # # # # #         t # # # . .
           t . . # # #         t # # # # #         t # # # # .
           t . . # # #         t # # # # #         t # # # # #

    Blocks do not see each other, nor do texts. For one head, with
    `visible, _ = kernels.qformer_attention.reference.visible_pairs(layout)`, it is
    `F.scaled_dot_product_attention(q, k, v, attn_mask=visible)` over all R rows.

    Args:
        qkv: `[R, 3, H, D]`: queries, keys and values of every row of the token buffer, first the
            blocks, then the texts; fp16, bf16, fp32 or fp64. Rows may have any stride; the
            kernels need D contiguous.
        layout: The rows of each block and text, and the mask kind of each text.
        scale: Factor of the scores; by default `D ** -0.5`.
        dropout_p: Probability of dropping an attention weight, 0 to below 1.
        philox: `[2]` int64 seed and offset of the dropout mask (`ops.philox.philox_state`), a
            different offset for each layer; required if `dropout_p` is above 0.
        impl: `"auto"`, `"cuda"`, `"triton"`, `"xformers"`, `"sdpa"` or `"reference"`.
        return_lse: Also return the log-sum-exp of every row's scores.

    Returns:
        `[R, H, D]`; with `return_lse` `(output, lse [R, H])`, the lse in fp32 (fp64 for fp64) and
        without gradient.

    Raises:
        ValueError: a shape, type, device or option does not fit.
        NotImplementedError: the requested backend does not support the call; says why.
    """
    check_self(qkv, layout)
    check_dropout(dropout_p, philox, qkv)
    _, _, H, D = qkv.shape
    call = AttentionCall(
        queries=layout.num_queries,
        keys=layout.max_seqlen,
        heads=H,
        width=D,
        dtype=qkv.dtype,
        device=qkv.device.type,
        dropout=dropout_p > 0,
        key_mask=False,
        lse=return_lse,
        cross=False,
        gpu=qkv.device.index,
        capability=capability_of(qkv.device),
    )
    impl = choose("qformer_attention", BACKENDS, call, impl)
    scale = D**-0.5 if scale is None else scale
    philox = philox if dropout_p > 0 else None
    lse: Tensor | None
    if impl == "reference":
        out, lse = reference.qformer_attention(qkv, layout, scale, dropout_p, philox)
    elif impl == "xformers":
        return memory_efficient.self_attention(qkv, layout, scale)
    elif impl == "sdpa" and qkv.device.type != "cpu":
        out, lse = padded.self_attention(qkv, layout, scale, dropout_p, philox, with_lse=return_lse)
    elif impl == "sdpa" and _runs_at_once(qkv):
        out, lse = self_attention.self_forward(qkv, layout, scale, dropout_p, philox)
    else:
        out, lse = torch.ops.blip2fast.qformer_attention(
            qkv, *unpack_layout(layout), philox, scale, dropout_p, impl
        )
    return out if lse is None or not return_lse else (out, lse.detach())


@overload
def qformer_cross_attention(
    q: Tensor,
    kv: Tensor,
    kv_index: KVIndex | Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def qformer_cross_attention(
    q: Tensor,
    kv: Tensor,
    kv_index: KVIndex | Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def qformer_cross_attention(
    q: Tensor,
    kv: Tensor,
    kv_index: KVIndex | Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention of query blocks to image tokens; several blocks may share an image.

    Block i attends to image `kv_index[i]`, so an image that is the positive of one pair and a
    negative of others is projected to keys and values only once::

        kv_index = [0, 1, 2, 1]      image 0   image 1   image 2
                          block 0       #         .         .
                          block 1       .         #         .
                          block 2       .         .         #
                          block 3       .         #         .

    Equivalent to `k, v = kv[kv_index].unbind(2)`, then
    `F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[kv_index][:, None, None])` with H
    and Q, S transposed. A fully masked row gives 0, an lse of -inf and no gradient; an image that
    no block reads gets a gradient of 0.

    Args:
        q: `[N, Q, H, D]`, or `[1, Q, H, D]`: the same queries for every block; fp16, bf16, fp32
            or fp64.
        kv: `[B, S, 2, H, D]`, keys and values of the same type; any strides with D contiguous,
            such as `merged[:, :, layer]` of a `[B, S, layers, 2, H, D]` projection.
        kv_index: `[N]` integers, the image that each block reads, preferably a `KVIndex` built
            once for all layers; by default N = B and block i reads image i.
        key_lengths: `[B]` integers, number of real tokens at the start of each image; or
        key_mask: `[B, S]` bool, true where an image token is real.
        scale, dropout_p, philox, impl, return_lse: As in `qformer_attention`.

    Returns:
        `[N, Q, H, D]`; with `return_lse` `(output, lse [N, Q, H])`, the lse in fp32 (fp64 for
        fp64) and without gradient.

    Raises:
        ValueError: a shape, type, device or option does not fit, or an index is out of range
            (checked on the CPU only).
        NotImplementedError: the requested backend does not support the call; says why.
    """
    index = build_index(kv_index, kv)
    N = check_cross(q, kv, index, key_lengths, key_mask)
    check_dropout(dropout_p, philox, q)
    _, Q, H, D = q.shape
    S = kv.shape[1]
    call = AttentionCall(
        queries=Q,
        keys=S,
        heads=H,
        width=D,
        dtype=q.dtype,
        device=q.device.type,
        dropout=dropout_p > 0,
        key_mask=key_mask is not None or key_lengths is not None,
        lse=return_lse,
        cross=True,
        indexed=index is not None,
        gpu=q.device.index,
        capability=capability_of(q.device),
    )
    impl = choose("qformer_cross_attention", BACKENDS, call, impl)
    scale = D**-0.5 if scale is None else scale
    philox = philox if dropout_p > 0 else None
    if key_lengths is not None:
        key_mask = torch.arange(S, device=kv.device) < key_lengths[:, None]
    image = None if index is None else index.index
    lse: Tensor | None
    if impl == "reference":
        out, lse = reference.qformer_cross_attention(
            q, kv, image, key_mask, scale, dropout_p, philox
        )
    elif impl == "xformers":
        return memory_efficient.cross_attention(q, kv, image, scale)
    elif impl == "sdpa" and not return_lse and _is_one_call(q, kv, index, key_mask, dropout_p):
        return padded.one_call(q, kv, scale)
    elif impl == "sdpa" and q.device.type != "cpu":
        out, lse = padded.cross_attention(
            q, kv, image, key_mask, scale, dropout_p, philox, with_lse=return_lse
        )
    else:
        out, lse = torch.ops.blip2fast.qformer_cross_attention(
            q, kv, *unpack_index(index), key_mask, N, philox, scale, dropout_p, impl
        )
    return out if lse is None or not return_lse else (out, lse.detach())


def _is_one_call(
    q: Tensor, kv: Tensor, index: KVIndex | None, key_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether one call of PyTorch's attention computes this, gradient included."""
    if index is not None or key_mask is not None or dropout_p > 0:
        return False
    if q.numel() == 0 or kv.numel() == 0:
        return False
    if q.device.type == "cpu" and has_values(q) and is_explicit(q.shape[1], kv[:, :, 0], False):
        return False
    if not (torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)):
        return True
    # with few keys our gradient is faster and more accurate; with shared queries it is summed
    # before rounding
    return q.shape[0] == kv.shape[0] and kv.shape[1] >= WIDEN_BELOW_KEYS


def _runs_at_once(x: Tensor) -> bool:
    """Whether the call is neither traced nor differentiated, so no custom operator is needed."""
    untraced = type(x) is Tensor and not torch.compiler.is_compiling()
    return untraced and not (torch.is_grad_enabled() and x.requires_grad)
