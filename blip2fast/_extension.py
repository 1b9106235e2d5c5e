"""The optional compiled library `blip2fast/_C.so`: C++ and, where nvcc was found, CUDA.

`setup.py` builds it from `csrc/` and writes `_C.txt` next to it, which states what was built or
why nothing was. Everything also works without it, more slowly.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
BUILD_NOTE = Path(__file__).with_name("_C.txt")
_BUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def _load(library: Path, note: Path) -> str:
    """Load the operators; returns why that failed, or an empty string."""
    if not library.exists():
        if note.exists():
            return note.read_text().strip()
        return f"the extension was not built: {_BUILD} (in a checkout, beside torch and g++)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} does not load beside torch {torch.__version__}: {error}"
    return ""


_WHY_NOT = _load(LIBRARY, BUILD_NOTE)


def has_op(name: str) -> bool:
    """Whether the operator `blip2fast_C::<name>` was compiled and loaded."""
    return not _WHY_NOT and hasattr(torch.ops.blip2fast_C, name)


def compiled_code() -> str:
    """Names the sources and the CUDA compiler of the library; an empty string without one.

    Builds of the same code on other machines have the same name.
    """
    if _WHY_NOT:
        return ""
    name = ctypes.CDLL(str(LIBRARY)).blip2fast_code
    name.restype = ctypes.c_char_p
    return str(name().decode())


def why_not(name: str | None = None) -> str:
    """Why the extension, or its operator `name`, is unavailable; an empty string if it is not."""
    if _WHY_NOT or name is None or has_op(name):
        return _WHY_NOT
    note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "rebuild the extension"
    return f"{LIBRARY.name} has no {name}: {note}"
