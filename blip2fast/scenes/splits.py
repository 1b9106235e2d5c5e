"""Splits of rendered scenes, and their caption and question records."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blip2fast._imports import needs
from blip2fast.scenes import text
from blip2fast.scenes.rendering import render, stream
from blip2fast.scenes.world import (
    ONE_OBJECT_SHARE,
    SPLITS,
    Contents,
    Scene,
    SceneSpec,
    Split,
    scenes_of,
)

with needs("save scenes", "PIL"):
    from PIL import Image


@dataclass(frozen=True)
class SceneSplit:
    """Rendered scenes of one split; create it with `make_split`.

    Attributes:
        images: uint8 [n, 3, h, w].
        masks: bool [n, 2, h, w]; `masks[i, j]` are the pixels of `scenes[i].objects[j]`.
        scenes: what each image shows.
        keys: one file name per image, the same in records and feature caches.
    """

    spec: SceneSpec
    split: Split
    seed: int
    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    scenes: list[Scene]
    keys: list[str]

    def caption_records(self, per_scene: int = 4) -> list[dict[str, object]]:
        """`{"image": key, "captions": [...]}` for every scene, up to `per_scene` paraphrases."""
        rng = self._text_stream("captions")
        return [
            {"image": key, "captions": text.captions(scene, per_scene, rng)}
            for key, scene in zip(self.keys, self.scenes, strict=True)
        ]

    def question_records(self, rounds: int = 1) -> list[dict[str, str]]:
        """`{"image", "question", "answer", "type"}`; `rounds` questions per scene and type."""
        rng = self._text_stream("questions")
        return [
            {"image": key, **question._asdict()}
            for key, scene in zip(self.keys, self.scenes, strict=True)
            for _ in range(rounds)
            for question in text.questions(scene, rng)
        ]

    def caption_pairs(self) -> list[tuple[str, str]]:
        """For every scene a true caption and its hard negative (one attribute swapped)."""
        rng = self._text_stream("pairs")
        return [text.caption_pair(scene, rng) for scene in self.scenes]

    def write_images(self, folder: Path | str) -> None:
        """Write every image as `<folder>/<key>`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for key, image in zip(self.keys, self.images, strict=True):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / key)

    def _text_stream(self, name: str) -> random.Random:
        return random.Random(f"{name}-{self.split}-{self.seed}")


def make_split(spec: SceneSpec, split: Split, count: int, seed: int = 0) -> SceneSplit:
    """Draw and render `count` scenes of a split.

    Training scenes are sampled with replacement (the same content recurs with other pixels). Scenes
    of the other splits are distinct in content, so retrieval among them has a unique answer. The
    first scenes of a split do not depend on `count`.

    Raises:
        ValueError: an unknown split, `count < 1`, or more scenes than the split has.
    """
    contents = spec.contents(split)
    if count < 1:
        raise ValueError(f"count is {count}; a split holds at least 1 scene")
    available = len(contents.place)
    if split != "train" and count > available:
        raise ValueError(
            f"count is {count}, but split {split!r} has {available} different scenes with "
            f"source={spec.source!r}, grid={spec.grid}; ask for fewer, or use a 3x3 grid"
        )
    split_index = SPLITS.index(split)
    chosen = _draw(contents, split, count, stream("contents", split_index, seed))
    drawn = Contents(*(array[chosen] for array in contents))
    images, masks = render(spec, drawn, split, split_index, seed)
    return SceneSplit(
        spec=spec,
        split=split,
        seed=seed,
        images=images,
        masks=masks,
        scenes=scenes_of(spec, drawn),
        keys=[f"{split}-{index:05d}.png" for index in range(count)],
    )


def _draw(
    contents: Contents, split: Split, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw rows of `contents`; one object with probability `ONE_OBJECT_SHARE` while any remain."""
    single = contents.place[:, 1] < 0
    weights = np.where(
        single, ONE_OBJECT_SHARE / max(single.sum(), 1), (1 - ONE_OBJECT_SHARE) / (~single).sum()
    )
    if split == "train":
        bounds = np.cumsum(weights / weights.sum())
        rows = np.searchsorted(bounds, rng.random(count), side="right")
        return np.minimum(rows, len(weights) - 1)
    # Exponential keys over weights: sampling without replacement in one sort.
    return np.argsort(rng.exponential(size=len(weights)) / weights, kind="stable")[:count]
