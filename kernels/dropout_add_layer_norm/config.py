"""Tile sizes and launch parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from blip2fast.kernels.launch import capability
from blip2fast.kernels.tuned import Tuned


@dataclass(frozen=True)
class RowsConfig:
    """Tile of a program, which processes BLOCK_R full rows at a time.

    The defaults compile with few or no register spills for sm_80 to sm_120
    (`tests/ops/test_kernels_compile.py`, `test_glue_aot.py`); they were not timed. Choices
    from a sweep on a GPU are in `tuned.json`.

    Attributes:
        block_r: Rows of a tile.
        block_c: Columns of a tile: C rounded up to a power of two.
        num_warps: Triton's.
        programs: Most programs of a backward pass; each keeps partial sums over its rows.
    """

    block_r: int
    block_c: int
    num_warps: int
    programs: int


# 16 elements per thread with 8 warps
_TILE = 4096
# four per multiprocessor of an H100, which keeps the traffic of the partial sums small
_PROGRAMS = 528


def rows_config(C: int) -> RowsConfig:
    """The tile for a width of 1 to 8192."""
    block_c = max(16, 1 << (C - 1).bit_length())
    return RowsConfig(
        block_r=min(16, max(1, _TILE // block_c)),
        block_c=block_c,
        num_warps=8 if block_c <= _TILE else 16,
        programs=_PROGRAMS,
    )


# "forward/width_1024", "backward/width_1024": x of 2 bytes, C in (512, 1024]
TUNED = Tuned(
    Path(__file__).parent,
    {
        "forward/width_1024": ("block_r", "num_warps"),
        "backward/width_1024": ("block_r", "num_warps", "programs"),
    },
)


def forward_rows(C: int, x_dtype: torch.dtype, device: torch.device) -> RowsConfig:
    """The tile of `_dropout_add_layer_norm_fwd_kernel`."""
    return _rows("forward", C, x_dtype, device)


def backward_rows(C: int, x_dtype: torch.dtype, device: torch.device) -> RowsConfig:
    """The tile of `_dropout_add_layer_norm_bwd_kernel`."""
    return _rows("backward", C, x_dtype, device)


def _rows(direction: str, C: int, x_dtype: torch.dtype, device: torch.device) -> RowsConfig:
    config = rows_config(C)
    if x_dtype.itemsize != 2:
        return config
    name = f"{direction}/width_{config.block_c}"
    entries = TUNED.entries(capability(device), name)
    return replace(config, **entries[0]) if entries else config
