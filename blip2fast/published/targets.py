"""Where a conversion may write."""

from __future__ import annotations

from pathlib import Path


def check_target(source: str, target: str | Path, to: str, overwrite: bool) -> None:
    """Refuse a target before anything is read.

    Args:
        source, target, to, overwrite: as `convert` takes them.

    Raises:
        ValueError: it is the source or holds it, exists without `overwrite`, or has a name that
            `to` does not read.
    """
    path = Path(target).expanduser()
    if to == "lavis" and path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: LAVIS reads a file; give it a name that ends with .pth")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"{path}: source and target are the same; give another target")
    if path.resolve() in Path(source).resolve().parents:
        raise ValueError(f"{path}: {source} lies in it and would be replaced; give another target")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; give another name, or --overwrite to replace it")
