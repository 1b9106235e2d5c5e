"""Tile sizes and byte budgets, with the reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from blip2fast.kernels.tuned import Entry, Tuned

# similarities and query indices of all pairs are saved for the backward pass up to this many bytes
SAVE_BUDGET_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ChunkedConfig:
    """Tiles of the `chunked` backend.

    Attributes:
        images: Most images in a tile.
        tile_bytes: Most bytes of a tile's products, `images * Q * texts` in fp32.
    """

    images: int
    tile_bytes: int

    def tile(self, M: int, N: int, Q: int, itemsize: int) -> tuple[int, int]:
        """Images and texts of a tile, each at least 1."""
        pairs = max(1, self.tile_bytes // (Q * itemsize))
        images = max(1, min(self.images, M, pairs))
        return images, max(1, min(N, pairs // images))


CHUNKED_CPU = ChunkedConfig(images=16, tile_bytes=4 * 2**20)
# enough rows for an efficient GPU matmul; not measured on one
CHUNKED_GPU = ChunkedConfig(images=256, tile_bytes=256 * 2**20)


def chunked_config(device_type: str) -> ChunkedConfig:
    """The tiles for a kind of device."""
    return CHUNKED_CPU if device_type == "cpu" else CHUNKED_GPU


@dataclass(frozen=True)
class TritonConfig:
    """Tiles of the `triton` backend: BLOCK_T texts by BLOCK_I images of BLOCK_Q queries each.

    The defaults compile with few or no register spills and fit shared memory for sm_80 to sm_120
    (`tests/ops/test_kernels_compile.py`, `test_itc_aot.py`); they were not timed. Choices from a
    sweep on a GPU are in `tuned.json`.

    Attributes:
        block_t: Texts of a tile, rows of the product.
        block_i: Images of a tile.
        block_q: Q rounded up to a power of two; the product has `block_i * block_q` columns.
        block_d: Feature width of one product; if D or more, there is no loop over features.
        out_d: Feature width of the gradient that a backward program owns; 0 in the forward pass.
        num_warps, num_stages: Triton's.
        programs: Images are split until there are about this many programs.
    """

    block_t: int
    block_i: int
    block_q: int
    block_d: int
    out_d: int
    num_warps: int
    num_stages: int
    # fills a GPU twice over if there are few texts
    programs: int = 264


_CHOICES = ("block_t", "block_i", "block_d", "num_warps", "num_stages", "programs")
# features of 2 bytes, Q in (16, 32], D in (128, 256], and similarities are saved; any number of
# pairs, so that the check at first use, which has few, runs the same kernels as a large batch.
# "backward": tiles of the kernel that owns images, then of the one that owns texts
TUNED = Tuned(
    Path(__file__).parent,
    {"forward/q32_d256": _CHOICES, "backward/q32_d256": (*_CHOICES, "out_d")},
    {"backward/q32_d256": (2,)},
)


def forward_tiles(Q: int, D: int, itemsize: int, capability: int, saves: bool) -> TritonConfig:
    """The tiles of `_itc_fwd_kernel`.

    Args:
        Q, D, itemsize, capability: As in `forward_config`.
        saves: Whether similarities are saved.
    """
    config = forward_config(Q, D, itemsize, capability)
    entries = _tuned("forward", config.block_q, D, itemsize, capability) if saves else ()
    return replace(config, **entries[0]) if entries else config


def backward_tiles(
    Q: int, D: int, itemsize: int, capability: int, saved: bool, load_ahead: bool
) -> tuple[TritonConfig, TritonConfig]:
    """The tiles of the kernel that owns images, and of the one that owns texts.

    Args:
        Q, D, itemsize, capability, load_ahead: As in `backward_config`.
        saved: Whether similarities were saved.
    """
    config = backward_config(Q, D, itemsize, capability, load_ahead)
    entries = _tuned("backward", config.block_q, D, itemsize, capability) if saved else ()
    if not entries:
        return config, config
    of_images, of_texts = entries
    return replace(config, **of_images), replace(config, **of_texts)


def _tuned(
    direction: str, block_q: int, D: int, itemsize: int, capability: int
) -> tuple[Entry, ...]:
    if itemsize != 2 or (block_q, _power_of_two(D)) != (32, 256):
        return ()
    return TUNED.entries(capability, f"{direction}/q32_d256")


def forward_config(Q: int, D: int, itemsize: int, capability: int) -> TritonConfig:
    """The default tiles of the sweep, without tuning.

    Args:
        Q: Queries, 1 to 256.
        D: Feature width, 16 to 1024.
        itemsize: Bytes of a feature.
        capability: The GPU's compute capability times 10.
    """
    half, wide = itemsize == 2, _is_wide(capability)
    block_q, width = _power_of_two(Q), _power_of_two(D)
    narrow = 64 if half else 32
    # on sm_80, 128 product columns take 255 registers and spill; 64 take 166
    columns = 128 if half and wide else 64
    texts = _texts(128 if half else 64, block_q, wide)
    # the full width at once keeps a block's texts in shared memory: 194 KB on sm_90
    whole = half and width <= 256 and block_q <= 128
    if whole:
        # a row of features for every text and column, and scratch space for the reductions
        rows = (shared_limit_bytes(capability) - 8 * 1024) // (2 * width)
        texts = texts if texts + max(columns, block_q) <= rows else 64
        whole = texts + max(columns, block_q) <= rows
    return TritonConfig(
        block_t=texts,
        block_i=_images(columns, block_q),
        block_q=block_q,
        block_d=width if whole else min(width, narrow),
        out_d=0,
        num_warps=8,
        num_stages=2,
    )


def backward_config(
    Q: int, D: int, itemsize: int, capability: int, load_ahead: bool = True
) -> TritonConfig:
    """The default tiles of the gradient, without tuning.

    Args:
        Q, D, itemsize, capability: As in `forward_config`.
        load_ahead: Whether the next tile is prefetched. If not, tiles are narrower: Triton 3.6
            spills 296 B with the one, 32 B with the other alone.
    """
    half, wide = itemsize == 2, _is_wide(capability) and load_ahead
    block_q, width = _power_of_two(Q), _power_of_two(D)
    return TritonConfig(
        block_t=_texts(64, block_q, False) if half else 32,
        block_i=_images(128 if half else 64, block_q),
        block_q=block_q,
        block_d=min(width, 64 if half else 32),
        # a width of 256 spills on sm_80
        out_d=min(width, (256 if wide else 128) if half and block_q <= 128 else 64),
        num_warps=8,
        num_stages=2 if load_ahead else 1,
    )


def shared_limit_bytes(capability: int) -> int:
    """Maximum shared memory per thread block, from the CUDA programming guide's table."""
    if capability in (86, 89) or capability >= 120:
        return 99 * 1024
    return (227 if capability >= 90 else 163) * 1024


def _is_wide(capability: int) -> bool:
    """Whether matmuls run on whole warpgroups: on sm_90 and sm_100, but not on sm_120."""
    return 90 <= capability < 120


def _texts(texts: int, block_q: int, wide: bool) -> int:
    """Texts of a tile; with 256 product columns there are registers for fewer."""
    return texts if block_q <= 128 else 64 if wide else 32


def _images(columns: int, block_q: int) -> int:
    """Images of a tile; with few queries the statistics of more than 16 would spill."""
    return min(max(1, columns // block_q), 16)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
