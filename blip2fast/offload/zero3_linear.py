"""Frozen linear layers under ZeRO-3 that save no inputs for the backward pass.

DeepSpeed replaces PyTorch's linear function with one that saves the weight itself instead of a view
of it, so that the memory of a gathered weight can be released. It also saves the layer's input,
which is needed only for weight gradients; in a frozen model, that is most of the saved memory.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from blip2fast._imports import needs


def keep_no_inputs(model: nn.Module) -> None:
    """Stop the linear layers of a frozen model under ZeRO-3 from saving their inputs.

    Without ZeRO-3 this is not needed: PyTorch's linear saves no input if the weight is frozen.
    """
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if type(module) is nn.Linear and frozen:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _function().apply(x, module.weight, module.bias)
    return out


@cache
def _function() -> Any:
    """DeepSpeed's autograd function for a partitioned linear layer, without the saved input."""
    with needs("train", "deepspeed"):
        from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    class FrozenLinear(LinearFunctionForZeroStage3):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, weight, bias = inputs
            LinearFunctionForZeroStage3.setup_context(ctx, (None, weight, bias), output)

    return FrozenLinear
