"""Pictures from JPEG files to a batch: the loader and the feature cache against bare loops.

All make the same normalised pixels [B, 3, 224, 224] of the whole picture. The loader decodes large
JPEGs at a half or a quarter of their size, so that its pixels differ by a few levels, which the
check allows for as a mean. The feature cache gives tokens instead, and those it was given are
expected. Results have images a second. With workers, starting them is timed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pytest
import torch
from comparing import Contender, plain
from PIL import Image
from run_files import write_pictures
from shapes import PICTURE_SHAPES, PictureShape, cells
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import CachedImages, FileImages
from blip2fast.data.records import CaptionRecord
from blip2fast.frozen.images import CLIP_MEAN, CLIP_STD, ImageTransform

SIZE = 224


class Loop(Dataset[Tensor]):
    """The loop that one writes without a library."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.paths = [folder / name for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        image = Image.open(self.paths[number]).convert("RGB")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(
            CLIP_STD
        )
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class TorchvisionLoop(Loop):
    """The same by torchvision's transforms."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(folder, names)
        from torchvision import transforms

        self.transform = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(CLIP_MEAN, CLIP_STD),
            ]
        )

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(Image.open(self.paths[number]).convert("RGB"))


@dataclass
class NoTexts:
    """The loader's texts, of which there are none here."""

    def __call__(self, records: Sequence[Any], batch: Any) -> dict[str, Tensor]:
        return {}


def planned(names: Sequence[str], images: Any, batch: int) -> PlannedBatches[Any]:
    """The loader of a run on these pictures."""
    records = [CaptionRecord(name, ("a picture",)) for name in names]
    return PlannedBatches(records, BatchPlan(len(names), batch, 0), images, NoTexts())


class Epoch(NamedTuple):
    """What the loader gave, and the records in its order."""

    found: Tensor
    drawn: np.ndarray[Any, np.dtype[np.int64]]


def epoch(batches: PlannedBatches[Any], name: str, count: int, workers: int) -> Epoch:
    """An epoch of the loader, in its own order."""
    loader: Any = DataLoader(batches, batch_size=None, sampler=range(count), num_workers=workers)
    found = torch.cat([batch[name] for batch in loader])
    return Epoch(found, np.concatenate([batches.plan.batch(step).indices for step in range(count)]))


def in_order(given: Epoch) -> Tensor:
    """In the order of the records, which the loops have from the start."""
    return given.found[torch.from_numpy(np.argsort(given.drawn))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """Pictures of a shape, written once."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def of(name: str) -> tuple[Path, list[str]]:
        if name not in made:
            folder, shape = tmp_path_factory.mktemp(name), PICTURE_SHAPES[name]
            made[name] = folder, write_pictures(folder, shape.count, shape.width, shape.height)
        return made[name]

    return of


def loop_batches(
    kind: type[Loop], folder: Path, names: Sequence[str], batch: int, workers: int
) -> Callable[[Any], Tensor]:
    """A call that reads all pictures by a loop."""

    def run(_: Any) -> Tensor:
        loader: Any = DataLoader(kind(folder, names), batch, num_workers=workers)
        return torch.cat(list(loader))

    return run


def add_rates(benchmark: Any, count: int) -> None:
    """Images a second beside the times."""
    for result in benchmark.extra_info.get("contenders", {}).values():
        if "median_s" in result:
            result["images_per_s"] = count / result["median_s"]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("name", cells(PICTURE_SHAPES))
def bench_loader(
    name: str,
    workers: int,
    folders: Callable[[str], tuple[Path, list[str]]],
    compare: Callable[..., None],
    conditions: dict[str, Any],
    benchmark: Any,
) -> None:
    shape = PICTURE_SHAPES[name]
    folder, names = folders(name)
    files = FileImages(folder, ImageTransform(SIZE), 0)
    expected = torch.stack([Loop(folder, names)[number] for number in range(shape.count)])

    def ours(_: Any) -> Epoch:
        batches = planned(names, files, shape.batch)
        return epoch(batches, "images", shape.count // shape.batch, workers)

    def agree(_: Any, pixels: Tensor) -> None:
        # of 255 levels; a level is about 1 / (255 * 0.27)
        levels = (pixels - expected).abs().mean() * 255 * 0.27
        assert levels < 2, f"pixels differ by {levels:.2f} levels on average"

    def torchvision(_: Any) -> Contender:
        if find_spec("torchvision") is None:
            raise ModuleNotFoundError("torchvision is not installed")
        return plain(loop_batches(TorchvisionLoop, folder, names, shape.batch, workers))(None)

    providers: dict[str, Callable[[Any], Contender]] = {
        "blip2fast": lambda _: Contender({"": lambda: ours(None)}, in_order, False),
        "PIL loop": plain(loop_batches(Loop, folder, names, shape.batch, workers)),
        "torchvision": torchvision,
    }
    conditions["pillow"] = PIL.__version__
    compare(providers, lambda seed: None, agree, rounds=3)
    add_rates(benchmark, shape.count)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("name", cells(PICTURE_SHAPES))
def bench_feature_cache(
    name: str,
    workers: int,
    folders: Callable[[str], tuple[Path, list[str]]],
    compare: Callable[..., None],
    conditions: dict[str, Any],
    benchmark: Any,
) -> None:
    """The rival makes pixels, of which an encoder would still have to make tokens."""
    shape = PICTURE_SHAPES[name]
    folder, names = folders(name)
    cache = write_cache(folder / "cache", names, shape)
    pixels = torch.stack([Loop(folder, names)[number] for number in range(shape.count)])

    def ours(_: Any) -> Epoch:
        batches = planned(names, CachedImages(cache), shape.batch)
        return epoch(batches, "image_embeds", shape.count // shape.batch, workers)

    def agree(_: Any, found: Tensor) -> None:
        expected = pixels if found.ndim == 4 else cache.read(range(shape.count))
        assert torch.equal(found, expected), "other pixels or rows"

    providers = {
        "blip2fast": lambda _: Contender({"": lambda: ours(None)}, in_order, False),
        "PIL loop, pixels": plain(loop_batches(Loop, folder, names, shape.batch, workers)),
    }
    conditions["pillow"] = PIL.__version__
    compare(providers, lambda seed: None, agree, rounds=3)
    add_rates(benchmark, shape.count)


def write_cache(folder: Path, names: list[str], shape: PictureShape) -> FeatureCache:
    """A cache of random tokens, as many and as wide as a real encoder's in the larger shapes."""
    if not folder.exists():
        draws = torch.Generator().manual_seed(0)
        with FeatureCache.create(
            folder, names, shape.tokens, shape.width_of_tokens, "bfloat16"
        ) as to:
            for row in range(len(names)):
                size = (1, shape.tokens, shape.width_of_tokens)
                to.write(row, torch.randn(size, generator=draws))
    return FeatureCache(folder)
