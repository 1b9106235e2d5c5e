"""What the tests of the Triton attentions share: PyTorch as the rival, dropout, far memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor
from triton_cases import DEVICE

from blip2fast.kernels.philox import philox_state

P = 0.3
SCALE = 0.3
# errors of gradients that a lse in fp32 makes, a unit of lse; PyTorch keeps the weights instead
LSE_ROUNDING = torch.finfo(torch.float32).eps / 2


def philox_of(p: float) -> Tensor | None:
    """A seed of more than 32 bits, where there is dropout."""
    return philox_state(2**40 + 5, 3, DEVICE) if p > 0 else None


def plain_attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, keep: Tensor | None, p: float):
    """What PyTorch makes of the definition in the type of the inputs."""
    weights = (q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf).softmax(-1)
    # a row that sees nothing gives 0
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return (weights if keep is None else weights * keep / (1 - p)) @ v


def sparse_memory(elements: int) -> Tensor:
    """fp16 memory of which only what is touched exists."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.float16)
