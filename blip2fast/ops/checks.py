"""What the ops between the large products have in common: checks, and reasons of backends."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_WIDTH = 8192
HAS_TRITON = find_spec("triton") is not None
# Triton's own switch: its kernels then run on the CPU, slowly, to be checked
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AS_DEFINED = "it is the definition, in several passes: force it with impl='reference'"


def triton_reasons(device: str, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Why a Triton kernel cannot run on data of these types."""
    reasons = []
    if device != "cuda" and not INTERPRETED:
        reasons.append(f"tensors on {device}: needs a CUDA device")
    if torch.float64 in dtypes:
        reasons.append("float64: only float16, bfloat16 and float32")
    if not HAS_TRITON:
        reasons.append("triton is not installed: pip install triton")
    return reasons


def check_rows(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless x is `[rows, width]` of a floating type."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: expected [rows, width], width above 0, got {list(x.shape)}: flatten the rest"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")


def check_like(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise `ValueError` unless x, where there is one, has this shape beside `like`."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like the data, got {x.device}")
