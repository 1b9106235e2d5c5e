"""Picture files for commands: finds them, and reads them ahead of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from blip2fast.data.layouts import IMAGE_SUFFIXES
from blip2fast.frozen.pictures import load_image

if TYPE_CHECKING:
    from torch import Tensor

    from blip2fast.inference.inputs import Transform

Item = TypeVar("Item")
Value = TypeVar("Value")


def find_pictures(paths: Sequence[str | Path], recursive: bool = False) -> list[Path]:
    """The picture files of folders and files, sorted within a folder, each once.

    Args:
        paths: files, taken as they are, and folders, of which files with a picture's suffix are.
        recursive: also folders below; hidden ones are passed over.

    Raises:
        ValueError: a path that does not exist, or a folder without pictures.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"image {path}: no such file or folder")
        if not path.is_dir():
            found[path] = None
            continue
        here = sorted(_files(path, recursive))
        if not here:
            more = "" if recursive else "; --recursive looks into folders below"
            raise ValueError(f"{path}: no pictures in this folder{more}")
        found.update(dict.fromkeys(here))
    return list(found)


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if recursive and not each.startswith(".")]
        for each in files:
            if each[0] != "." and Path(each).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(name, each)


@dataclass(frozen=True)
class Read(Generic[Item, Value]):
    """A picture that was read, or why it could not be.

    Attributes:
        item: what was asked for.
        pixels: what `load` gave; None if it could not be read.
        fault: the reason then, one line.
    """

    item: Item
    pixels: Value | None
    fault: str = ""


def read_ahead(
    items: Iterable[Item],
    load: Callable[[Item], Value],
    batch_size: int,
    workers: int = 4,
) -> Iterator[list[Read[Item, Value]]]:
    """Read pictures by threads, a batch ahead of the one that is worked on.

    Args:
        items: what names the pictures.
        load: reads one; raises ValueError or OSError for one that cannot be read.
        batch_size: pictures of a batch, whether they can be read or not.
        workers: threads.
    """
    left = iter(items)
    with ThreadPoolExecutor(workers) as pool:

        def submit() -> list[tuple[Item, Future[Value]]]:
            return [(item, pool.submit(load, item)) for item in islice(left, batch_size)]

        ahead = submit()
        while ahead:
            batch, ahead = ahead, submit()
            yield [_result(item, future) for item, future in batch]


def _result(item: Item, future: Future[Value]) -> Read[Item, Value]:
    try:
        return Read(item, future.result())
    except (ValueError, OSError) as error:
        return Read(item, None, " ".join(str(error).split()) or repr(error))


def load_with(transform: Transform) -> Callable[[Path], Tensor]:
    """Reads and transforms a picture file."""

    def load(path: Path) -> Tensor:
        return transform(load_image(path))

    return load
