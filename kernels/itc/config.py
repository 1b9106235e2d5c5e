"""Sizes of tiles and byte budgets, with what each was chosen by."""

from __future__ import annotations

from dataclasses import dataclass


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

# similarity and query index of every pair are kept for the backward pass up to this many bytes
SAVE_BUDGET_BYTES = 2 * 2**30


def chunked_config(device_type: str) -> ChunkedConfig:
    """The tiles for a kind of device."""
    return CHUNKED_CPU if device_type == "cpu" else CHUNKED_GPU
