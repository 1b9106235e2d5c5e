"""The ITC sweep of `chunked` for a CPU: larger tiles, and the products that are quickest there.

Small tiles spend more time between their products than in them: 256 pairs took 14 ms forward with
tiles of 16 images, 12 with tiles of 64, and 6.5 if oneDNN multiplies, too (Q 32, D 256, fp32; one
core of an EPYC of family 26).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blip2fast.kernels.itc import statistics
from blip2fast.kernels.itc.chunked import _merge_into, _tile_statistics, _tiles
from blip2fast.kernels.itc.config import ChunkedConfig
from blip2fast.kernels.itc.interface import Options, Pairs, Sweep, index_dtype
from blip2fast.kernels.precision import wide, wide_dtype

# `[m, D]` and `[n, D]` to `[m, n]`, in fp32 or fp64
Product = Callable[[Tensor, Tensor], Tensor]
TILES = ChunkedConfig(images=64, tile_bytes=4 * 2**20)


def sweep(
    image: Tensor, text: Tensor, temp: Tensor, pairs: Pairs, options: Options, product: Product
) -> Sweep:
    """As `reference.sweep`, tile by tile; `product(a, b)` is `a @ b.T`."""
    M, Q, _ = image.shape
    N, dtype = text.shape[0], wide_dtype(image.dtype)
    m, n = TILES.tile(M, N, Q, dtype.itemsize)
    like, legacy = image.new_empty(0, dtype=dtype), options.legacy
    rows, columns = (statistics.empty(count, like, legacy) for count in (M, N))
    kept = (M, N) if options.save else (0, 0)
    sim, arg = like.new_empty(kept), torch.empty(kept, dtype=index_dtype(Q))
    with torch.autocast("cpu", enabled=False):
        texts = wide(text)
        for i in _tiles(M, m):
            queries = wide(image[i]).flatten(0, 1)
            for j in _tiles(N, n):
                per_query = product(queries, texts[j]).unflatten(0, (-1, Q))
                best = per_query.amax(1)
                if options.save:
                    sim[i, j], arg[i, j] = best, _lowest(per_query == best[:, None])
                of_rows, of_columns = _tile_statistics(best / temp, i, j, pairs, options)
                _merge_into(rows, i, of_rows)
                _merge_into(columns, j, of_columns)
    return Sweep(rows[0], columns[0], rows[1], columns[1], sim, arg)


def _lowest(hits: Tensor) -> Tensor:
    """The first query that hits, `[m, n]`, of `[m, Q, n]` bool: that with the largest Q - 1 - q."""
    Q = hits.shape[1]
    dtype = index_dtype(Q)
    from_last = torch.arange(Q - 1, -1, -1).to(dtype)[:, None]
    return Q - 1 - (hits.to(dtype) * from_last).amax(1)
