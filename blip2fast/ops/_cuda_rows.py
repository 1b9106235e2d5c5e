"""What the kernels written in CUDA ask of the rows that they read."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, copied only where they do not."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.itemsize % 16 == 0 for step in steps)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
