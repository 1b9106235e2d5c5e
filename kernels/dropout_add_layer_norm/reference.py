"""Reference for dropout, residual and LayerNorm in plain PyTorch; all backends must match it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.philox import keep_mask


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm(dropout(x + x_bias) + residual)`, computed in fp32 (fp64 for fp64 data).

    Args:
        x: `[R, C]`.
        residual: `[R, C]`, or None.
        weight, bias: `[C]`, of the LayerNorm.
        x_bias: `[C]`, or None.
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of `x + x_bias`.
        philox: `[2]` int64 seed and offset; the counter's row is the row of x, its head 0.
        out_dtype: Type of the result; by default that of x.

    Returns:
        `[R, C]`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if x_bias is not None:
        total = total + x_bias.to(wide)
    if dropout_p > 0 and philox is not None:
        total = total * keep(x.shape[0], x.shape[1], philox, dropout_p) / (1 - dropout_p)
    if residual is not None:
        total = total + residual.to(wide)
    out = F.layer_norm(total, total.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return out.to(x.dtype if out_dtype is None else out_dtype)


def keep(R: int, C: int, philox: Tensor, dropout_p: float) -> Tensor:
    """The dropout mask, `[R, C]` bool, true where an element is kept."""
    rows = torch.arange(R, device=philox.device)
    return keep_mask(philox, dropout_p, rows, torch.zeros_like(rows), C)
