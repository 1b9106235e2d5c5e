"""A pytest plugin that patches transformers' models in its own tests, and a comparison of runs.

pytest -p peer_patching --patch-models construction --junit-xml patched.xml ...
python tools/peer_patching.py unpatched.xml patched.xml...
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from blip2fast import patch

WHEN = ("never", "construction", "loading")
# models that were patched, and why others were not
patched: Counter[str] = Counter()
refused: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--patch-models", choices=WHEN, default="never", help="see tools/peer_tests.sh"
    )
    parser.addoption(
        "--supply",
        action="append",
        default=[],
        metavar="MODULE.NAME",
        help="what another version's tests import and transformers lacks: a function, always False",
    )


def pytest_configure(config: pytest.Config) -> None:
    from transformers import PreTrainedModel

    for name in config.getoption("--supply"):
        supply(name)
    when = config.getoption("--patch-models")
    if when == "construction":
        post_init = PreTrainedModel.post_init

        def post_init_and_patch(self: Any) -> None:
            post_init(self)
            _patch(self)

        PreTrainedModel.post_init = post_init_and_patch
    elif when == "loading":
        load: Callable[..., Any] = PreTrainedModel.from_pretrained.__func__

        def load_and_patch(cls: Any, *args: Any, **kwargs: Any) -> Any:
            found = load(cls, *args, **kwargs)
            _patch(found[0] if isinstance(found, tuple) else found)
            return found

        PreTrainedModel.from_pretrained = classmethod(load_and_patch)


def supply(name: str) -> None:
    """Make `MODULE.NAME` importable where transformers lacks it, by a function, always False."""
    place, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError:
        module = sys.modules[place] = ModuleType(place)
    if hasattr(module, attribute):
        raise pytest.UsageError(f"--supply {name}: transformers has it")
    # the tests execute transformers/__init__.py again: a new lazy module, of the same class
    holder = module if type(module) is ModuleType else type(module)
    setattr(holder, attribute, staticmethod(_false))


def _false(*_: Any, **__: Any) -> bool:
    return False


def _patch(model: Any) -> None:
    """Patch a model that holds transformers' Q-Formers; a Q-Former by itself cannot be replaced."""
    from blip2fast.qformer.patching import _ORIGINALS, _patched

    if isinstance(model, _ORIGINALS) or _patched(model):
        return
    if any(isinstance(module, _ORIGINALS) for module in model.modules()):
        try:
            patch(model)
        except ValueError as error:
            refused[f"{type(model).__name__}: {error}"] += 1
        else:
            patched[type(model).__name__] += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["patching"] = [dict(patched), dict(refused)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for counts, more in zip(
        (patched, refused), getattr(node, "workeroutput", {}).get("patching", ()), strict=False
    ):
        counts.update(more)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"models patched: {patched.total()}, refused: {refused.total()}")
    for reason, count in refused.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")


def outcomes(path: Path) -> dict[str, str]:
    """Whether each test of a run passed, failed or was skipped."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = min(kinds) if kinds else "passed"
    return found


def compare(unpatched: Path, runs: list[Path]) -> bool:
    """Print how each run differs from the unpatched one; returns whether any does."""
    truth, differs = outcomes(unpatched), False
    print(f"== unpatched: {dict(Counter(truth.values()))}")
    for path in runs:
        found = outcomes(path)
        print(f"== patched, {path.stem}: {dict(Counter(found.values()))}")
        for name in sorted(truth.keys() | found.keys()):
            before, after = truth.get(name, "absent"), found.get(name, "absent")
            if before != after:
                differs = True
                print(f"{name}: {before} unpatched, {after} patched")
    print("== they differ" if differs else "== no test differs")
    return differs


if __name__ == "__main__":
    first, *others = map(Path, sys.argv[1:])
    sys.exit(compare(first, others))
