"""Beyond 2^31 pairs of images and texts: the CUDA kernels' last blocks, on the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from extension_build import ROOT, needs_compiler

pytestmark = needs_compiler

# a file of csrc/, what is there, the same in 32 bits
FAULTS = {
    "mma.sync": (
        "itc_similarity.h",
        "p.sim[(image - p.begin) * p.texts + text]",
        "p.sim[static_cast<int>((image - p.begin) * p.texts + text)]",
    ),
    "wgmma": (
        "itc_similarity_sm90.h",
        "const int64_t at = (image - p.begin) * p.texts + text;",
        "const int at = (image - p.begin) * p.texts + text;",
    ),
    "wgmma's texts": (
        "itc_similarity_sm90.h",
        "p.text + next_text * p.text_row + d",
        "p.text + static_cast<int>(next_text * p.text_row) + d",
    ),
    "rows": (
        "itc_statistics.h",
        "(image - p.begin) * p.texts;\n  const PhiloxKey",
        "static_cast<int>((image - p.begin) * p.texts);\n  const PhiloxKey",
    ),
    "gradients": (
        "itc_pairs.h",
        "const int64_t at = (image - p.begin) * p.texts + text;",
        "const int at = (image - p.begin) * p.texts + text;",
    ),
    "parts of the texts' gradient": (
        "itc_pairs.h",
        "p.d_text_parts + (own.split * p.texts + text) * p.dim + d",
        "p.d_text_parts + static_cast<int>((own.split * p.texts + text) * p.dim + d)",
    ),
}


def _run(folder: Path) -> int:
    compiler = shutil.which("g++") or shutil.which("clang++")
    include = [f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'ops'}"]
    source = str(ROOT / "tests" / "ops" / "emulated_itc_far.cpp")
    flags = ["-std=c++17", "-O1", "-DBLIP2FAST_EMULATED", *include]
    subprocess.run([str(compiler), *flags, source, "-o", "far"], cwd=folder, check=True)
    status = subprocess.run([folder / "far"], check=False).returncode
    if status == 77:
        pytest.skip("the machine does not lend 30 GB of addresses")
    return status


def test_last_blocks(tmp_path: Path) -> None:
    assert _run(tmp_path) == 0


@pytest.mark.parametrize("name", FAULTS)
def test_it_sees_32_bits(name: str, tmp_path: Path) -> None:
    """Every header is copied, since they include one another from their own folder first."""
    file, old, new = FAULTS[name]
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, tmp_path)
    source = (tmp_path / file).read_text()
    assert source.count(old) == 1, f"{file} has this {source.count(old)} times: {old}"
    (tmp_path / file).write_text(source.replace(old, new))
    assert _run(tmp_path) != 0
