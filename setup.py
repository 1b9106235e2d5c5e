"""Builds the optional extension `blip2fast/_C.so`; everything else is in pyproject.toml.

csrc/rules.ninja says what is compiled and how, csrc/compilers.py with what. Needs a torch that is
installed, and a C++ compiler; with nvcc, the CUDA kernels too; with pybind11,
`blip2fast/_block_stream` for this Python. Whatever is missing or fails, the package installs:
`blip2fast/_C.txt` then says what was not built and why.
"""

import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
from compilers import build_block_stream, build_library  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:
    # it reads no licence in pyproject.toml that is an SPDX expression, and ends with a page on that
    sys.exit(f"blip2fast: setuptools {setuptools.__version__}: pip install 'setuptools>=77'")


class NinjaBuild(build_ext):
    """Puts `_C.so`, as far as it can be built, and `_C.txt` into the package."""

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib)) / "blip2fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_C.so").unlink(missing_ok=True)  # loaded elsewhere, it must not change
        module = package / f"_block_stream{sysconfig.get_config_var('EXT_SUFFIX')}"
        module.unlink(missing_ok=True)
        library, note = build_library()
        if library is not None:
            shutil.copy(library, package / "_C.so")
            streamer, missing = build_block_stream()
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
    """The library depends on the platform, not on Python; without it, nothing does."""

    def get_tag(self):
        library = Path(self.get_finalized_command("build").build_lib) / "blip2fast" / "_C.so"
        return ("py3", "none", super().get_tag()[2] if library.exists() else "any")


setup(
    ext_modules=[Extension("blip2fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
)
