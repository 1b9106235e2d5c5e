"""Models and tokenizers given as a local folder or a hub name."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from blip2fast.frozen.local_models import check_local, not_found

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
# of a snapshot: configurations, tokenizers and weights, each once
_READ = ["*.json", "*.txt", "*.model", "*.safetensors"]


def check_pretrained(key: str, name: str) -> str | None:
    """Why the transformers model or tokenizer `name` cannot be loaded; None if it can be.

    Checks for a config file in a local folder; looks up any other name on the hub or in its local
    cache.
    """
    fault = check_local(key, name)
    if fault is not None or Path(name).expanduser().is_dir():
        return fault
    try:
        cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        return not_found(key, name, error)
    return None


def lasting_name(name: str) -> tuple[str, str | None]:
    """A name under which a model is found from any working folder, and its revision on the hub.

    Args:
        name: folder or hub name.

    Returns:
        The absolute path of a file or folder, and None; or the hub name and the commit that the
        local cache holds of it, None if it holds none.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path.absolute()), None
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return name, None
    snapshot = None if found is None else Path(found).parent
    cached = snapshot is not None and snapshot.parent.name == "snapshots"
    return name, snapshot.name if snapshot is not None and cached else None


def at_revision(name: str, revision: str | None) -> str:
    """A model of the hub as it was at a commit: a folder of the local cache, downloaded if needed.

    Args:
        name: folder or hub name.
        revision: the commit; None: `name` as it is.

    Raises:
        ValueError: neither in the cache nor reachable.
    """
    if revision is None or Path(name).expanduser().exists():
        return name
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=_READ))
    except (OSError, ValueError) as error:
        raise ValueError(not_found("model", f"{name} at revision {revision}", error)) from error


def check_weights(key: str, name: str) -> str | None:
    """Like `check_pretrained`; a local folder must also contain weights."""
    folder = Path(name).expanduser()
    fault = check_pretrained(key, name)
    if fault is None and folder.is_dir() and not any(any(folder.glob(w)) for w in _WEIGHTS):
        return f"{key} {name!r}: a config but no weights ({', '.join(_WEIGHTS)}) in this folder"
    return fault
