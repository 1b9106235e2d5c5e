"""Requirements of the CUDA kernels: compute capability, and alignment of rows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# csrc/rules.ninja: machine code for 8.x and 9.0, and PTX that newer cards compile
OLDEST_CAPABILITY = 80


def capability_of(device: torch.device) -> int:
    """The GPU's compute capability times 10; 0 if this machine has no such device."""
    return _capability(device.index) if device.type == "cuda" else 0


# constant for the lifetime of a traced graph
@torch.compiler.assume_constant_result
def _capability(index: int | None) -> int:
    return _found_capability(index)


@cache
def _found_capability(index: int | None) -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def gpu_reasons(what: str, device: str, capability: int) -> list[str]:
    """Why the kernels cannot run on the device of `what`."""
    if device != "cuda":
        return [f"{what} on {device}: needs a CUDA device"]
    if 0 < capability < OLDEST_CAPABILITY:
        have, need = (f"{value // 10}.{value % 10}" for value in (capability, OLDEST_CAPABILITY))
        return [f"compute capability {have}: needs {need} or later"]
    return []


def readable(x: Tensor) -> Tensor:
    """x with rows aligned to 16 bytes; copied only if they are not."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.itemsize % 16 == 0 for step in steps)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
