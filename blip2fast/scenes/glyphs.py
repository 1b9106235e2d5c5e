"""The appearance of objects: coverage of five drawn shapes and of handwritten digits.

Coverage (0 to 1) is evaluated at points (u, v) of a glyph's own square, -1 to 1 from left to right
and from top to bottom.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from blip2fast._imports import needs
from blip2fast.scenes.world import KINDS, Split

Floats = NDArray[np.floating]

# First sample of each filled-in form in scikit-learn's digits, and their end; see `handwriting`.
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
TRAIN_FORMS = slice(0, 9)
HELD_OUT_FORMS = slice(10, 14)


def shape_coverage(kind: NDArray[np.int64], u: Floats, v: Floats, radius: Floats) -> Floats:
    """Anti-aliased coverage of drawn shapes.

    Args:
        kind: [n], index into `KINDS["shapes"]`.
        u, v: [n, h, w], coordinates in units of the shape's radius.
        radius: [n], in pixels; it sets the width of the soft edge, one pixel.

    Returns:
        Coverage [n, h, w] in [0, 1].
    """
    distance = np.empty(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)
    for index, name in enumerate(KINDS["shapes"]):
        rows = kind == index
        distance[rows] = _DISTANCES[name](u[rows], v[rows])
    coverage = np.clip(0.5 - distance * radius[:, None, None], 0.0, 1.0)
    return coverage.astype(np.float32, copy=False)


def handwriting(split: Split) -> tuple[NDArray[np.float32], list[NDArray[np.int64]]]:
    """Handwritten digits for a split; training and the other splits have different writers.

    scikit-learn's digits are the test part of the UCI set: 1,797 digits written by 13 people on
    preprinted forms. Writers are not recorded, but the order reveals the forms: the labels repeat
    nearly the same sequence 14 times, starting at the indices in `FORM_STARTS`, and a digit's
    nearest neighbour is on the same form in 53 % of cases (chance: 7 %). The set is therefore split
    by form: the first nine are for training, the next is dropped (14 forms by 13 people, so
    adjacent forms may share a writer), and the last four (510 digits) are held out. This does not
    rule out a writer who returned after a pause.

    Returns:
        Digits [n, 8, 8] in [0, 1], and for each kind the rows that show it.
    """
    forms = TRAIN_FORMS if split == "train" else HELD_OUT_FORMS
    start, stop = FORM_STARTS[forms.start], FORM_STARTS[forms.stop]
    images, labels = _digits()
    chosen = labels[start:stop]
    rows = [np.flatnonzero(chosen == digit) for digit in range(len(KINDS["digits"]))]
    return images[start:stop], rows


def digit_coverage(digits: Floats, u: Floats, v: Floats) -> Floats:
    """Coverage of handwritten digits by bilinear interpolation of their 8x8 pixels.

    Args:
        digits: [n, 8, 8] in [0, 1].
        u, v: [n, h, w] coordinates in the digit's square.

    Returns:
        Coverage [n, h, w] in [0, 1]; 0 outside the square.
    """
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    side = digits.shape[-1]
    column = np.clip((u + 1) * side / 2 + 0.5, 0, side + 0.999)
    row = np.clip((v + 1) * side / 2 + 0.5, 0, side + 0.999)
    left, top = column.astype(np.int64), row.astype(np.int64)
    fraction_x, fraction_y = column - left, row - top
    n = np.arange(len(digits))[:, None, None]
    upper = padded[n, top, left] * (1 - fraction_x) + padded[n, top, left + 1] * fraction_x
    lower = padded[n, top + 1, left] * (1 - fraction_x) + padded[n, top + 1, left + 1] * fraction_x
    coverage = upper * (1 - fraction_y) + lower * fraction_y
    # The set's strokes are grey where a pen touched part of a block; full ink shows the colour.
    return np.minimum(coverage * 1.4, 1.0).astype(np.float32)


@cache
def _digits() -> tuple[Floats, NDArray[np.int64]]:
    with needs("draw handwritten digits", "sklearn"):
        from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


def _circle(u: Floats, v: Floats) -> Floats:
    return np.sqrt(u * u + v * v) - 1.0


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def _triangle(u: Floats, v: Floats) -> Floats:
    # Apex (0, -1), base corners (+-1, 0.8); the sides' unit normal is (1.8, -1) / 2.059.
    side = (1.8 * np.abs(u) - v - 1.0) / 2.059
    return np.maximum(side, v - 0.8)


def _cross(u: Floats, v: Floats) -> Floats:
    flat = np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.3)
    upright = np.maximum(np.abs(u) - 0.3, np.abs(v) - 1.0)
    return np.minimum(flat, upright)


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.25


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}
