"""Linear layers in fp32 on a CPU with oneDNN, forward and backward.

PyTorch uses MKL there, and oneDNN is faster: by 5 to 25 % from 16 to 1,024 rows on one AMD
EPYC, 1.5 to 2.2 times on a newer one (not timed on Intel). It is called through an operator that
belongs to PyTorch's compiler; if that is missing, PyTorch's own linear runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

from blip2fast.ops.tracing import has_values

# The first product of a shape costs oneDNN 0.3 to 7 ms more, and text lengths make new shapes every
# step. So training pads rows to multiples of 64 (a step of 8 pairs, ViT-g: 3.9 s without, 3.5 s
# with, 3.2 s with constant lengths, 5.2 s with MKL), and skips products that take MKL under 2 ms.
_ROWS = 64
_WORTH_FLOPS = 5e8
_OPERATOR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def is_supported(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_product` supports the call: fp32 on a CPU, not empty, called as it is."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and has_values(x)  # neither compiled nor recorded: other programs do not know the operator
        and (type(weight) is nn.Parameter or type(weight) is Tensor)
        and x.numel() > 0
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0  # the operator has no forward derivative
        and _OPERATOR is not None
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def onednn_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """`x @ weight.T + bias`, optionally followed by exact GELU; not differentiable.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        gelu: Whether to apply GELU.

    Returns:
        `[..., N]`.
    """
    name, algorithm = ("gelu", "none") if gelu else ("none", "")
    y: Tensor = _OPERATOR(x, weight, bias, name, [], algorithm)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(_padded(x), weight, bias)[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = _padded(dy)
        return (
            onednn_product(rows, weight.t())[: len(x)] if ctx.needs_input_grad[0] else None,
            onednn_product(rows.t(), _padded(x).t()) if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _padded(x: Tensor) -> Tensor:
    """`[rows, K]`, contiguous, zero-padded to the next multiple of `_ROWS` rows."""
    missing = -len(x) % _ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, with first derivatives; PyTorch computes small products.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`.
    """
    if 2 * x.numel() * len(weight) < _WORTH_FLOPS or not is_supported(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _flops(x: torch.Size, weight: torch.Size, *others: Any, **named: Any) -> int:
    return 2 * x.numel() * weight[0]


# FlopCounterMode counts only operators that have a registered formula
if _OPERATOR is not None and _OPERATOR not in flop_registry:
    register_flop_formula(_OPERATOR)(_flops)
