"""Tile sizes and launch parameters, with the reason for each choice.

The defaults compile in 16 bits with few or no register spills for sm_80 to sm_120
(`tests/ops/test_kernels_compile.py`); they were not timed. Choices from a sweep on a GPU, for some
classes of calls (`TUNED`), are in `tuned.json`. Sizes are rounded to powers of two with a cap, so
the number of compiled variants does not grow with batch, text length or image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blip2fast.kernels.launch import capability
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.kernels.tuned import Entry, Tuned

# the smallest dimension of a matrix product (`tl.dot`)
MIN_TILE = 16
# with fewer programs than these (two for each of an H100's 132 processors) keys are split
PROGRAMS = 264
# a part has enough tiles to make the cost of combining parts small
MIN_TILES_OF_SPLIT = 4
# rows of a tile of a text that sees a block's queries: beside the block's own gradients, 64 spill
READER_ROWS = 32
# rows of a program that combines parts
COMBINE_ROWS = 16
# tuned cross-attention has more keys than these: with fewer, small tiles are split or not by how
# many programs there are, which the check at first use does not try
TUNED_KEYS = 224

_SELF = ("block_m", "block_n", "heads", "num_warps", "num_stages", "max_registers")
_CROSS = ("block_m", "block_n", "num_warps", "num_stages", "max_registers", "interleaved")
# Calls that a sweep chose for. All: 2-byte data, D in (32, 64]. A class has whole kinds of calls
# (`blip2fast/ops/kernel_kinds.py`), so the check at first use runs what is tuned.
# self_*/causal: texts see queries causally, queries see no text; rows of a unit in (16, 32], keys
#     in (32, 64]
# self_*/no_causal: queries see text, and no text is causal; rows and keys of a unit in (32, 64]
# cross_*/one_use: an image is read by one block on average, Q in (16, 32], more than `TUNED_KEYS`
#     keys
# cross_*/several_uses: likewise by 3 or 4 blocks
# cross_backward: owners of images, then chunks of rows, as `cross_backward` takes them
TUNED = Tuned(
    Path(__file__).parent,
    {
        "self_forward/causal": (*_SELF, "joined"),
        "self_forward/no_causal": _SELF,
        "self_backward/causal": (*_SELF, "reader_m", "joined"),
        "self_backward/no_causal": (*_SELF, "reader_m"),
        "cross_forward/one_use": _CROSS,
        "cross_forward/several_uses": _CROSS,
        "cross_backward/one_use": (*_CROSS, "uses"),
        "cross_backward/several_uses": (*_CROSS, "uses"),
    },
    {"cross_backward/one_use": (1, 2), "cross_backward/several_uses": (1, 2, 3)},
)


@dataclass(frozen=True)
class Tiles:
    """Tile of one program.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        block_d: D rounded up to a power of two.
        heads: Heads that a program processes in sequence; divides H.
        single: Whether all keys of a row fit one tile.
        num_warps, num_stages: Triton's.
        reader_m: Rows of a tile of a text that sees a block's queries; self-attention's backward
            pass takes the lesser of this and `block_m`.
        max_registers: Limit per thread, so that one more program fits a multiprocessor; None: no
            limit.
        joined: Self-attention: whether the first text that sees a block's queries is processed
            with it, in one tile, if no text is BIDIRECTIONAL and a tile holds both; UNIMODAL texts
            are in a smaller tile then.
    """

    block_m: int
    block_n: int
    block_d: int
    heads: int
    single: bool
    num_warps: int
    num_stages: int = 2
    reader_m: int = READER_ROWS
    max_registers: int | None = None
    joined: bool = False


@dataclass(frozen=True)
class CrossTiles(Tiles):
    """Tile of one cross-attention program: full tiles of keys, then a smaller tail tile.

    257 image tokens are 4 tiles of 64 and one of 16, not 5 of 64.

    Attributes:
        full: Whether there are full tiles.
        tail: Keys of the tail tile; 0: none.
        interleaved: Whether further chunks of an image's rows are launched near its first chunk,
            not after the first chunks of all images, so that its keys are likelier still in cache.
        uses: Backward: the most blocks that read an image, each in a tile of rows of its own, of
            which the image's program holds every dq (`cross_backward_images.py`); at most 4. As the
            last tile also for images with more, whose dq it computes first. 0: rows of all blocks
            together.
    """

    full: bool = False
    tail: int = 0
    interleaved: bool = False
    uses: int = 0


@dataclass(frozen=True)
class Largest:
    """The largest tile of a kernel, and its launch parameters.

    Attributes:
        block_m, block_n: Rows and keys.
        num_warps, num_stages: Triton's.
        keys_owned: Whether the kernel accumulates sums for keys as well as for rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    keys_owned: bool = False


def _has_shared_operands(device: torch.device) -> bool:
    """Whether matmuls read their operands from shared memory, which leaves registers free.

    sm_90 and sm_100 do; sm_80 to sm_89 and sm_120 do not.
    """
    return 90 <= capability(device) < 120


def power_of_two(count: int, cap: int) -> int:
    """`count` rounded up to a power of two, between 16 and `cap`."""
    return min(max(MIN_TILE, 1 << (count - 1).bit_length()), cap)


def heads_together(H: int, block_m: int, block_n: int) -> int:
    """Heads per program: several for tiny tiles, to amortise the cost of starting a program.

    A 16 x 16 x 64 problem in bf16 moves only 8 KB.
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


def has_causal(layout: AttentionLayout) -> bool:
    """Whether a text may see a block's queries without being seen by them."""
    return layout.has_causal and layout.num_blocks > 0 and layout.num_texts > 0


def joined_tile(layout: AttentionLayout, tiles: Tiles) -> int:
    """Rows and keys of a UNIMODAL text's tile if blocks are joined by a text that sees them, or 0.

    See `Tiles.joined`.
    """
    both = layout.num_queries + layout.max_seqlen
    fits = tiles.single and both <= min(tiles.block_m, tiles.block_n)
    if not (tiles.joined and fits and has_causal(layout)) or layout.has_bidirectional:
        return 0
    # keys start at a multiple of 4
    return power_of_two(layout.max_seqlen + layout.num_queries % 4, tiles.block_n)


def self_forward_tiles(layout: AttentionLayout, qkv: Tensor) -> Tiles:
    """Tiles of `_qformer_attention_fwd_kernel`."""
    rows, keys = self_sizes(layout)
    largest = _forward_largest(qkv)
    # a single tile needs no rescaling and may be wider
    if largest.block_n < keys <= 128 and qkv.dtype.itemsize == 2:
        largest = Largest(largest.block_m, 128, 8)
    return _tuned_self("forward", layout, qkv, _self_tiles(rows, keys, qkv, largest))


def self_backward_tiles(layout: AttentionLayout, qkv: Tensor) -> Tiles:
    """Tiles of self-attention's backward kernels."""
    tiles = _self_tiles(*self_sizes(layout), qkv, _backward_largest(qkv))
    return _tuned_self("backward", layout, qkv, tiles)


def _tuned_self(direction: str, layout: AttentionLayout, qkv: Tensor, formula: Tiles) -> Tiles:
    """The tuned tiles of the call's class, or the formula's if it has none."""
    rows, keys = self_sizes(layout)
    name = ""
    if layout.num_blocks and 32 < keys <= 64:
        if layout.has_causal and not layout.has_bidirectional and 16 < rows <= 32:
            name = "causal"
        if layout.has_bidirectional and not layout.has_causal and 32 < rows <= 64:
            name = "no_causal"
    entries = _tuned(f"self_{direction}/{name}", qkv) if name else ()
    if not entries or qkv.shape[-2] % entries[0]["heads"]:
        return formula
    single = keys <= entries[0]["block_n"]
    tiles = replace(formula, **entries[0], single=single)
    return tiles if single else replace(tiles, heads=1)


def _tuned(name: str, data: Tensor) -> tuple[Entry, ...]:
    """The entries of a class, for data `[..., H, D]`."""
    if data.dtype.itemsize != 2 or not 32 < data.shape[-1] <= 64:
        return ()
    return TUNED.entries(capability(data.device), name)


def _self_tiles(rows: int, keys: int, qkv: Tensor, largest: Largest) -> Tiles:
    H, D = qkv.shape[-2:]
    block_m = power_of_two(rows, largest.block_m)
    block_n = power_of_two(keys, largest.block_n)
    single = keys <= block_n
    heads = heads_together(H, block_m, block_n) if single else 1
    warps = _warps(largest, block_m, block_n, qkv)
    return Tiles(block_m, block_n, power_of_two(D, 128), heads, single, warps, largest.num_stages)


def cross_forward_tiles(q: Tensor, kv: Tensor, N: int) -> CrossTiles:
    """Tiles of `_qformer_cross_attention_fwd_kernel`; arguments as in its launcher."""
    (tiles,) = _tuned_cross("forward", q, kv, N) or (
        _cross_tiles(_rows_of_image(q, kv, N), q, kv, _forward_largest(q)),
    )
    return tiles


def cross_backward_tiles(q: Tensor, kv: Tensor, N: int) -> tuple[CrossTiles, ...]:
    """Tiles for images whose rows fit one tile, and for images with more readers."""
    largest = _backward_largest(q)
    return _tuned_cross("backward", q, kv, N) or (
        _cross_tiles(_rows_of_image(q, kv, N), q, kv, largest),
        _cross_tiles(N * q.shape[1], q, kv, largest),
    )


def _tuned_cross(direction: str, q: Tensor, kv: Tensor, N: int) -> tuple[CrossTiles, ...]:
    """The tuned tiles of the call's class; empty if it has none."""
    (Q, H, D), (B, S) = q.shape[-3:], kv.shape[:2]
    uses = _rows_of_image(q, kv, N) // max(Q, 1)
    name = {1: "one_use", 3: "several_uses", 4: "several_uses"}.get(uses)
    if name is None or not 16 < Q <= 32 or S <= TUNED_KEYS:
        return ()
    entries = _tuned(f"cross_{direction}/{name}", q)
    # keys are split among programs in tiles of one size, and by no program with several uses
    widths = {entry["block_n"] for entry in entries}
    one_size = len(widths) == 1 and not any(entry.get("uses") for entry in entries)
    if not one_size and any(splits(B * H, -(-S // width), True)[0] > 1 for width in widths):
        return ()
    found = []
    for entry in entries:
        rest = S % entry["block_n"]
        tail = power_of_two(rest, entry["block_n"]) if rest else 0
        block_d = power_of_two(D, 128)
        found.append(
            CrossTiles(**entry, block_d=block_d, heads=1, single=False, full=True, tail=tail)
        )
    return tuple(found)


def _cross_tiles(rows: int, q: Tensor, kv: Tensor, largest: Largest) -> CrossTiles:
    """Full tiles of keys and a tail; several heads per program if there is only one tile."""
    (H, D), S, block_n = q.shape[-2:], kv.shape[1], largest.block_n
    block_m = power_of_two(rows, largest.block_m)
    full, rest = block_n <= S, S % block_n
    tail = power_of_two(rest, block_n) if rest else 0
    keys = block_n if full else max(tail, MIN_TILE)
    heads = 1 if full else heads_together(H, block_m, keys)
    return CrossTiles(
        block_m,
        block_n,
        power_of_two(D, 128),
        heads,
        not full,
        _warps(largest, block_m, keys, q),
        largest.num_stages,
        full=full,
        tail=tail,
    )


def _rows_of_image(q: Tensor, kv: Tensor, N: int) -> int:
    """Average number of rows that read an image."""
    return max(1, q.shape[1] * max(1, round(N / max(kv.shape[0], 1))))


def _warps(largest: Largest, block_m: int, block_n: int, data: Tensor) -> int:
    """Number of warps. In 16 bits a warp's product has 16 rows; fewer warps fit more programs.

    Accumulating sums for keys as well doubles the registers, and so the warps.
    """
    if data.dtype.itemsize != 2:
        return largest.num_warps
    longest = 2 * max(block_m, block_n) if largest.keys_owned else block_m
    return min(largest.num_warps, longest // MIN_TILE)


def _forward_largest(data: Tensor) -> Largest:
    wide = data.shape[-1] > 64
    if data.dtype.itemsize == 2:
        if wide and not _has_shared_operands(data.device):
            return Largest(64, 32, 4)
        return Largest(64, 64, 4)
    return Largest(16, 32, 8, 1) if wide else Largest(32, 32, 4, 1)


def _backward_largest(data: Tensor) -> Largest:
    wide = data.shape[-1] > 64
    if data.dtype.itemsize == 2:
        if _has_shared_operands(data.device):
            return Largest(32 if wide else 64, 64, 8, 1, True)
        return Largest(32, 32, 4, 1, True)
    return Largest(16, 32, 8, 1, True) if wide else Largest(32, 32, 4, 1, True)


def splits(programs: int, key_tiles: int, full: bool) -> tuple[int, int]:
    """The number of parts that the keys are split into, and the tiles per part."""
    if not full or programs >= PROGRAMS or key_tiles < 2 * MIN_TILES_OF_SPLIT:
        return 1, key_tiles
    parts = min(-(-PROGRAMS // programs), key_tiles // MIN_TILES_OF_SPLIT)
    tiles_of_split = -(-key_tiles // parts)
    return -(-key_tiles // tiles_of_split), tiles_of_split
