"""What every launch of a Triton kernel here says, and what it asks of a device and its data."""

from __future__ import annotations

import torch
from torch import Tensor

# Multiply-adds contract, whatever TRITON_DEFAULT_FP_FUSION says: backward passes compute the
# forward's scores, similarities and activations again and must get the same ones.
FP_FUSION = True


def capability(device: torch.device) -> int:
    """The GPU's compute capability times 10; that of an H100 where there is none."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dense_width(x: Tensor) -> Tensor:
    """The data with its last dimension contiguous: the kernels take any other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
