"""The backend `cuda`: cross-attention of csrc/qformer_attention.cu, called as it wants to be.

Shapes: N query blocks, Q queries, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.ops.attention_layout import KVIndex


def cross_forward(
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    num_blocks: int,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out [N, Q, H, D], lse [N, Q, H])` from `q` `[N or 1, Q, H, D]`, `kv` `[B, S, 2, H, D]`."""
    image = None if index is None else index.index
    mask = None if key_mask is None else key_mask.contiguous()
    out, lse = torch.ops.blip2fast_C.qformer_cross_attention(
        _aligned(q), _aligned(kv), image, mask, philox, num_blocks, scale, dropout_p
    )
    return out, lse


def cross_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(dq, dkv [B, S, 2, H, D])`, `dq` of the shape of `q`."""
    mask = None if key_mask is None else key_mask.contiguous()
    uses = (None, None, None) if index is None else (index.index, index.order, index.offsets)
    dq, dkv = torch.empty_like(out), kv.new_empty(kv.shape)
    torch.ops.blip2fast_C.qformer_cross_attention_backward(
        dout,
        _aligned(q),
        _aligned(kv),
        out,
        lse,
        *uses,
        mask,
        philox,
        out.shape[0],
        scale,
        dropout_p,
        dq,
        dkv,
    )
    if q.shape[0] != out.shape[0]:
        # queries that all blocks share
        dq = dq.sum(0, keepdim=True, dtype=torch.float32).to(q.dtype)
    return dq, dkv


def _aligned(x: Tensor) -> Tensor:
    """`x` as the CUDA kernels read it: D contiguous, every row at a multiple of 16 bytes."""
    strides = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
