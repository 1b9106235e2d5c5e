"""Defines scenes: their vocabulary, their objects, and the assignment of scenes to splits.

A scene is a grid of places, one or two of which hold an object; an object has a kind and a colour.
All scenes of a `SceneSpec` can be enumerated, so the three splits partition that list exactly,
independently of the seed:

    unseen_pairs   some object's colour-kind pair belongs to `SceneSpec.unseen_pairs`
    held_out       no unseen pair; chosen by a fixed hash of the content (`HELD_OUT_SHARE`)
    train          the rest
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Source = Literal["shapes", "digits"]
Split = Literal["train", "held_out", "unseen_pairs"]

SPLITS: tuple[Split, ...] = ("train", "held_out", "unseen_pairs")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.15),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "magenta": (1.0, 0.2, 1.0),
    "white": (1.0, 1.0, 1.0),
}
KINDS: dict[str, tuple[str, ...]] = {
    "shapes": ("circle", "square", "triangle", "cross", "ring"),
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
GRIDS: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    2: (("top", "bottom"), ("left", "right")),
    3: (("top", "middle", "bottom"), ("left", "centre", "right")),
}
# Three tenths leave 1,100 held-out scenes in the smallest world (shapes on a 2x2 grid).
HELD_OUT_SHARE = 0.3
ONE_OBJECT_SHARE = 0.25


class SceneObject(NamedTuple):
    """One object of a scene, in words."""

    colour: str
    kind: str
    place: str


class Contents(NamedTuple):
    """Scene contents as indices into the spec's words; a missing second object is -1.

    All arrays are int64 [n, 2], objects in the order of their places.
    """

    colour: NDArray[np.int64]
    kind: NDArray[np.int64]
    place: NDArray[np.int64]


@dataclass(frozen=True)
class SceneSpec:
    """The world that scenes are drawn from.

    Args:
        source: `"shapes"` (five drawn shapes) or `"digits"` (ten handwritten digits).
        image_size: side of the square image, in pixels, 32 to 48 in the embedded runs.
        grid: places per side, 2 or 3.
        noise: standard deviation of the Gaussian pixel noise; pixel values lie in [0, 1].

    Raises:
        ValueError: an unknown source or grid, or an image too small to tell kinds apart.
    """

    source: Source = "shapes"
    image_size: int = 32
    grid: int = 2
    noise: float = 0.04

    def __post_init__(self) -> None:
        if self.source not in KINDS:
            raise ValueError(f"source is {self.source!r}; choose one of {', '.join(KINDS)}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid is {self.grid}; choose 2 (four places) or 3 (nine places)")
        if self.image_size < 12 * self.grid:
            raise ValueError(
                f"image_size is {self.image_size}, which leaves less than 12 pixels for each of "
                f"{self.grid} places per side; use at least {12 * self.grid}"
            )
        if self.noise < 0:
            raise ValueError(f"noise is {self.noise}; a standard deviation is at least 0")

    @cached_property
    def colours(self) -> tuple[str, ...]:
        return tuple(COLOURS)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return KINDS[self.source]

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Places in reading order, e.g. `("top left", "top right", "bottom left", ...)`."""
        rows, columns = GRIDS[self.grid]
        return tuple(f"{row} {column}" for row in rows for column in columns)

    @cached_property
    def unseen_pairs(self) -> frozenset[tuple[str, str]]:
        """Colour-kind pairs that occur in no training scene or training text, one per kind."""
        count = len(self.colours)
        return frozenset((self.colours[i % count], kind) for i, kind in enumerate(self.kinds))

    def contents(self, split: Split) -> Contents:
        """Every scene content of a split, in a fixed order.

        Raises:
            ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        contents = _all_contents(len(self.colours), len(self.kinds), len(self.places))
        seen = np.ones((len(self.colours), len(self.kinds)), dtype=bool)
        for colour, kind in self.unseen_pairs:
            seen[self.colours.index(colour), self.kinds.index(kind)] = False
        all_seen = (seen[contents.colour, contents.kind] | (contents.place < 0)).all(axis=1)
        held_out = _unit_hash(contents) < HELD_OUT_SHARE
        chosen = {
            "train": all_seen & ~held_out,
            "held_out": all_seen & held_out,
            "unseen_pairs": ~all_seen,
        }[split]
        return Contents(*(array[chosen] for array in contents))


@dataclass(frozen=True)
class Scene:
    """The content of one image: its objects in the order of their places.

    Two scenes are equal if they contain the same objects, regardless of pixels.
    """

    spec: SceneSpec
    objects: tuple[SceneObject, ...]

    @property
    def has_unseen_pair(self) -> bool:
        return any((o.colour, o.kind) in self.spec.unseen_pairs for o in self.objects)


def scenes_of(spec: SceneSpec, contents: Contents) -> list[Scene]:
    """Convert index contents to words, one `Scene` per row."""
    rows = zip(*(array.tolist() for array in contents), strict=True)
    return [
        Scene(
            spec,
            tuple(
                SceneObject(spec.colours[c], spec.kinds[k], spec.places[p])
                for c, k, p in zip(colour, kind, place, strict=True)
                if p >= 0
            ),
        )
        for colour, kind, place in rows
    ]


def _all_contents(colours: int, kinds: int, places: int) -> Contents:
    """Every set of one or two objects in different places, one-object scenes first."""
    single = np.stack(
        np.meshgrid(np.arange(places), np.arange(colours), np.arange(kinds), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    first, second = np.meshgrid(np.arange(len(single)), np.arange(len(single)), indexing="ij")
    ordered = single[first, 0] < single[second, 0]
    pairs = np.stack([single[first[ordered]], single[second[ordered]]], axis=1)
    missing = np.full_like(single, -1)
    both = np.concatenate([np.stack([single, missing], axis=1), pairs])
    return Contents(colour=both[..., 1], kind=both[..., 2], place=both[..., 0])


def _unit_hash(contents: Contents) -> NDArray[np.float64]:
    """A fixed number in [0, 1) per content (splitmix64): the same in every NumPy release."""
    code = np.zeros(len(contents.place), dtype=np.uint64)
    for array in contents:
        for column in array.T:
            code = code * np.uint64(64) + (column + 1).astype(np.uint64)
    code = code + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        code = (code ^ (code >> np.uint64(shift))) * np.uint64(factor)
    code = code ^ (code >> np.uint64(31))
    return (code >> np.uint64(11)).astype(np.float64) / 2.0**53
