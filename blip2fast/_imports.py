"""Lazy imports, and error messages for missing optional packages."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

# import name -> package to install, where the two differ
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@contextmanager
def needs(purpose: str, *packages: str) -> Iterator[None]:
    """Context manager around imports of optional packages.

    Args:
        purpose: what they are needed for, such as "read records".
        packages: their import names.

    Raises:
        ModuleNotFoundError: a package is not installed; says how to install it.
    """
    for package in packages:
        if find_spec(package) is None:
            distribution = _DISTRIBUTIONS.get(package, package)
            raise ModuleNotFoundError(
                f"blip2fast needs {distribution} to {purpose}, and it is not installed: "
                f"pip install {distribution}",
                name=package,
            )
    yield


def lazy(
    package: str, names: Mapping[str, str], modules: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports its names on first use (PEP 562).

    Args:
        package: its `__name__`.
        names: its public names, each mapped to the submodule that defines it.
        modules: submodules that are also imported on first use as attributes.
    """

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *modules})

    return get, listed
