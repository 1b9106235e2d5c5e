"""Builds parts of the extension for tests; ninja compiles only what changed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import compilers  # noqa: E402

BUILD = compilers.BUILD
BUILD.mkdir(parents=True, exist_ok=True)
LOCK = FileLock(BUILD / "lock")  # test processes run side by side

NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler on PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def build_extension(folder: Path) -> Path:
    """Build what an install would, into `folder`."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    with LOCK:
        subprocess.run(command, cwd=ROOT, check=True)
    return folder / "blip2fast" / "_C.so"


def build_target(name: str) -> Path:
    """Build one target of csrc/rules.ninja; `build_extension` comes first."""
    with LOCK:
        assert compilers.build(name)
    return BUILD / name


def module_again(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of a module, for what it finds out where it is imported."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    return copy
