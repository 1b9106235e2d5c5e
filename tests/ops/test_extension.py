"""The compiled library: builds, loads, and computes what PyTorch computes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2fast import _extension
from blip2fast.ops import philox

ROOT = Path(__file__).parents[2]
NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None

needs_extension = pytest.mark.skipif(bool(_extension.why_not()), reason=_extension.why_not())


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler on PATH")
def test_builds_and_is_up_to_date(tmp_path: Path) -> None:
    """A build now gives the library that these tests load (ninja compiles only what changed)."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    built = tmp_path / "blip2fast" / "_C.so"
    note = built.with_suffix(".txt").read_text()
    assert "failed" not in note
    assert built.exists(), note
    if shutil.which("nvcc"):
        assert "without CUDA" not in note
    assert built.read_bytes() == _extension.LIBRARY.read_bytes(), (
        "blip2fast/_C.so is older than csrc/: python setup.py build_ext --inplace"
    )


@needs_extension
def test_loads() -> None:
    assert _extension.has_op("philox_keep_mask")
    assert _extension.why_not("philox_keep_mask") == ""
    assert not _extension.has_op("no_such_op")
    assert "has no no_such_op: extension built with" in _extension.why_not("no_such_op")


def test_why_a_library_does_not_load(tmp_path: Path) -> None:
    library, note = tmp_path / "_C.so", tmp_path / "_C.txt"
    assert "was not built: pip install --no-build-isolation" in _extension._load(library, note)
    note.write_text("extension not built: no ninja\n")
    assert _extension._load(library, note) == "extension not built: no ninja"
    library.write_bytes(b"no library")
    assert "_C.so does not load beside torch" in _extension._load(library, note)


@needs_extension
@pytest.mark.parametrize(
    ("rows", "heads", "columns", "first"),
    [
        (37, 3, 257, 0),
        (5, 12, 64, 3),
        (400, 2, 15, 2),
        (3, 1, 1, 5),
        (2, 1, 1500, 1),
        (0, 2, 7, 0),
        (4, 4, 0, 0),
    ],
)
def test_philox_keep_mask_is_the_function_of_ops_philox(
    rows: int, heads: int, columns: int, first: int
) -> None:
    state = philox.philox_state(2**63 - 12345, 2**32 - 7)
    row = torch.randint(0, 2**32, (1, rows))
    head = torch.randint(0, 2**32, (heads, 1))
    least = philox.threshold(0.3)
    expected = philox._keep(state, least, row[..., None], head[..., None], columns, first)
    assert philox.keep_mask(state, 0.3, row, head, columns, first).equal(expected)
    flat = [x.flatten().contiguous() for x in torch.broadcast_tensors(row, head)]
    chunked = philox._keep_in_chunks(state, least, *flat, columns, first)
    assert chunked.view(expected.shape).equal(expected)


@needs_extension
def test_philox_keep_mask_passes_opcheck() -> None:
    state, rows = philox.philox_state(3, 1), torch.arange(5)
    arguments = (state, rows, rows + 1, 1 << 30, 9, 2)
    torch.library.opcheck(torch.ops.blip2fast_C.philox_keep_mask, arguments)


@needs_extension
def test_philox_keep_mask_rejects_what_it_would_misread() -> None:
    op, rows = torch.ops.blip2fast_C.philox_keep_mask, torch.arange(4)
    state = philox.philox_state(3, 1)
    with pytest.raises(RuntimeError, match="rows: expected contiguous int64"):
        op(state, rows.int(), rows, 0, 4, 0)
    with pytest.raises(RuntimeError, match="one shape"):
        op(state, rows, rows[:2], 0, 4, 0)
    with pytest.raises(RuntimeError, match="philox: expected 2 elements, got 1"):
        op(state[:1], rows, rows, 0, 4, 0)
