"""Sizes of tiles and byte budgets, with what each was chosen by."""

from __future__ import annotations

from dataclasses import dataclass

# similarity and query index of every pair are kept for the backward pass up to this many bytes
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
# enough rows to fill a GPU's multiply; not measured on one
CHUNKED_GPU = ChunkedConfig(images=256, tile_bytes=256 * 2**20)


def chunked_config(device_type: str) -> ChunkedConfig:
    """The tiles for a kind of device."""
    return CHUNKED_CPU if device_type == "cpu" else CHUNKED_GPU


@dataclass(frozen=True)
class TritonConfig:
    """Tiles of the `triton` backend: BLOCK_T texts by BLOCK_I images of BLOCK_Q queries each.

    Chosen by what compiles for sm_80, sm_90 and sm_100 without spilling registers and within
    shared memory (`tests/ops/test_itc_triton.py`); no choice was timed on a GPU.

    Attributes:
        block_t: Texts of a tile, rows of the product.
        block_i: Images of a tile.
        block_q: Q up to a power of two; `block_i * block_q` are the columns of the product.
        block_d: Feature width of one product; D or more: the whole of it at once.
        out_d: Feature width of the gradient that a program of the backward pass owns.
        num_warps, num_stages: Triton's.
    """

    block_t: int
    block_i: int
    block_q: int
    block_d: int
    out_d: int
    num_warps: int
    num_stages: int


# enough programs to fill a GPU twice over where there are few texts
PROGRAMS = 264


def triton_config(Q: int, D: int, itemsize: int) -> TritonConfig:
    """The tiles for a shape.

    Args:
        Q: Queries, 1 to 256.
        D: Feature width, 16 to 1024.
        itemsize: Bytes of a feature.
    """
    block_q = _power_of_two(Q)
    half = itemsize == 2
    width = _power_of_two(D)
    columns = max(128 if half else 64, block_q)
    return TritonConfig(
        block_t=128 if half and block_q <= 128 else 64,
        block_i=columns // block_q,
        block_q=block_q,
        block_d=width if half and width <= 256 else min(width, 64),
        out_d=min(width, 256 if half else 64),
        num_warps=8,
        num_stages=3,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
