"""tools/peer_tests.sh on a stand-in for a checkout of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"

pytestmark = pytest.mark.slow

TESTS = """
import torch
from qformer_holders import build
from transformers import Blip2QFormerModel, Blip2VisionModelWithProjection

NAME = "Blip2VisionModelWithProjection"


def test_a_model_that_is_built():
    model, inputs = build(NAME)
    assert model(**inputs).image_embeds.isfinite().all()


def test_a_model_that_is_loaded(tmp_path):
    model, inputs = build(NAME)
    model.save_pretrained(tmp_path)
    loaded = Blip2VisionModelWithProjection.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)


def test_a_failure_of_their_own():
    assert False


def test_the_class_of_what_is_loaded(tmp_path):
    build(NAME)[0].save_pretrained(tmp_path)
    loaded = Blip2VisionModelWithProjection.from_pretrained(tmp_path)
    assert isinstance(loaded.qformer, Blip2QFormerModel)
"""


def checkout(folder: Path, version: str) -> Path:
    (folder / "src" / "transformers").mkdir(parents=True)
    (folder / "src" / "transformers" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (folder / "tests" / "models" / "blip_2").mkdir(parents=True)
    (folder / "tests" / "models" / "blip_2" / "test_modeling_blip_2.py").write_text(TESTS)
    return folder


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(SUPPORT)} | more
    command = ["sh", str(ROOT / "tools" / "peer_tests.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_differs_is_printed(tmp_path: Path) -> None:
    found = run(checkout(tmp_path, transformers.__version__))
    assert found.returncode == 1, found.stderr
    lines = found.stdout.splitlines()
    assert "models patched: 0, refused: 0" in lines
    assert "models patched: 5, refused: 0" in lines  # built, and built again to be loaded
    assert "models patched: 2, refused: 0" in lines
    assert "== unpatched: {'passed': 3, 'failure': 1}" in lines
    (start,) = (i for i, line in enumerate(lines) if line.startswith("== unpatched"))
    differing = [line for line in lines[start:] if not line.startswith("==")]
    name = "tests.models.blip_2.test_modeling_blip_2::test_the_class_of_what_is_loaded"
    assert differing == [f"{name}: passed unpatched, failure patched"] * 2
    assert lines[-1] == "== they differ"


def test_no_difference(tmp_path: Path) -> None:
    found = run(checkout(tmp_path, transformers.__version__), "-k", "not class")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "== no test differs"


def test_tests_of_another_version(tmp_path: Path) -> None:
    """They run on the installed package; what it lacks and they import is supplied."""
    there = checkout(tmp_path / "old", "4.0.0")
    (there / "tests" / "models" / "blip_2" / "test_modeling_blip_2.py").write_text(
        """
from pathlib import Path

import transformers
from transformers import GonePipeline
from transformers.gone import Gone
from transformers.utils import is_gone

SOURCE = Path(__file__).parents[3] / "src" / "transformers"


def test_names_and_source():
    assert not (GonePipeline() or Gone() or is_gone())
    assert SOURCE.samefile(transformers.__path__[0])
"""
    )
    names = ("transformers.GonePipeline", "transformers.gone.Gone", "transformers.utils.is_gone")
    supplied = [part for name in names for part in ("--supply", name)]
    kept = tmp_path / "kept"
    found = run(there, *supplied, ALLOW_OTHER_VERSION="1", RESULTS=str(kept))
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert f"transformers {transformers.__version__}, tests of 4.0.0" in lines
    assert "== unpatched: {'passed': 1}" in lines
    assert {path.name for path in kept.iterdir()} == {
        f"{when}.xml" for when in ("never", "construction", "loading")
    }


def test_refusals(tmp_path: Path) -> None:
    assert "usage: tools/peer_tests.sh CHECKOUT" in run().stderr
    assert "has no tests/models: give a clone" in run(tmp_path).stderr
    other = run(checkout(tmp_path / "old", "4.0.0"))
    assert other.returncode == 2
    assert f"checkout v{transformers.__version__}" in other.stderr
