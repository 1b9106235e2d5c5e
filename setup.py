"""Builds the optional extension `blip2fast/_C.so`; everything else is in pyproject.toml.

csrc/rules.ninja says what is compiled and how. Needs torch beside it (`--no-build-isolation`), a
C++ compiler and ninja; with nvcc, the CUDA kernels too; with pybind11, `blip2fast/_block_stream`
for this Python. Whatever is missing or fails, the package installs: `blip2fast/_C.txt` then says
what was not built and why.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "extension"  # kept between builds, so that ninja rebuilds what changed


class NinjaBuild(build_ext):
    """Puts `_C.so`, as far as it can be built, and `_C.txt` into the package."""

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib)) / "blip2fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_C.so").unlink(missing_ok=True)  # loaded elsewhere, it must not change
        module = package / f"_block_stream{sysconfig.get_config_var('EXT_SUFFIX')}"
        module.unlink(missing_ok=True)
        library, note = attempt()
        if library is not None:
            shutil.copy(library, package / "_C.so")
            streamer, missing = attempt_block_stream()
            if streamer is not None:
                shutil.copy(streamer, module)
            else:
                note += f"; block copies in Python: {missing}"
        (package / "_C.txt").write_text(note + "\n")
        print(f"blip2fast: {note}", file=sys.stderr)

    def get_outputs(self):
        package = Path(self.build_lib) / "blip2fast"
        return [str(path) for name in ("_C.*", "_block_stream.*") for path in package.glob(name)]

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """The library depends on the platform, not on Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


def attempt():
    """`(the library or None, what was built or why nothing was)`."""
    torch = importlib.util.find_spec("torch")
    ninja = importlib.util.find_spec("ninja")
    cxx = shutil.which("g++") or shutil.which("clang++")
    if torch is None:
        return None, "extension not built: no torch beside setup.py (--no-build-isolation)"
    if ninja is None and shutil.which("ninja") is None:
        return None, "extension not built: no ninja (pip install ninja)"
    if cxx is None:
        return None, "extension not built: no C++ compiler (g++ or clang++ on PATH)"
    nvcc = shutil.which("nvcc")
    command = ninja_command()
    BUILD.mkdir(parents=True, exist_ok=True)
    settings = {"root": ROOT, "torch": Path(torch.origin).parent, "cxx": cxx, "nvcc": nvcc or ""}
    settings |= {"python": sysconfig.get_paths()["include"], "pybind11": pybind11_headers() or ""}
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (BUILD / "build.ninja").write_text("".join(lines) + "include $root/csrc/rules.ninja\n")
    missing = "no nvcc on PATH"
    if nvcc is not None:
        if run([*command, "cuda/_C.so"]):
            return BUILD / "cuda/_C.so", f"extension built with {cxx} and {nvcc}"
        missing = f"{nvcc} failed, its messages are above"
    if run([*command, "host/_C.so"]):
        return BUILD / "host/_C.so", f"extension built with {cxx}, without CUDA: {missing}"
    return None, f"extension not built: {cxx} failed, its messages are above"


def attempt_block_stream():
    """`(the Python module or None, why not)`; after `attempt`, which writes build.ninja."""
    if pybind11_headers() is None:
        return None, "no pybind11 (pip install pybind11)"
    if run([*ninja_command(), "python/_block_stream.so"]):
        return BUILD / "python/_block_stream.so", ""
    return None, "it was not compiled, the messages are above"


def ninja_command():
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return [shutil.which("ninja")]


def pybind11_headers():
    found = importlib.util.find_spec("pybind11")
    return None if found is None else Path(found.origin).parent / "include"


def run(command):
    return subprocess.run(command, cwd=BUILD, check=False).returncode == 0


setup(
    ext_modules=[Extension("blip2fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
