"""Launch options shared by all Triton kernels, and helpers for devices and strides."""

from __future__ import annotations

import torch
from torch import Tensor

# Always fuse multiply-adds, whatever TRITON_DEFAULT_FP_FUSION says: backward passes recompute
# the forward's scores, similarities and activations and must get identical values.
FP_FUSION = True


def capability(device: torch.device) -> int:
    """The GPU's compute capability times 10; that of an H100 if there is no GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dense_width(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; the kernels accept any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()
