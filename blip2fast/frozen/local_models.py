"""What can be said of a model's name without transformers, whose import takes seconds."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


def not_found(what: str, name: object, why: Exception | str = "") -> str:
    """The error message for a model or tokenizer that cannot be loaded.

    Args:
        what: kind of model, such as "language model", or the configuration key that names it.
        name: folder or hub name.
        why: transformers' error; its first line is quoted.
    """
    message = (
        f"{what} {str(name)!r}: not found: give a local folder or a hub name that can be reached"
    )
    return f"{message} ({str(why).splitlines()[0]})" if str(why) else message


def check_local(key: str, name: str) -> str | None:
    """Why `name` can be no transformers model or tokenizer of this machine.

    Checks for a config file in a folder that exists. A path that does not exist is told from a name
    of the hub by a leading `.`, `~` or `/`, by two slashes, or by the runs beside it.

    Returns:
        The fault; None if it is a model's folder, or may be a name of the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / f).is_file() for f in ("config.json", "tokenizer_config.json")):
            return None
        return not_found(key, name, "the folder has no config.json")
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or ("/" in name and any(folder.parent.glob("*/config.yaml"))):
        near = _nearest(folder)
        return not_found(key, name, f"is it {near}?" if near else "")
    return None


def _nearest(folder: Path) -> Path | None:
    """A folder of a similar name beside one that does not exist."""
    try:
        beside = [each.name for each in folder.parent.iterdir() if each.is_dir()]
    except OSError:
        return None
    near = get_close_matches(folder.name, beside, 1)
    return folder.parent / near[0] if near else None
