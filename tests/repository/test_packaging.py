"""What a wheel and a checkout must and must not contain."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import blip2fast

ROOT = Path(__file__).parents[2]


def _project() -> dict[str, Any]:
    """The section `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_in_one_place() -> None:
    """`blip2fast.__version__`; the build reads it there, and CITATION.cff repeats it."""
    assert "version" not in _project()
    assert _project()["dynamic"] == ["version"]
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["setuptools"]["dynamic"]["version"] == {"attr": "blip2fast.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == blip2fast.__version__


def test_citation_is_complete() -> None:
    """The keys that the Citation File Format 1.2.0 requires, and a licence that is ours."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["license"] == _project()["license"]
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_extras_and_pythons() -> None:
    extras = _project()["optional-dependencies"]
    assert {"demo", "datasets", "dev", "docs", "gradio"} <= extras.keys()
    assert {"kernels", "lora", "wandb"} <= extras.keys()
    named = [c.rpartition(" ")[2] for c in _project()["classifiers"] if ":: Python :: 3." in c]
    assert named == ["3.11", "3.12", "3.13", "3.14"]
    assert _project()["requires-python"] == f">={named[0]}"


def test_kernels_folder_is_no_package() -> None:
    """A root-level `kernels` package would shadow the one transformers probes for."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "blip2fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


def test_rooms() -> None:
    """A new module or folder directly in the package needs a place in the order of the rooms."""
    rooms = {p.name for p in (ROOT / "blip2fast").iterdir() if p.is_dir()} - {"__pycache__"}
    assert rooms == {
        *("capfilt", "checkpoints", "command_line", "configs", "data", "demo", "demo_page"),
        *("evaluation", "frozen", "inference", "kernels", "offload", "ops", "published"),
        *("qformer", "reporting", "scenes", "scoring", "search", "stage1", "stage2", "training"),
    }
    modules = {p.stem for p in (ROOT / "blip2fast").glob("*.py")}
    assert modules == {
        "__init__",
        "__main__",
        "_choices",
        "_extension",
        "_heap",
        "_imports",
        "doctor",
        "train",
    }


def test_transformers_imports_from_the_repository_root() -> None:
    code = "from transformers import Blip2QFormerModel, OPTForCausalLM; print('imported')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "imported", done.stderr


def test_no_module_bears_the_name_of_another() -> None:
    """train.py runs as a script: a module named like a library's would shadow it."""
    taken = set(sys.stdlib_module_names)
    site = Path(sysconfig.get_paths()["purelib"])
    taken |= {p.stem for p in site.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    taken |= {"datasets", "evaluate", "distributed", "accelerate", "peft", "timm", "torchvision"}
    taken -= {"blip2fast"}
    ours = {p.stem for p in (ROOT / "blip2fast").iterdir() if p.name != "kernels"}
    assert ours & taken == set()


def _copy_of_the_sources(folder: Path) -> Path:
    """A build leaves files behind that the next one would pick up."""
    copy = folder / "source"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", "_C.*", "_block_stream.*"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    return copy


def _compilers(folder: Path, kind: str) -> Path:
    """A PATH with `none`, with a `broken` C++ compiler, or with `g++` but no nvcc."""
    folder.mkdir()
    if kind == "broken":
        (folder / "g++").write_text("#!/bin/sh\nexit 1\n")
        (folder / "g++").chmod(0o755)
    elif kind == "g++":
        for tool in ("g++", "as", "ld"):
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"no {tool} on this machine")
            (folder / tool).symlink_to(found)
    return folder


def _wheel(source: Path, folder: Path, path: Path) -> zipfile.ZipFile:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": str(path)})
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def _kernel_modules() -> list[str]:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    return [".".join(("blip2fast", *f.relative_to(ROOT).with_suffix("").parts)) for f in files]


def _tuned_files() -> list[str]:
    """`kernels/<op>/tuned.json`."""
    found = sorted((ROOT / "kernels").glob("*/tuned.json"))
    assert len(found) == 4
    return [str(file.relative_to(ROOT)) for file in found]


def _files_of_a_wheel() -> set[str]:
    """What it must hold besides the extension."""
    modules = (ROOT / "blip2fast").rglob("*.py")
    expected = {str(p.relative_to(ROOT)) for p in modules} | {"blip2fast/ops/proven_kernels.json"}
    expected |= {name.replace(".", "/") + ".py" for name in _kernel_modules()}
    expected |= {f"blip2fast/{name}" for name in _tuned_files()}
    expected |= {"blip2fast/reporting/run_report.html"}
    return expected | {f"blip2fast/configs/{file.name}" for file in (ROOT / "configs").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compilers", "note"),
    [
        ("none", "extension not built: no C++ compiler"),
        ("broken", "extension not built: "),
        ("g++", "extension built with "),
    ],
)
def test_wheel(tmp_path: Path, compilers: str, note: str) -> None:
    """One top-level name, every module, and an extension as far as a compiler is found."""
    source = _copy_of_the_sources(tmp_path)
    wheel = _wheel(source, tmp_path, _compilers(tmp_path / "bin", compilers))
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    about = f"blip2fast-{blip2fast.__version__}.dist-info"
    assert str(wheel.filename).endswith("-py3-none-any.whl") == (compilers != "g++")
    assert top == {"blip2fast", about}
    assert _files_of_a_wheel() <= set(names)
    assert ("blip2fast/_C.so" in names) == (compilers == "g++")
    streamers = [name for name in names if name.startswith("blip2fast/_block_stream")]
    assert len(streamers) == (compilers == "g++")
    assert wheel.read("blip2fast/_C.txt").decode().startswith(note)

    wheel.extractall(tmp_path / "installed")
    code = (
        "import importlib, blip2fast, blip2fast._extension as e; "
        f"[importlib.import_module(m) for m in {_kernel_modules()}]; "
        "print(blip2fast.__file__, bool(e.why_not()), e.has_op('philox_keep_mask'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=False,
    )
    built = compilers == "g++"
    at = tmp_path / "installed" / "blip2fast" / "__init__.py"
    assert done.stdout.split("\n")[:3] == [str(at), str(not built), str(built)], done.stderr


def test_kernels_import_from_the_checkout() -> None:
    """What an editable install sees: the modules behind the symlink."""
    for name in _kernel_modules():
        assert importlib.import_module(name).__name__ == name


@pytest.mark.slow
def test_sdist_has_what_a_build_needs(tmp_path: Path) -> None:
    source = _copy_of_the_sources(tmp_path)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
        opened.extractall(tmp_path / "unpacked", filter="data")
    assert {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir() if p.suffix != ".md"
    } <= names
    assert {name.replace(".", "/") + ".py" for name in _kernel_modules()} <= names
    assert {f"blip2fast/{name}" for name in _tuned_files()} <= names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = _wheel(unpacked, tmp_path, _compilers(tmp_path / "bin", "none"))
    assert _files_of_a_wheel() <= set(wheel.namelist())
