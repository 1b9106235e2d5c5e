"""What a machine can do at most, and the conditions under which a number was taken."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fingerprint import fingerprint
from timing import stopwatch

from blip2fast.ops import linear as onednn_linear

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "transformers", "xformers", "deepspeed")


@dataclass(frozen=True)
class Machine:
    """Measured ceilings of a device.

    Attributes:
        name: As `torch.cuda.get_device_name` gives it.
        flops_per_s: By dtype: a large matrix product on random data.
        bytes_per_s: A large copy on the device, bytes read plus bytes written.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float


# H200: an 8192^3 product in bf16 and an 8.6 GB copy, torch 2.11
KNOWN = (Machine("NVIDIA H200", {"bfloat16": 790e12}, 4.3e12),)


@dataclass(frozen=True)
class Ceilings:
    """The two rates that floors are stated against, and where they come from."""

    flops_per_s: float
    bytes_per_s: float
    source: str


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The rates of a known machine; on any other they are measured, once."""
    type_name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for machine in KNOWN:
            if machine.name == name and type_name in machine.flops_per_s:
                rate = machine.flops_per_s[type_name]
                return Ceilings(rate, machine.bytes_per_s, f"known for {name}")
    side, copied = (8192, 1 << 31) if device.type == "cuda" else (1536, 1 << 27)
    return Ceilings(
        _product_rate(device, dtype, side),
        _copy_rate(device, copied),
        f"measured: copy of {copied >> 20} MiB, {side}^3 product by the quicker library",
    )


def _best(call: Any, device: torch.device, rounds: int = 7) -> float:
    watch = stopwatch(device)
    call()
    return min(watch.laps([call])[0] for _ in range(rounds))


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    forms: list[Any] = [lambda: torch.mm(a, b, out=out)]
    if onednn_linear.is_supported(a, b):
        forms.append(lambda: onednn_linear.onednn_product(a, b))
    return 2 * side**3 / min(_best(form, device) for form in forms)


def run_conditions(commit: str | None = None) -> dict[str, Any]:
    """What a number is worth nothing without: machine, versions, commit, command, date.

    Args:
        commit: What runs, where the folder is no git checkout of it.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or processor(),
        "processor": processor(),
        **({} if gpu else {"fingerprint": fingerprint()}),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit or _commit() or "unknown",
        "command": command(sys.argv[1:], program()),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def program() -> str:
    """What runs: pytest, or a script of this folder."""
    name = Path(sys.argv[0]).name
    return f"benchmarks/{name}" if (ROOT / "benchmarks" / name).is_file() else "pytest"


def command(arguments: list[str], run: str = "pytest") -> str:
    """The command as it can be given again: without where results went."""
    outputs = ("--benchmark-json", "--junitxml", "--bench-commit", "--basetemp")
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in outputs:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in outputs)):
            kept.append(argument.replace(f"{ROOT}/", ""))
    return shlex.join([run, *kept])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, marked where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    return f"{head}, changed" if head and changed else head or None
