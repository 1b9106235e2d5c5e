"""Tiles and launches, with what each was chosen by.

Chosen by what compiles for sm_80, sm_90 and sm_100 without spilling registers
(`tests/ops/test_qformer_attention_aot.py`); no choice was timed on a GPU. Sizes enter as powers of
two with a cap, so the number of compiled variants does not grow with batch, text length or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blip2fast.ops.attention_layout import AttentionLayout

# multiply-adds contract in every kernel, whatever TRITON_DEFAULT_FP_FUSION says: the backward pass
# computes the forward's scores again and must get the same ones
FP_FUSION = True
# the least that a matrix product takes
MIN_TILE = 16
# with fewer programs than these (two for each of an H100's 132 processors) keys are split
PROGRAMS = 264
# a part has enough tiles that putting parts together costs little beside it
MIN_TILES_OF_SPLIT = 4
# rows of a program that puts parts together
COMBINE_ROWS = 16


@dataclass(frozen=True)
class Tiles:
    """One program's share.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        block_d: D up to a power of two.
        heads: Heads that a program takes one after the other; divides H.
        single: Whether all keys of a row fit one tile.
        num_warps, num_stages: Triton's.
    """

    block_m: int
    block_n: int
    block_d: int
    heads: int
    single: bool
    num_warps: int
    num_stages: int = 2


def power_of_two(count: int, cap: int) -> int:
    """The least power of two that holds `count`, from 16 to `cap`."""
    return min(max(MIN_TILE, 1 << (count - 1).bit_length()), cap)


def heads_together(H: int, block_m: int, block_n: int) -> int:
    """Heads of a program: with tiny tiles, enough that starting it does not cost more than it does.

    A tile of 16 x 16 x 64 in bf16 is 8 KB in and out; a GPU starts a block in the time in which it
    moves about 30 KB.
    """
    most = max(1, 1024 // (block_m * block_n))
    return max(heads for heads in range(1, most + 1) if H % heads == 0)


def self_sizes(layout: AttentionLayout) -> tuple[int, int]:
    """Most rows and most keys of a unit of self-attention, each at least 1."""
    Q, T = layout.num_queries, layout.max_seqlen
    queries = Q if layout.num_blocks else 0
    rows = queries + T if layout.has_bidirectional else max(queries, T)
    # keys start at a multiple of 4
    keys = T + (Q if layout.num_blocks else Q % 4)
    return max(rows, 1), max(keys, 1)


def self_forward_tiles(rows: int, keys: int, H: int, D: int, itemsize: int) -> Tiles:
    """Tiles of `_qformer_attention_fwd_kernel`, for units of at most `rows` by `keys`."""
    half = itemsize == 2
    block_d = power_of_two(D, 128)
    block_m = power_of_two(rows, 64 if half else 32)
    block_n = power_of_two(keys, 128 if half and keys <= 128 else 64)
    return Tiles(
        block_m,
        block_n,
        block_d,
        heads_together(H, block_m, block_n),
        keys <= block_n,
        num_warps=block_m // 16 if half else 4,
    )


@dataclass(frozen=True)
class CrossTiles(Tiles):
    """One program's share of cross-attention: full tiles of keys, then one of what is left.

    257 image tokens are 4 tiles of 64 and one of 16, not 5 of 64.

    Attributes:
        full: Whether there are full tiles.
        tail: Keys of the last tile; 0: none.
    """

    full: bool = False
    tail: int = 0


def cross_forward_tiles(q: Tensor, kv: Tensor, N: int) -> CrossTiles:
    """Tiles of `_qformer_cross_attention_fwd_kernel`; arguments as in its launcher."""
    _, Q, H, D = q.shape
    half = q.dtype.itemsize == 2
    block_d = power_of_two(D, 128)
    block_m = power_of_two(rows_of_chunk(N, kv.shape[0], Q), 64 if half else 32)
    return cross_tiles(kv.shape[1], H, block_m, 64, block_d, block_m // 16 if half else 4)


def cross_tiles(
    S: int, H: int, block_m: int, block_n: int, block_d: int, num_warps: int
) -> CrossTiles:
    """Full tiles of `block_n` keys and the tail; several heads where one tile is all there is."""
    full, rest = S >= block_n, S % block_n
    tail = power_of_two(rest, block_n) if rest else 0
    heads = 1 if full else heads_together(H, block_m, max(tail, MIN_TILE))
    return CrossTiles(block_m, block_n, block_d, heads, not full, num_warps, full=full, tail=tail)


def rows_of_chunk(N: int, B: int, Q: int) -> int:
    """Rows that read an image, on average."""
    return max(1, Q * max(1, round(N / max(B, 1))))


def splits(programs: int, key_tiles: int, full: bool) -> tuple[int, int]:
    """Into how many parts the keys are split, and how many tiles a part has."""
    if not full or programs >= PROGRAMS or key_tiles < 2 * MIN_TILES_OF_SPLIT:
        return 1, key_tiles
    parts = min(-(-PROGRAMS // programs), key_tiles // MIN_TILES_OF_SPLIT)
    tiles_of_split = -(-key_tiles // parts)
    return -(-key_tiles // tiles_of_split), tiles_of_split


def self_backward_tiles(rows: int, keys: int, H: int, D: int, itemsize: int) -> Tiles:
    """Tiles of self-attention's backward kernels, for units of at most `rows` by `keys`."""
    half = itemsize == 2
    block_d = power_of_two(D, 128)
    block_m = power_of_two(rows, 64 if half else 32)
    block_n = power_of_two(keys, 64 if half else 32)
    single = rows <= block_m and keys <= block_n
    heads = heads_together(H, block_m, block_n) if single else 1
    return Tiles(block_m, block_n, block_d, heads, single, num_warps=4)


def cross_backward_tiles(q: Tensor, kv: Tensor, N: int) -> tuple[CrossTiles, CrossTiles]:
    """Tiles of images whose rows fit one tile, and of those with more readers."""
    _, Q, H, D = q.shape
    half = q.dtype.itemsize == 2
    block_d = power_of_two(D, 128)
    most = 64 if half else 32
    block_n = 64 if half else 32
    whole_m = power_of_two(rows_of_chunk(N, kv.shape[0], Q), most)
    chunk_m = power_of_two(N * Q, most)
    S = kv.shape[1]
    return (
        cross_tiles(S, H, whole_m, block_n, block_d, 4),
        cross_tiles(S, H, chunk_m, block_n, block_d, 4),
    )
