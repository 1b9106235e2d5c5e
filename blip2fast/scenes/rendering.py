"""Pixels and masks of scenes: jitter, size, brightness and noise, all from a seed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2fast.scenes.glyphs import digit_coverage, handwriting, shape_coverage
from blip2fast.scenes.world import COLOURS, Contents, SceneSpec, Split

# Half the side of an object, as a fraction of its cell's side; the maximum leaves a margin.
HALF_SIZE = {"shapes": (0.28, 0.42), "digits": (0.38, 0.47)}
# Fixed ids of the random streams, so that scene i does not depend on the split's length.
_STREAMS = {"contents": 0, "geometry": 1, "light": 2, "noise": 3, "writing": 4}
_CHUNK = 1024


class Rendering(NamedTuple):
    """`images` uint8 [n, 3, h, w]; `masks` bool [n, 2, h, w], one per object, empty if missing."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]


def stream(name: str, split_index: int, seed: int) -> np.random.Generator:
    """The random generator of stream `name`, for a split and seed."""
    return np.random.default_rng([_STREAMS[name], split_index, seed])


def render(
    spec: SceneSpec, contents: Contents, split: Split, split_index: int, seed: int
) -> Rendering:
    """Draw every scene of `contents`.

    Objects lie inside their cell, with random size and offset. The background is a random dark
    grey, object colours are dimmed at random, and Gaussian noise is added to the whole image.

    Returns:
        The images and the ground-truth masks (pixels that an object covers by at least half).
    """
    n, size = len(contents.place), spec.image_size
    geometry = stream("geometry", split_index, seed).random((n, 2, 3), dtype=np.float32)
    light = stream("light", split_index, seed).random((n, 2, 4), dtype=np.float32)
    writing = stream("writing", split_index, seed).random((n, 2), dtype=np.float32)
    noise = stream("noise", split_index, seed)
    images = np.empty((n, 3, size, size), dtype=np.uint8)
    masks = np.zeros((n, 2, size, size), dtype=bool)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    # Chunks bound the memory of the float canvases.
    for start in range(0, n, _CHUNK):
        rows = slice(start, min(start + _CHUNK, n))
        count = rows.stop - start
        canvas = np.empty((count, 3, size, size), dtype=np.float32)
        canvas[:] = (0.05 + 0.2 * light[rows, 0, 3])[:, None, None, None]
        for slot in range(2):
            present = np.flatnonzero(contents.place[rows, slot] >= 0)
            part = Contents(*(array[rows, slot][present] for array in contents))
            coverage = _coverage(
                spec, part, split, geometry[rows, slot][present], writing[rows, slot][present]
            )
            shade = palette[part.colour] * (0.65 + 0.35 * light[rows, slot, 0][present])[:, None]
            shade = shade + 0.08 * (light[rows, slot, 1][present] - 0.5)[:, None]
            cover = coverage[:, None]
            canvas[present] = canvas[present] * (1 - cover) + shade[:, :, None, None] * cover
            masks[start + present, slot] = coverage >= 0.5
        canvas += spec.noise * noise.standard_normal(canvas.shape, dtype=np.float32)
        images[rows] = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Rendering(images, masks)


def _coverage(
    spec: SceneSpec,
    part: Contents,
    split: Split,
    geometry: NDArray[np.float32],
    writing: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Coverage [n, h, w] of one object per scene; `geometry` [n, 3] and `writing` [n] in [0, 1)."""
    cell = spec.image_size / spec.grid
    low, high = HALF_SIZE[spec.source]
    half = (cell * (low + (high - low) * geometry[:, 0])).astype(np.float32)
    room = (cell / 2 - half)[:, None] * (2 * geometry[:, 1:] - 1)
    row, column = np.divmod(part.place, spec.grid)
    centre_y = ((row + 0.5) * cell + room[:, 0]).astype(np.float32)
    centre_x = ((column + 0.5) * cell + room[:, 1]).astype(np.float32)
    pixel = np.arange(spec.image_size, dtype=np.float32) + 0.5
    shape = (len(half), spec.image_size, spec.image_size)
    u = np.broadcast_to((pixel - centre_x[:, None])[:, None, :] / half[:, None, None], shape)
    v = np.broadcast_to((pixel - centre_y[:, None])[:, :, None] / half[:, None, None], shape)
    if spec.source == "shapes":
        return shape_coverage(part.kind, u, v, half)
    images, rows_of_kind = handwriting(split)
    rows = np.array(
        [
            rows_of_kind[kind][int(draw * len(rows_of_kind[kind]))]
            for kind, draw in zip(part.kind.tolist(), writing.tolist(), strict=True)
        ],
        dtype=np.int64,
    )
    return digit_coverage(images[rows], u, v)
