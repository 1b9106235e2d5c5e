"""Frozen linear layers under ZeRO-3 that save no inputs for the backward pass.

DeepSpeed replaces PyTorch's linear function by one that keeps the weight itself and not a view of
it, so that the memory of a fetched weight can be given back. It keeps the layer's input as well,
which only a weight gradient needs; of a frozen model that is most of what its layers keep.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from blip2fast._imports import needs


def keep_no_inputs(model: nn.Module) -> None:
    """Stop the linear layers of a frozen model under ZeRO-3 from saving their inputs.

    Without ZeRO-3 there is nothing to do: PyTorch's own keeps none where the weight is frozen.
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
    """DeepSpeed's function of a spread linear layer, without the input."""
    with needs("train", "deepspeed"):
        from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    class FrozenLinear(LinearFunctionForZeroStage3):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, weight, bias = inputs
            LinearFunctionForZeroStage3.setup_context(ctx, (None, weight, bias), output)

    return FrozenLinear
