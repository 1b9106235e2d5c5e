"""The types in which statistics and losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: the dtype of scores, statistics and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x cast to fp32; fp64 stays fp64."""
    return x.to(wide_dtype(x.dtype))
