"""What a command was given, looked at before torch is imported, which takes seconds.

The rooms check the same and more once they are imported; a mistyped path is told here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from blip2fast.data.source_config import HUB, check_source
from blip2fast.frozen.local_models import check_local


def is_alone() -> bool:
    """Whether this is no process of several, which agree on what they tell."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def check_models(**names: str | None) -> None:
    """Refuse a model that cannot be there.

    Args:
        names: folder or hub name by what messages call it; None: not given.

    Raises:
        ValueError: a path that does not exist; names what is like it.
    """
    for key, name in names.items():
        if name is None:
            continue
        path, what = Path(name).expanduser(), key.replace("_", " ")
        if path.is_file() and path.suffix not in (".pth", ".pt"):  # a file of LAVIS
            raise ValueError(f"{what} {name!r} is a file; give the folder of a model")
        if path.is_dir() and not (path / "config.yaml").is_file():
            runs = sorted(each.parent.name for each in path.glob("*/config.yaml"))
            if runs:
                raise ValueError(f"{what} {name!r} holds runs; give one: {', '.join(runs)}")
        # what else a folder holds is for the room to say: a checkpoint, transformers', LAVIS's
        if path.exists():
            continue
        fault = check_local(what, name)
        if fault is not None:
            raise ValueError(fault)


def check_records(*sources: str) -> None:
    """Refuse a source of records that is not there.

    Raises:
        ValueError: names it.
    """
    for source in sources:
        if not source.startswith(HUB):
            check_source(source)


def check_folder(option: str, path: str | Path | None) -> None:
    """Refuse what should be a folder to read; None: not given.

    Raises:
        ValueError: names the option.
    """
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"{option} {path}: not a folder")


def check_output_folder(option: str, path: Path) -> None:
    """Refuse a file where a folder is to be written.

    Raises:
        ValueError: names the option.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path} is a file; give a folder")


def check_file(option: str, path: str | Path | None) -> None:
    """Refuse what should be a file to read; None: not given.

    Raises:
        ValueError: names the option.
    """
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{option} {path}: no such file")


def check_pictures(paths: Sequence[str]) -> None:
    """Refuse files and folders that are not there, or hold neither pictures nor a feature cache.

    Raises:
        ValueError: names the path.
    """
    from blip2fast.inference.picture_files import find_pictures

    if len(paths) > 1 or not Path(paths[0], "keys.json").is_file():
        find_pictures(paths, recursive=True)
