"""Validation of the ops' inputs; messages name the offending values."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.philox import threshold

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 8192


def is_float(x: Tensor) -> bool:
    """Whether a tensor is floating-point or bool, and so cannot hold indices."""
    return x.is_floating_point() or x.dtype == torch.bool


def describe(x: Tensor) -> str:
    """Shape, dtype and device of a tensor, for messages."""
    return f"{tuple(x.shape)}, {x.dtype}, {x.device}"


def check_rows(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless x is `[rows, width]` of a floating type."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: expected [rows, width], width above 0, got {list(x.shape)}: flatten the rest"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")


def check_like(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise `ValueError` unless x is None or has this shape and matches `like`."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like the data, got {x.device}")


def check_dropout(dropout_p: float, philox: Tensor | None, like: Tensor) -> None:
    """Raise `ValueError` unless `dropout_p` and `philox` are valid and complete."""
    threshold(dropout_p)
    if dropout_p > 0 and philox is None:
        raise ValueError(
            f"dropout_p={dropout_p} needs philox, the seed and offset of its mask: "
            "ops.philox_state(seed, offset, device)"
        )
    if philox is not None:
        if philox.shape != (2,) or philox.dtype != torch.int64:
            raise ValueError(f"philox: expected [2] int64, seed and offset, got {describe(philox)}")
        check_device("philox", philox, like)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Raise `ValueError` unless x is on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like the data, got {x.device}")
