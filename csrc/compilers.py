"""Finds compilers and builds the targets of rules.ninja, for setup.py and for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "extension"  # kept between builds, so that ninja rebuilds what changed
USUAL = Path("/usr/local/cuda/bin")  # where NVIDIA's installers put nvcc, seldom on PATH


def installed(package: str) -> Path | None:
    """The folder of an installed package.

    Also where the importing environment hides it: pip builds in one of its own, but installs into
    this Python's, whose torch the library then meets.
    """
    found = importlib.util.find_spec(package)
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0])
    folders = (Path(sysconfig.get_paths()[kind]) / package for kind in ("platlib", "purelib"))
    return next((folder for folder in folders if (folder / "__init__.py").exists()), None)


def find_nvcc(cuda: str | None) -> tuple[str, str]:
    """`(nvcc, "")`, or `("", why there is none)`.

    Args:
        cuda: The CUDA version of torch, whose major version is nvcc's too; None: a torch without.
    """
    missing = "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda: pip install nvidia-cuda-nvcc"
    for nvcc in _nvccs():
        release = nvcc_release(nvcc)
        if not release:
            missing = f"{nvcc} does not say its version"
        elif cuda is None or release.split(".")[0] == cuda.split(".")[0]:
            return nvcc, ""
        else:
            missing = f"{nvcc} is of CUDA {release}, torch of CUDA {cuda}"
    return "", missing


def nvcc_release(nvcc: str) -> str:
    """The release of a compiler, such as "13.0"; empty if it does not say."""
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", run.stdout)
    return found[1] if found else ""


def _nvccs() -> Iterator[str]:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in homes if home]
    path = shutil.which("nvcc")
    folders += [Path(path).parent] if path else []
    folders.append(USUAL)
    sites = {sysconfig.get_paths()[kind] for kind in ("platlib", "purelib")}
    sites |= {entry for entry in sys.path if entry.endswith("site-packages")}
    for site in sorted(sites):
        folders += sorted(Path(site).glob("nvidia/cu[0-9]*/bin"), reverse=True)
    yield from (str(folder / "nvcc") for folder in folders if os.access(folder / "nvcc", os.X_OK))


def configure() -> tuple[str, str, str]:
    """Write build.ninja: `(C++ compiler, nvcc, why something is missing)`, each may be empty."""
    torch = installed("torch")
    if torch is None:
        return "", "", "no torch beside setup.py: pip install --no-build-isolation ."
    cxx = shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        return "", "", "no C++ compiler (g++ or clang++ on PATH)"
    nvcc, missing = find_nvcc(runpy.run_path(str(torch / "version.py")).get("cuda"))
    pybind11 = installed("pybind11")
    settings = {
        "root": ROOT,
        "torch": torch,
        "cxx": cxx,
        "nvcc": nvcc,
        "code": code(nvcc_release(nvcc) if nvcc else ""),
        "python": sysconfig.get_paths()["include"],
        "pybind11": pybind11 / "include" if pybind11 else "",
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (BUILD / "build.ninja").write_text("".join(lines) + "include $root/csrc/rules.ninja\n")
    return cxx, nvcc, missing


def code(release: str) -> str:
    """Names what a build computes: the sources, how they are compiled, and nvcc's release."""
    digest = hashlib.sha256(release.encode())
    for file in sorted((ROOT / "csrc").iterdir()):
        if file.suffix in {".cpp", ".cu", ".h", ".ninja"}:
            digest.update(f"\n{file.name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def build_library() -> tuple[Path | None, str]:
    """`(the library or None, what was built or why nothing was)`."""
    cxx, nvcc, missing = configure()
    if not cxx:
        return None, f"extension not built: {missing}"
    if nvcc:
        if build("cuda/_C.so"):
            return BUILD / "cuda/_C.so", f"extension built with {cxx} and {nvcc}"
        missing = f"{nvcc} failed, its messages are above"
    if build("host/_C.so"):
        return BUILD / "host/_C.so", f"extension built with {cxx}, without CUDA: {missing}"
    return None, f"extension not built: {cxx} failed, its messages are above"


def build_block_stream() -> tuple[Path | None, str]:
    """`(the Python module or None, why not)`; after `build_library`, which writes build.ninja."""
    if installed("pybind11") is None:
        return None, "no pybind11 (pip install pybind11)"
    if build("python/_block_stream.so"):
        return BUILD / "python/_block_stream.so", ""
    return None, "it was not compiled, the messages are above"


def build(target: str) -> bool:
    """Build one target of build.ninja; whether it succeeded."""
    if importlib.util.find_spec("ninja"):
        command = [sys.executable, "-m", "ninja", target]
    elif shutil.which("ninja"):
        command = ["ninja", target]
    else:
        return WithoutNinja(BUILD).build(target)
    return subprocess.run(command, cwd=BUILD, check=False).returncode == 0


class WithoutNinja:
    """As much of ninja as rules.ninja needs; what it compiles it compiles again every time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables: dict[str, str] = {}
        self.commands: dict[str, str] = {}  # of rules
        self.edges: dict[str, tuple[str, list[str], dict[str, str]]] = {}
        self._read((folder / "build.ninja").read_text())

    def _read(self, text: str) -> None:
        rule, own = "", self.variables
        for line in re.sub(r"\$\n\s*", "", text).splitlines():
            word, _, rest = line.partition(" ")
            if not line.strip() or line.startswith("#"):
                continue
            if word == "include":
                self._read(Path(self._expand(rest)).read_text())
            elif word == "rule":
                rule = rest.strip()
            elif word == "build":
                output, _, made = rest.partition(":")
                by, *inputs = made.split()
                rule, own = "", {}
                self.edges[output] = (by, [self._expand(name) for name in inputs], own)
            else:
                name, _, value = (part.strip() for part in line.partition("="))
                if not line.startswith(" "):
                    self.variables[name] = self._expand(value)
                elif not rule:
                    own[name] = self._expand(value)
                elif name == "command":
                    self.commands[rule] = value

    def _expand(self, text: str, own: Mapping[str, str] | None = None) -> str:
        values = {**self.variables, **(own or {})}
        return re.sub(r"\$(\w+)", lambda match: values.get(match[1], ""), text)

    def needs(self, target: str) -> list[str]:
        """What a target is made of; nothing for a source."""
        return self.edges[target][1] if target in self.edges else []

    def command(self, target: str) -> str:
        """The shell's command for a target that is no source."""
        rule, inputs, own = self.edges[target]
        files = {"in": shlex.join(inputs), "out": shlex.quote(target)}
        return self._expand(self.commands[rule], own | files)

    def build(self, target: str) -> bool:
        """Build what a target needs, side by side, then the target; whether it succeeded."""
        if target not in self.edges:
            return Path(target).exists()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            if not all(pool.map(self.build, self.needs(target))):
                return False
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        print(target, flush=True)
        run = subprocess.run(self.command(target), shell=True, cwd=self.folder, check=False)
        return run.returncode == 0
