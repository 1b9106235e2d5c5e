"""Sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """A program works on a block of columns, BLOCK_R rows at a time.

    Chosen by what compiles for sm_80, sm_90 and sm_100 without spilling registers
    (`tests/ops/test_glue_aot.py`); no choice was timed on a GPU.

    Attributes:
        block_r: Rows of a tile.
        block_f: Columns of a tile.
        num_warps: Triton's.
        programs: Most programs of a backward pass; each keeps sums over rows of its own.
    """

    block_r: int
    block_f: int
    num_warps: int
    programs: int


# 16 elements a thread; 528 programs are four for each multiprocessor of an H100
TILE = TileConfig(block_r=8, block_f=256, num_warps=4, programs=528)
