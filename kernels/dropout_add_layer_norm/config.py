"""Sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """A program works on BLOCK_R rows at a time, each whole.

    Chosen by what compiles for sm_80, sm_90 and sm_100 without spilling registers
    (`tests/ops/test_glue_aot.py`); no choice was timed on a GPU.

    Attributes:
        block_r: Rows of a tile.
        block_c: C up to a power of two, columns of a tile.
        num_warps: Triton's.
        programs: Most programs of a backward pass; each keeps sums over rows of its own.
    """

    block_r: int
    block_c: int
    num_warps: int
    programs: int


# 16 elements a thread of 8 warps
_TILE = 4096
# four for each multiprocessor of an H100: the partial sums stay a small part of the traffic
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
