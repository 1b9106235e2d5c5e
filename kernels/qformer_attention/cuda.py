"""Cross-attention of the backend `cuda`: csrc/qformer_attention.cu behind the common interface."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.cuda_needs import readable
from blip2fast.kernels.qformer_attention.layout import KVIndex

_OPS = torch.ops.blip2fast_C


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
    """`(out [N, Q, H, D], lse [N, Q, H])`; inputs as in kernels/qformer_attention/README.md."""
    image = None if index is None else index.index
    mask = None if key_mask is None else key_mask.contiguous()
    out, lse = _OPS.qformer_cross_attention_fwd(
        readable(q), readable(kv), image, mask, philox, num_blocks, scale, dropout_p
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
    """`(dq, dkv)` of the shapes of `q` and `kv`, contiguous."""
    uses = (None, None, None) if index is None else (index.index, index.order, index.offsets)
    mask = None if key_mask is None else key_mask.contiguous()
    dq, dkv = torch.empty_like(out), kv.new_empty(kv.shape)
    _OPS.qformer_cross_attention_bwd(
        readable(dout.contiguous()),
        readable(q),
        readable(kv),
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
    if q.shape[0] < dq.shape[0]:
        # the same queries for every block
        dq = dq.sum(0, keepdim=True, dtype=torch.float32).to(q.dtype)
    return dq, dkv
