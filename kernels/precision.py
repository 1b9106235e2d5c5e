"""The types in which statistics and losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what scores, statistics and losses are computed and kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64."""
    return x.to(wide_dtype(x.dtype))
