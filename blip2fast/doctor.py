"""What a bug report should carry: versions, devices, the extension, and what every op would run.

`blip2fast doctor` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

from blip2fast import __version__
from blip2fast._extension import BUILD_NOTE, compiled_code, why_not
from blip2fast.ops import dispatch
from blip2fast.ops import linear as onednn_linear
from blip2fast.ops.kernel_calls import OpChoice, op_choices
from blip2fast.ops.records import FILE_NAME, SHIPPED, cache_folder, read_records

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pydantic"),
    *("deepspeed", "accelerate", "peft", "xformers", "torchao", "bitsandbytes", "pillow"),
)


def report(dtype: torch.dtype = torch.bfloat16) -> str:
    """The report, as text; nothing is checked or compiled for it.

    Args:
        dtype: Compute precision of the calls whose backends are named.
    """
    lines = [*machine(), f"{_heading(dtype)}:"]
    for op, backend, kinds, reasons in _choices(dtype):
        lines.append(f"  {op}: {backend} ({kinds} {'kind' if kinds == 1 else 'kinds'})")
        lines += [f"    not {reason}" for reason in reasons]
    return "\n".join(lines)


def machine() -> list[str]:
    """Versions, devices and the extension, a line each."""
    return [*_versions(), *_devices(), *_kernels()]


def op_table(dtype: torch.dtype = torch.bfloat16) -> list[list[str]]:
    """What every op would run, a row each, beneath a header; `dtype` as of `report`."""
    table = [[_heading(dtype), "runs", "kinds", "not, and why"]]
    for op, backend, kinds, reasons in _choices(dtype):
        table.append([op, backend, str(kinds), "\n".join(reasons)])
    return table


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _versions() -> Iterator[str]:
    yield f"blip2fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = {name: _version(name) for name in PACKAGES}
    yield ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name, version in found.items() if not version]
    if missing:
        yield f"not installed: {', '.join(missing)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    linear = "oneDNN" if onednn_linear.is_chosen() else "PyTorch"
    yield (
        f"CPU: {onednn_linear.cpu_vendor() or 'vendor unknown'}, {cores} cores, "
        f"{torch.get_num_threads()} threads of PyTorch; fp32 linear layers by {linear}"
    )
    if not _has_gpu():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        yield f"no CUDA device; torch is built for {built}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}: {card.name}, sm_{card.major}{card.minor}, "
            f"{card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )


def _kernels() -> Iterator[str]:
    missing = why_not()
    note = BUILD_NOTE.read_text().strip() if BUILD_NOTE.exists() else "of unknown build"
    yield f"extension: {missing}" if missing else f"{note}, code {compiled_code()}"
    own = read_records(cache_folder() / FILE_NAME)
    shipped = len(read_records(SHIPPED))
    yield (
        f"kernels: {dispatch.kernels_setting()}; {shipped} checks ship with the package, "
        f"{len(own)} in {cache_folder()}"
    )


def _device() -> torch.device | str:
    return torch.device("cuda", torch.cuda.current_device()) if _has_gpu() else "cpu"


def _heading(dtype: torch.dtype) -> str:
    return f"what runs on {_device()} in {str(dtype).removeprefix('torch.')}"


def _choices(dtype: torch.dtype) -> Iterator[tuple[str, str, int, list[str]]]:
    """Every op and backend, how many kinds of calls run it, and why others are passed over."""
    lines: dict[tuple[str, str], list[OpChoice]] = {}
    for choice in op_choices(_device(), dtype):
        lines.setdefault((choice.op, choice.backend), []).append(choice)
    for (op, backend), choices in lines.items():
        reasons = {
            f"{name}: {reason}": None
            for choice in choices
            for name, reason in choice.passed_over.items()
        }
        yield op, backend, len(choices), list(reasons)
