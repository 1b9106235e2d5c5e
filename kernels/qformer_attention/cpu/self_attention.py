"""Self-attention of the backend `sdpa` on a CPU: runs a plan's calls and reorders their results.

Shapes: R rows of the token buffer, N query blocks, Q queries, H heads, D head width; m problems of
L rows and M keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.precision import wide_dtype
from blip2fast.kernels.qformer_attention.cpu.core import (
    WORTH_EXPLICIT_FLOP,
    attend,
    attend_backward,
    multiplies_bf16,
)
from blip2fast.kernels.qformer_attention.cpu.plan import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    Plan,
    plan_of,
)
from blip2fast.kernels.qformer_attention.layout import AttentionLayout


class _Collected:
    """Results of all parts of a plan.

    Args:
        plan: The plan; its parts are added in order.
        like: Tensor with the dtype of the results.
        row: Shape of a row.
    """

    def __init__(self, plan: Plan, like: Tensor, row: tuple[int, ...]) -> None:
        self._plan, self._like, self._row = plan, like, row
        self._buffer: Tensor | None = None
        self._end = 0

    def add(self, result: Tensor) -> None:
        """Add the next part's result, `[m, L, ...]`; a single part is stored without a copy."""
        if len(self._plan.parts) == 1:
            self._buffer = result.to(self._like.dtype).flatten(0, 1)
        else:
            self.room(*result.shape[:2]).copy_(result)

    def room(self, m: int, L: int) -> Tensor:
        """Buffer `[m, L, ...]` for the result of the next part."""
        if self._buffer is None:
            self._buffer = self._like.new_empty(self._plan.rows(), *self._row)
        start, self._end = self._end, self._end + m * L
        return self._buffer[start : self._end].unflatten(0, (m, L))

    def result(self) -> Tensor:
        """`[R, ...]`."""
        if self._buffer is None:
            return self._like.new_empty(0, *self._row)
        if self._plan.order is None:
            return self._buffer.contiguous()
        return self._buffer.index_select(0, self._plan.order)


def _plan(layout: AttentionLayout, qkv: Tensor, gathered: int) -> Plan:
    """The plan for `qkv`; that of explicit weights is the same in both directions."""
    head_elements = qkv.shape[2] * qkv.shape[3]
    if multiplies_bf16(qkv):
        return plan_of(layout, head_elements, FORWARD_ELEMENTS, WORTH_EXPLICIT_FLOP)
    return plan_of(layout, head_elements, gathered)


def self_forward(
    qkv: Tensor, layout: AttentionLayout, scale: float, dropout_p: float, philox: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(out [R, H, D], lse [R, H])` from `qkv` `[R, 3, H, D]`."""
    H, D = qkv.shape[2:]
    plan = _plan(layout, qkv, FORWARD_ELEMENTS)
    outputs = _Collected(plan, qkv, (H, D))
    statistics = _Collected(plan, qkv.new_empty(0, dtype=wide_dtype(qkv.dtype)), (H,))
    for part in plan.parts:
        q, k, v = part.keys.take(qkv).unbind(2)
        output, lse = attend(
            q[:, -part.rows.shape[1] :], k, v, part.bias, scale, part.dropout(philox, dropout_p)
        )
        outputs.add(output)
        statistics.add(lse)
    return outputs.result(), statistics.result()


def self_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
) -> Tensor:
    """`dqkv [R, 3, H, D]`."""
    H, D = qkv.shape[2:]
    N, Q = layout.num_blocks, layout.num_queries
    plan = _plan(layout, qkv, BACKWARD_ELEMENTS)
    collected = _Collected(plan, qkv, (3, H, D))
    # gradients of queries from texts that only read them, summed before rounding
    seen = None
    for part in plan.parts:
        m, L = part.rows.shape
        q, k, v = part.keys.take(qkv).unbind(2)
        d_output, statistics = part.rows.take(dout), part.rows.take(lse)
        if part.padding is not None:
            # padding has no gradient, and no weights: with another row's lse they could overflow
            d_output = d_output.masked_fill(part.padding[..., None, None], 0)
            statistics = statistics.masked_fill(part.padding[..., None], torch.inf)
        grads = attend_backward(
            d_output,
            q[:, -L:],
            k,
            v,
            part.rows.take(out),
            statistics,
            part.bias,
            scale,
            part.dropout(philox, dropout_p),
        )
        room = collected.room(m, L)
        for i, grad in enumerate(grads):
            room[:, :, i].copy_(grad[:, -L:])
        if part.seen_blocks is not None:
            if seen is None:
                seen = lse.new_zeros(N, Q, 2, H, D)
            for i, grad in enumerate(grads[1:]):
                seen[:, :, i].index_add_(0, part.seen_blocks, grad[:, :Q].to(seen.dtype))
    dqkv = collected.result()
    if seen is not None:
        dqkv[: N * Q, 1:].add_(seen.flatten(0, 1))
    return dqkv
