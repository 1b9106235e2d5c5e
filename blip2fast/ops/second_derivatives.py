"""Second derivatives that are not implemented are refused, where autograd would leave terms out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Refused(torch.autograd.Function):
    """Gradients as they are; their derivative is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.op}: second derivatives are not implemented")


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Decorate the backward function of an op.

    PyTorch's decorator of this name refuses only where the incoming gradient itself needs one.

    Args:
        op: Its name, for the error.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
            # enabled by create_graph=True alone
            if not torch.is_grad_enabled():
                return backward(ctx, *incoming)
            with torch.no_grad():
                outputs = backward(ctx, *incoming)
            anchor = torch.empty(0, requires_grad=True)
            refused = iter(_Refused.apply(op, anchor, *(x for x in outputs if x is not None)))
            return tuple(None if x is None else next(refused) for x in outputs)

        return run

    return decorate
