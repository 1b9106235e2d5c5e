"""csrc/compilers.py: which compilers it finds, and what it runs where there is no ninja."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from extension_build import BUILD, ROOT, build_extension, compilers, needs_compiler


def _nvcc(folder: Path, release: str) -> str:
    """A stand-in that says its version."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without nvcc, and the folder that its site-packages are in."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setattr(compilers, "USUAL", tmp_path / "usual")
    site = str(tmp_path / "site-packages")
    monkeypatch.setattr(sys, "path", [site])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"platlib": site, "purelib": site})
    return tmp_path


def test_finds_nvcc_where_it_usually_is(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last place first: each further one goes before."""
    assert compilers.find_nvcc("13.0") == (
        "",
        "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda: pip install nvidia-cuda-nvcc",
    )
    for folder in ("site-packages/nvidia/cu13/bin", "usual", "path", "home/bin"):
        nvcc = _nvcc(bare / folder, "13.0")
        if folder == "path":
            monkeypatch.setenv("PATH", f"{bare / folder}:/bin")
        if folder == "home/bin":
            monkeypatch.setenv("CUDA_HOME", str(bare / "home"))
        assert compilers.find_nvcc("13.0") == (nvcc, "")


def test_nvcc_is_of_torchs_cuda(bare: Path) -> None:
    old = _nvcc(bare / "usual", "12.4")
    assert compilers.find_nvcc("12.8") == (old, "")
    assert compilers.find_nvcc(None) == (old, "")  # a torch for the CPU fits any
    missing = f"{old} is of CUDA 12.4, torch of CUDA 13.0"
    assert compilers.find_nvcc("13.0") == ("", missing)
    new = _nvcc(bare / "site-packages" / "nvidia" / "cu13" / "bin", "13.0")
    assert compilers.find_nvcc("13.0") == (new, "")


def test_torch_is_found_where_a_build_of_its_own_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pip builds in an environment without torch, but installs beside one."""
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    assert compilers.installed("torch") == Path(torch.__file__).parent
    assert compilers.installed("no_such_package") is None


def test_without_torch_it_says_how_to_build(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    library, note = compilers.build_library()
    assert library is None
    assert note == (
        "extension not built: no torch beside setup.py: pip install --no-build-isolation ."
    )


def _targets(rules: compilers.WithoutNinja, target: str) -> set[str]:
    needed = set().union(*(_targets(rules, name) for name in rules.needs(target)))
    return needed | ({target} if rules.needs(target) else set())


@needs_compiler
@pytest.mark.parametrize(
    "target", ["host/_C.so", "cuda/_C.so", "emulated/_C.so", "python/_block_stream.so"]
)
def test_commands_without_ninja_are_ninjas(tmp_path: Path, target: str) -> None:
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if ninja is None:
        pytest.skip("no ninja to compare with")
    build_extension(tmp_path)  # writes build.ninja
    command = [ninja, "-C", str(BUILD), "--quiet", "-t", "commands", target]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rules = compilers.WithoutNinja(BUILD)
    ours = {rules.command(name) for name in _targets(rules, target)}
    assert ours == set(run.stdout.splitlines())


@needs_compiler
def test_builds_without_ninja(tmp_path: Path) -> None:
    build_extension(tmp_path / "with")
    shutil.copy(BUILD / "build.ninja", tmp_path)
    rules = compilers.WithoutNinja(tmp_path)
    assert rules.build("host/_C.so")
    code = (
        f"import torch; torch.ops.load_library({str(tmp_path / 'host/_C.so')!r}); "
        "print(torch.ops.blip2fast_C.philox_keep_mask)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "blip2fast_C.philox_keep_mask", run.stderr
    rules.variables["cxx"] = "false"
    assert not rules.build("host/_C.so")


def test_the_source_archive_has_what_setup_imports() -> None:
    assert "*.py" in (ROOT / "MANIFEST.in").read_text()
