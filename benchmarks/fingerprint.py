"""Which processor it was, beyond a name that many share: fields of Linux, and measured peaks."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blip2fast.ops import linear as onednn_linear

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FIELDS = {"vendor_id": "vendor", "cpu family": "family", "model": "model", "stepping": "stepping"}
# the flags that decide which product a library takes
_FLAGS = re.compile(r"sse4_2|fma|avx.*|amx.*|sve.*|asimd.*|bf16|i8mm")
_SIDE, _ROUNDS = 1024, 5


@functools.cache
def fingerprint() -> dict[str, Any]:
    """The processor that runs this, with the rates of its products; takes half a second."""
    told = processor_fields(CPUINFO.read_text() if CPUINFO.exists() else "")
    return told | {"caches": caches(), "peaks_gflop_per_s": peaks()}


def processor_fields(cpuinfo: str) -> dict[str, Any]:
    """Vendor, family, model, stepping and flags from the text of `/proc/cpuinfo`."""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, _, value in lines}
    flags = (told.get("flags") or told.get("Features") or "").split()
    fields: dict[str, Any] = {ours: told.get(theirs, "") for theirs, ours in _FIELDS.items()}
    return fields | {"flags": sorted(flag for flag in flags if _FLAGS.fullmatch(flag))}


def caches(folder: Path = CACHES) -> dict[str, str]:
    """Sizes by level and kind, such as `{"L1d": "48K", "L2": "1024K"}`."""
    found = {}
    for entry in sorted(folder.glob("index*")):
        level, kind, size = (
            (entry / name).read_text().strip() if (entry / name).exists() else ""
            for name in ("level", "type", "size")
        )
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{letter}"] = size
    return found


def peaks() -> dict[str, float]:
    """The best of a few large products of each library and dtype on this process's threads."""
    rates = {}
    for name, dtype, product in _products():
        a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
        product(a, b)
        best = min(
            _seconds(lambda a=a, b=b, product=product: product(a, b)) for _ in range(_ROUNDS)
        )
        rates[name] = round(2 * _SIDE**3 / best / 1e9, 1)
    return rates


def _products() -> list[tuple[str, torch.dtype, Callable[..., Any]]]:
    """PyTorch's products, MKL's in fp32 and oneDNN's in bf16, and oneDNN's in fp32."""
    fp32 = "mkl" if torch.backends.mkl.is_available() else "pytorch"
    bf16 = "onednn" if torch.backends.mkldnn.is_available() else "pytorch"
    found: list[tuple[str, torch.dtype, Callable[..., Any]]] = [
        (f"fp32 {fp32}", torch.float32, torch.mm),
        (f"bf16 {bf16}", torch.bfloat16, torch.mm),
    ]
    square = torch.randn(2, 2)
    if onednn_linear.is_supported(square, square):
        found.append(("fp32 onednn", torch.float32, onednn_linear.onednn_product))
    return found


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def describe(run: dict[str, Any]) -> str:
    """One line of a run's conditions; "not recorded" for results from before there was one."""
    found = run.get("fingerprint")
    if not found:
        return "processor's fingerprint not recorded"
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["peaks_gflop_per_s"].items())
    held = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    return (
        f"{found['vendor']} family {found['family']}, model {found['model']}, "
        f"stepping {found['stepping']}; {held}; flags {' '.join(found['flags'])}; "
        f"products in GFLOP/s: {rates}"
    )


def short_name(found: dict[str, Any]) -> str:
    """What tells machines apart in a result file's name: family, model and stepping."""
    return "-".join(found[name] for name in ("family", "model", "stepping"))
