"""Frozen weights in 8 or 4 bits, in plain PyTorch.

int8: each row is divided by a scale, its absolute maximum / 127, and rounded.
int4: the same per group of 64 values of a row, with scale absolute maximum / 7; two values per
byte.

Only the weight matrices of linear layers are quantised; norms, biases and embeddings keep their
precision. A quantised weight is a few plain tensors, so that a transformer block is one flat buffer
that a single copy moves. The weight classes of quantisation libraries do not allow this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2fast._choices import Storage

GROUP = 64  # values that share a scale in int4


def parts_of(storage: Storage, shape: torch.Size) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors that encode a weight [R, K].

    Returns:
        int8: [R, K] int8 and [R, 1] fp32 scales. int4: [R, G, GROUP / 2] uint8 and [R, G, 1] fp32
        scales, with G groups per row.
    """
    rows, columns = shape
    if storage == "int8":
        return [(torch.int8, (rows, columns)), (torch.float32, (rows, 1))]
    groups = -(-columns // GROUP)
    return [(torch.uint8, (rows, groups, GROUP // 2)), (torch.float32, (rows, groups, 1))]


def encode(storage: Storage, weight: Tensor) -> list[Tensor]:
    """Quantise `weight` [R, K] to the tensors that `parts_of` describes.

    Raises:
        ValueError: a value is not finite, which no level stands for.
    """
    values = weight.float()
    if storage == "int8":
        scale = _scale(values.abs().amax(dim=1, keepdim=True), 127)
        return [(values / scale).round().to(torch.int8), scale]
    missing = -values.shape[1] % GROUP
    grouped = nn.functional.pad(values, (0, missing)).unflatten(1, (-1, GROUP))
    scale = _scale(grouped.abs().amax(dim=2, keepdim=True), 7)
    levels = ((grouped / scale).round() + 8).to(torch.uint8)
    # a byte holds one value from each half of a group, so each half is decoded contiguously
    low, high = levels.chunk(2, dim=2)
    return [low | (high << 4), scale]


def decode(storage: Storage, parts: list[Tensor], out: Tensor) -> Tensor:
    """Dequantise `parts` into `out` [R, K], in its dtype."""
    values, scale = parts
    if storage == "int8":
        return torch.mul(values, scale, out=out)
    halves = ((values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8)
    columns = out.shape[1]
    if columns % GROUP:
        dense = torch.cat([half * scale for half in halves], dim=2).flatten(1)
        return out.copy_(dense[:, :columns])
    places = out.unflatten(1, (-1, GROUP)).chunk(2, dim=2)
    for half, place in zip(halves, places, strict=True):
        torch.mul(half, scale, out=place)
    return out


def is_encoded(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is quantised, which holds for the weights of linear layers."""
    return (
        name == "weight"
        and parameter.ndim == 2
        and parameter.is_floating_point()
        and not isinstance(module, nn.Embedding)
    )


def _scale(largest: Tensor, levels: int) -> Tensor:
    if not largest.isfinite().all():
        raise ValueError("a weight holds values that are not finite; are its files damaged?")
    return torch.where(largest > 0, largest / levels, 1.0)
