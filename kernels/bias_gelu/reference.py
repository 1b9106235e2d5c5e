"""Reference for bias and exact GELU in plain PyTorch; every backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(x + bias)` with the exact GELU, `t * (1 + erf(t / sqrt(2))) / 2`.

    Args:
        x: `[R, F]`.
        bias: `[F]`, or None.

    Returns:
        `[R, F]`, in the type of x; computed in fp32 (fp64 for fp64 data).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return (total * 0.5 * (1 + torch.erf(total * 0.5**0.5))).to(x.dtype)
