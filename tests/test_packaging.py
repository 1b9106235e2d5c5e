"""What a wheel and a checkout must and must not contain."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_kernels_folder_is_no_package() -> None:
    """A root-level `kernels` package would shadow the one transformers probes for."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "blip2fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


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


@pytest.mark.slow
def test_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    copy = tmp_path / "source"  # a build leaves files behind that the next one would pick up
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"blip2fast"}
    packaged = {name for name in names if name.endswith(".py")}
    modules = [p for p in (ROOT / "blip2fast").rglob("*.py") if "kernels" not in p.parts]
    assert {str(p.relative_to(ROOT)) for p in modules} <= packaged
