"""Tile sizes and launch parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from blip2fast.kernels.launch import capability
from blip2fast.kernels.tuned import Tuned


@dataclass(frozen=True)
class TileConfig:
    """Tile of a program, which processes a block of columns BLOCK_R rows at a time.

    The defaults compile with few or no register spills for sm_80 to sm_120
    (`tests/ops/test_kernels_compile.py`, `test_glue_aot.py`); they were not timed. Choices
    from a sweep on a GPU are in `tuned.json`.

    Attributes:
        block_r: Rows of a tile.
        block_f: Columns of a tile.
        num_warps: Triton's.
        programs: Most programs of a backward pass; each keeps partial sums over its rows.
    """

    block_r: int
    block_f: int
    num_warps: int
    programs: int


# 16 elements per thread; 528 programs are four per multiprocessor of an H100
TILE = TileConfig(block_r=8, block_f=256, num_warps=4, programs=528)

# "forward", "backward": 2-byte data of any size
TUNED = Tuned(
    Path(__file__).parent,
    {
        "forward": ("block_r", "block_f", "num_warps"),
        "backward": ("block_r", "block_f", "num_warps", "programs"),
    },
)


def forward_tile(x: Tensor) -> TileConfig:
    """The tile of `_bias_gelu_fwd_kernel`."""
    return _tile("forward", x)


def backward_tile(x: Tensor) -> TileConfig:
    """The tile of `_bias_gelu_bwd_kernel`."""
    return _tile("backward", x)


def _tile(name: str, x: Tensor) -> TileConfig:
    entries = TUNED.entries(capability(x.device), name) if x.dtype.itemsize == 2 else ()
    return replace(TILE, **entries[0]) if entries else TILE
