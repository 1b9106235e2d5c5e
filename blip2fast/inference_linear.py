"""Linear layers of the drop-in Q-Former: called as modules, but for what oneDNN does better."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from blip2fast.ops import linear as onednn_linear
from blip2fast.qformer.fused_linear import is_plain


def linear(
    layer: nn.Module, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`activation(layer(x))`; without a gradient by oneDNN where it takes it, GELU at no cost.

    Args:
        layer: A linear layer, or whatever stands in its place.
        x: `[..., K]`.
        activation: None: the identity.
    """
    gelu = isinstance(activation, GELUActivation) and activation.act is F.gelu
    if (
        (gelu or activation is None)
        and not torch.is_grad_enabled()
        and is_plain(layer)
        and onednn_linear.takes(x, layer.weight)
    ):
        return onednn_linear.product(x, layer.weight, layer.bias, gelu)
    y: Tensor = layer(x)
    return y if activation is None else activation(y)
