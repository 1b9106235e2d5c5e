"""Frozen vision models with 8-bit linear layers, by torchao.

Weights of the blocks are int8 with a scale for each output, rounded once; their inputs are rounded
to int8 with a scale for each token, at every call. Products are of integers.
"""

from __future__ import annotations

from torch import nn

from blip2fast._imports import needs


def quantize_int8(blocks: nn.Module) -> None:
    """Hold the weights of all linear layers in int8, in place.

    Args:
        blocks: The transformer blocks of a vision model in fp32.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    with needs("hold an image encoder in int8", "torchao"):
        from torchao.quantization import (  # type: ignore[import-not-found]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    quantize_(blocks, Int8DynamicActivationInt8WeightConfig())
