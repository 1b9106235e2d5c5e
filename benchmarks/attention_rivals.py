"""Who computes the Q-Former's attentions: ours by backend, and what people use otherwise.

A provider binds inputs to a call that returns the output and, in training, the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attention_inputs import (
    CrossInputs,
    Padded,
    Results,
    SelfInputs,
    cross_written_out,
    gathered,
    written_out,
)
from comparing import Contender, Provider, own_reasons
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.ops.qformer_attention.attention import qformer_attention, qformer_cross_attention

OURS = ("auto", "cuda", "triton", "xformers", "sdpa", "reference")
# one padded problem `[3, n, H, L, D]` to `[n, L, H, D]`
Solve = Callable[[Tensor, Padded], Tensor]
# q, kv and the index to `[N, Q, H, D]`
Cross = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def self_providers(p: float, compiled: bool) -> dict[str, Provider[SelfInputs]]:
    """Self-attention by name, ours first.

    Args:
        p: Dropout probability.
        compiled: Whether those that are compiled first take part.
    """
    providers = {f"blip2fast {impl}": _our_self(impl, p) for impl in OURS}
    providers["torch sdpa"] = _padded(lambda x, problem: _sdpa(x, problem.visible[:, None], p))
    providers["torch sdpa, padding timed"] = _from_token_buffer(p)
    providers["torch sdpa, no mask"] = _padded(lambda x, problem: _sdpa_unmasked(x, problem, p))
    providers["torch eager"] = _padded(
        lambda x, problem: written_out(x, problem.visible[:, None], p)
    )
    providers["xformers"] = _padded(lambda x, problem: _xformers_masked(x, problem, p))
    if compiled:
        providers["torch.compile of eager"] = _compiled_padded(p)
        providers["torch.compile of reference"] = _compiled_reference(p)
        providers["FlexAttention, compiled"] = _flex_padded(p)
    return providers


def cross_providers(p: float, compiled: bool) -> dict[str, Provider[CrossInputs]]:
    """Cross-attention by name; arguments as in `self_providers`."""
    providers = {f"blip2fast {impl}": _our_cross(impl, p) for impl in OURS}
    providers["torch sdpa"] = _cross(lambda q, kv, index: _sdpa_cross(q, kv, index, p))
    providers["torch eager"] = _cross(lambda q, kv, index: cross_written_out(q, kv, index, p))
    providers["xformers"] = _cross(lambda q, kv, index: _xformers_cross(q, kv, index, p))
    if compiled:
        for which, formula in (("eager", cross_written_out), ("reference", _reference_cross)):
            solve = _fresh_compile(formula)
            providers[f"torch.compile of {which}"] = _cross(_with_dropout(solve, p))
        providers["FlexAttention, compiled"] = _flex_cross(p)
    return providers


def _our_self(impl: str, p: float) -> Provider[SelfInputs]:
    def provider(inputs: SelfInputs) -> Contender:
        philox = philox_state(0, device=inputs.qkv.device) if p else None

        def call() -> Results:
            out = qformer_attention(
                inputs.qkv, inputs.layout, dropout_p=p, philox=philox, impl=impl
            )
            return _with_gradients([out], [inputs.qkv], [inputs.dout], inputs.train)

        return Contender({"": lambda: own_reasons(impl, call)})

    return provider


def _our_cross(impl: str, p: float) -> Provider[CrossInputs]:
    def provider(inputs: CrossInputs) -> Contender:
        philox = philox_state(0, device=inputs.q.device) if p else None

        def call() -> Results:
            out = qformer_cross_attention(
                inputs.q, inputs.kv, inputs.index, dropout_p=p, philox=philox, impl=impl
            )
            return _with_gradients([out], [inputs.q, inputs.kv], [inputs.dout], inputs.train)

        return Contender({"": lambda: own_reasons(impl, call)})

    return provider


def _with_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor], train: bool
) -> Results:
    if not train:
        return list(outputs)
    gradients = torch.autograd.grad(outputs, inputs, douts)
    return [*(out.detach() for out in outputs), *gradients]


def _padded(solve: Solve, prepare: Callable[[Padded, torch.device], None] | None = None) -> Any:
    """A provider from what solves one padded problem; padding itself is not timed.

    The data lie as transformers' linear layers leave them, `[n, L, H, D]` each.
    """

    def provider(inputs: SelfInputs) -> Contender:
        data, douts = [], []
        for problem in inputs.padded:
            padded = problem.pad(inputs.qkv.detach()).movedim(2, 0).contiguous().transpose(2, 3)
            data.append(padded.requires_grad_(inputs.train))
            douts.append(problem.pad(inputs.dout))
            if prepare is not None:
                prepare(problem, padded.device)

        def call() -> Results:
            outputs = [solve(x, p) for x, p in zip(data, inputs.padded, strict=True)]
            return _with_gradients(outputs, data, douts, inputs.train)

        def canonical(results: Results) -> Results:
            count = len(data)
            packed = [inputs.unpad(results[:count])]
            if inputs.train:
                packed.append(inputs.unpad([x.permute(1, 3, 0, 2, 4) for x in results[count:]]))
            return packed

        return Contender({"": call}, canonical)

    return provider


def _from_token_buffer(p: float) -> Provider[SelfInputs]:
    """SDPA on our own inputs: rows of the token buffer to padded problems, and back."""

    def provider(inputs: SelfInputs) -> Contender:
        R = len(inputs.qkv)
        # padding reads row 0, which the mask hides
        rows = [problem.rows.clamp(max=R - 1).flatten() for problem in inputs.padded]
        places = torch.empty(R + 1, dtype=torch.int64, device=inputs.qkv.device)
        all_rows = torch.cat([problem.rows.flatten() for problem in inputs.padded])
        places[all_rows] = torch.arange(len(all_rows), device=places.device)
        places = places[:R]

        def call() -> Results:
            outputs = []
            for index, problem in zip(rows, inputs.padded, strict=True):
                padded = inputs.qkv.index_select(0, index).unflatten(0, problem.rows.shape)
                solved = _sdpa(padded.permute(2, 0, 3, 1, 4), problem.visible[:, None], p)
                outputs.append(solved.flatten(0, 1))
            out = torch.cat(outputs).index_select(0, places)
            return _with_gradients([out], [inputs.qkv], [inputs.dout], inputs.train)

        return Contender({"": call})

    return provider


def _cross(solve: Cross) -> Provider[CrossInputs]:
    def provider(inputs: CrossInputs) -> Contender:
        index = inputs.rows()

        def call() -> Results:
            out = solve(inputs.q, inputs.kv, index)
            return _with_gradients([out], [inputs.q, inputs.kv], [inputs.dout], inputs.train)

        return Contender({"": call})

    return provider


def _with_dropout(solve: Callable[..., Tensor], p: float) -> Cross:
    return lambda q, kv, index: solve(q, kv, index, p)


def _sdpa(x: Tensor, visible: Tensor | None, p: float) -> Tensor:
    q, k, v = x
    return F.scaled_dot_product_attention(q, k, v, visible, p).transpose(1, 2)


def _sdpa_unmasked(x: Tensor, problem: Padded, p: float) -> Tensor:
    if not problem.full:
        raise NotImplementedError("some pairs of this shape are masked")
    return _sdpa(x, None, p)


def _sdpa_cross(q: Tensor, kv: Tensor, index: Tensor | None, p: float) -> Tensor:
    out = F.scaled_dot_product_attention(*gathered(q, kv, index), dropout_p=p)
    return out.transpose(1, 2)


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """xformers' attention of `[n, L, H, D]`; what it lacks here is a reason, not an error."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise NotImplementedError(f"xformers: {error}") from error
    try:
        return memory_efficient_attention(q, k, v, attn_bias=bias, p=p)
    except NotImplementedError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = [x for x in lines if x.startswith(("device=", "operator wasn't", "xFormers"))]
        raise NotImplementedError("; ".join(dict.fromkeys(reasons)) or str(error)) from error


def _xformers_masked(x: Tensor, problem: Padded, p: float) -> Tensor:
    q, k, v = x.transpose(2, 3)
    bias = None
    if not problem.full:
        n, L, H, _ = q.shape
        visible = problem.visible[:, None].expand(n, H, L, L)
        # a row of the bias must begin at a multiple of 8 elements
        room = torch.zeros(n, H, L, -(-L // 8) * 8, dtype=q.dtype, device=q.device)
        bias = room[..., :L].masked_fill_(~visible, -torch.inf)
    return _memory_efficient(q, k, v, bias, p)


def _xformers_cross(q: Tensor, kv: Tensor, index: Tensor | None, p: float) -> Tensor:
    k, v = (kv if index is None else kv[index]).unbind(2)
    return _memory_efficient(q, k, v, None, p)


def _fresh_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all input sets of a benchmark, and for no other benchmark."""
    torch._dynamo.reset()  # else a code object compiled for 8 shapes runs uncompiled from then on
    return torch.compile(function, dynamic=False)


def _compiled_padded(p: float) -> Provider[SelfInputs]:
    solve = _fresh_compile(lambda x, visible: written_out(x, visible, p))
    return _padded(lambda x, problem: solve(x, problem.visible[:, None]))


def _compiled_reference(p: float) -> Provider[SelfInputs]:
    solve = _fresh_compile(_reference_self)

    def provider(inputs: SelfInputs) -> Contender:
        def call() -> Results:
            out = solve(inputs.qkv, inputs.layout, p)
            return _with_gradients([out], [inputs.qkv], [inputs.dout], inputs.train)

        return Contender({"": call})

    return provider


def _reference_self(qkv: Tensor, layout: AttentionLayout, p: float) -> Tensor:
    philox = philox_state(0, device=qkv.device) if p else None
    return reference.qformer_attention(qkv, layout, qkv.shape[-1] ** -0.5, p, philox)[0]


def _reference_cross(q: Tensor, kv: Tensor, index: Tensor | None, p: float) -> Tensor:
    philox = philox_state(0, device=q.device) if p else None
    scale = q.shape[-1] ** -0.5
    return reference.qformer_cross_attention(q, kv, index, None, scale, p, philox)[0]


def _check_flex(device: torch.device, train: bool, p: float) -> None:
    if p:
        raise NotImplementedError("FlexAttention has no dropout")
    if train and device.type == "cpu":
        raise NotImplementedError("FlexAttention has no backward on a CPU")


def _flex_padded(p: float) -> Provider[SelfInputs]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = _fresh_compile(flex_attention)
    masks: dict[int, Any] = {}  # by problem; input sets share theirs

    def prepare(problem: Padded, device: torch.device) -> None:
        if id(problem) in masks:
            return
        n, L = problem.rows.shape
        visible = problem.visible.expand(n, L, L).contiguous()
        masks[id(problem)] = create_block_mask(
            lambda b, h, q, k: visible[b, q, k], n, None, L, L, device=device
        )

    def solve(x: Tensor, problem: Padded) -> Tensor:
        q, k, v = x
        return flex(q, k, v, block_mask=masks[id(problem)]).transpose(1, 2)

    def provider(inputs: SelfInputs) -> Contender:
        _check_flex(inputs.qkv.device, inputs.train, p)
        return _padded(solve, prepare)(inputs)

    return provider


def _flex_cross(p: float) -> Provider[CrossInputs]:
    from torch.nn.attention.flex_attention import flex_attention

    flex = _fresh_compile(flex_attention)

    def provider(inputs: CrossInputs) -> Contender:
        _check_flex(inputs.q.device, inputs.train, p)
        return _cross(lambda q, kv, index: flex(*gathered(q, kv, index)).transpose(1, 2))(inputs)

    return provider
