"""The Q-Former's attentions as PyTorch custom operators: schema, fake, autograd.

One operator for the forward and one for the backward pass; a layout is passed as its tensors and
integers. Saved for the backward pass: the inputs, the output and the lse.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from blip2fast.kernels.precision import wide_dtype
from blip2fast.kernels.qformer_attention import cuda
from blip2fast.kernels.qformer_attention.cpu import cross_attention, self_attention
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops.second_derivatives import once_differentiable

_LAYOUT = (
    "Tensor cu_seqlens, Tensor kinds, Tensor blocks, Tensor block_text, Tensor order, "
    "Tensor offsets, SymInt num_blocks, SymInt num_queries, SymInt max_seqlen, "
    "bool has_bidirectional, bool has_causal"
)
_USES = "Tensor? index, Tensor? order, Tensor? offsets, Tensor? key_mask"
_OPTIONS = "Tensor? philox, float scale, float dropout_p, str impl"

torch.library.define(
    "blip2fast::qformer_attention",
    f"(Tensor qkv, {_LAYOUT}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "blip2fast::qformer_attention_grad",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_LAYOUT}, {_OPTIONS}) -> Tensor",
)
torch.library.define(
    "blip2fast::qformer_cross_attention",
    f"(Tensor q, Tensor kv, {_USES}, SymInt num_blocks, {_OPTIONS}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "blip2fast::qformer_cross_attention_grad",
    f"(Tensor dout, Tensor q, Tensor kv, Tensor out, Tensor lse, {_USES}, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dkv)",
)


def unpack_layout(layout: AttentionLayout) -> tuple[Any, ...]:
    """The arguments of `_LAYOUT`."""
    return (
        layout.cu_seqlens,
        layout.kinds,
        layout.blocks,
        layout.block_text,
        layout.order,
        layout.offsets,
        layout.num_blocks,
        layout.num_queries,
        layout.max_seqlen,
        layout.has_bidirectional,
        layout.has_causal,
    )


def _pack_layout(num_rows: int, arguments: tuple[Any, ...]) -> AttentionLayout:
    *tensors, num_blocks, num_queries, max_seqlen, has_bidirectional, has_causal = arguments
    num_text_rows = num_rows - num_blocks * num_queries
    return AttentionLayout(
        num_blocks, num_queries, num_text_rows, max_seqlen, has_bidirectional, has_causal, *tensors
    )


def unpack_index(index: KVIndex | None) -> tuple[Tensor | None, ...]:
    """The first three arguments of `_USES`."""
    return (None, None, None) if index is None else (index.index, index.order, index.offsets)


def _pack_index(
    index: Tensor | None, order: Tensor | None, offsets: Tensor | None
) -> KVIndex | None:
    if index is None or order is None or offsets is None:
        return None
    return KVIndex(index, order, offsets)


def _backend(impl: str) -> Any:
    """`self_forward`, `self_backward`, `cross_forward`, `cross_backward` of a backend.

    Their arguments are those of kernels/qformer_attention/README.md.
    """
    if impl == "cuda":
        return cuda
    if impl == "sdpa":
        own, cross = (self_attention, self_attention), (cross_attention, cross_attention)
    else:
        # imported on first use: Triton is optional
        from blip2fast.kernels.qformer_attention import (
            backward,
            cross_backward,
            cross_forward,
            forward,
        )

        own, cross = (forward, backward), (cross_forward, cross_backward)
    return SimpleNamespace(
        self_forward=own[0].self_forward,
        self_backward=own[1].self_backward,
        cross_forward=cross[0].cross_forward,
        cross_backward=cross[1].cross_backward,
    )


@torch.library.impl("blip2fast::qformer_attention", "CompositeExplicitAutograd")
def _self_forward(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *layout, philox, scale, dropout_p, impl = arguments
    out, lse = _backend(impl).self_forward(
        qkv, _pack_layout(qkv.shape[0], tuple(layout)), scale, dropout_p, philox
    )
    return out, lse


@torch.library.register_fake("blip2fast::qformer_attention")
def _self_forward_fake(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    R, _, H, D = qkv.shape
    return qkv.new_empty(R, H, D), qkv.new_empty(R, H, dtype=wide_dtype(qkv.dtype))


@torch.library.impl("blip2fast::qformer_attention_grad", "CompositeExplicitAutograd")
def _self_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Tensor:
    *layout, philox, scale, dropout_p, impl = arguments
    dqkv: Tensor = _backend(impl).self_backward(
        dout, qkv, out, lse, _pack_layout(qkv.shape[0], tuple(layout)), scale, dropout_p, philox
    )
    return dqkv


@torch.library.register_fake("blip2fast::qformer_attention_grad")
def _self_backward_fake(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _self_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *tensors = inputs[:7]
    *ctx.host, philox, ctx.scale, ctx.dropout_p, ctx.impl = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, *tensors, philox)


@once_differentiable("qformer_attention")
def _self_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, *tensors, philox = ctx.saved_tensors
    dqkv = None
    if dout is not None:
        options = (philox, ctx.scale, ctx.dropout_p, ctx.impl)
        dqkv = torch.ops.blip2fast.qformer_attention_grad(
            dout.contiguous(), qkv, out, lse, *tensors, *ctx.host, *options
        )
    return (dqkv, *[None] * 15)


torch.library.register_autograd(
    "blip2fast::qformer_attention", _self_grad, setup_context=_self_save
)


@torch.library.impl("blip2fast::qformer_cross_attention", "CompositeExplicitAutograd")
def _cross_forward(
    q: Tensor,
    kv: Tensor,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    num_blocks: int,
    philox: Tensor | None,
    scale: float,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    out, lse = _backend(impl).cross_forward(
        q,
        kv,
        _pack_index(index, order, offsets),
        key_mask,
        num_blocks,
        scale,
        dropout_p,
        philox,
    )
    return out, lse


@torch.library.register_fake("blip2fast::qformer_cross_attention")
def _cross_forward_fake(
    q: Tensor,
    kv: Tensor,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    num_blocks: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    _, Q, H, D = q.shape
    lse = q.new_empty(num_blocks, Q, H, dtype=wide_dtype(q.dtype))
    return q.new_empty(num_blocks, Q, H, D), lse


@torch.library.impl("blip2fast::qformer_cross_attention_grad", "CompositeExplicitAutograd")
def _cross_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    dropout_p: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dq, dkv = _backend(impl).cross_backward(
        dout,
        q,
        kv,
        out,
        lse,
        _pack_index(index, order, offsets),
        key_mask,
        scale,
        dropout_p,
        philox,
    )
    return dq, dkv


@torch.library.register_fake("blip2fast::qformer_cross_attention_grad")
def _cross_backward_fake(dout: Tensor, q: Tensor, kv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _cross_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, *uses, _, philox, ctx.scale, ctx.dropout_p, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output, *uses, philox)


@once_differentiable("qformer_cross_attention")
def _cross_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, out, lse, *uses, philox = ctx.saved_tensors
    dq = dkv = None
    if dout is not None:
        options = (philox, ctx.scale, ctx.dropout_p, ctx.impl)
        dq, dkv = torch.ops.blip2fast.qformer_cross_attention_grad(
            dout.contiguous(), q, kv, out, lse, *uses, *options
        )
    return (dq, dkv, *[None] * 9)


torch.library.register_autograd(
    "blip2fast::qformer_cross_attention", _cross_grad, setup_context=_cross_save
)
