"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blip2fast.kernels.launch import FP_FUSION

_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# what a block may use, opted in to
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_LIMIT_BYTES |= dict.fromkeys((86, 89, 120), 99 * 1024)


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture.

    Attributes:
        capability: 80, 86, 89, 90, 100 or 120.
        shared_bytes: Shared memory of a block, as Triton asks for it.
        ttgir, ptx: Triton's own form and the assembly text.
        cubin: The machine code.
    """

    capability: int
    shared_bytes: int
    ttgir: str
    ptx: str
    cubin: bytes

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK (spilled bytes among them), LOCAL and more, as `cuobjdump` reports them."""
        usage = re.findall(r"\b([A-Z]+):(\d+)", self._dump("--dump-resource-usage"))
        return {name: int(value) for name, value in usage}

    @cached_property
    def sass(self) -> str:
        """The instructions."""
        return self._dump("--dump-sass")

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the machine code: `"SHFL"`, `"HMMA"`, `"HGMMA"`."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    def _dump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            done = subprocess.run(
                [str(_CUOBJDUMP), option, file.name], capture_output=True, text=True, check=True
            )
        return done.stdout


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    *,
    num_warps: int,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compile for compute capability `capability / 10`, without a GPU.

    Args:
        kernel: A `triton.jit` function.
        types: The type of each argument that is not a constant: `"*bf16"`, `"i32"`, ...; pointers
            and those whose type ends in `:16` are taken to be multiples of 16, as a launch sees.
        constants: The value of each of the others.
        capability: 80, 86, 89, 90, 100 or 120.
        num_warps, num_stages, options: As for a launch, which takes 3 stages if none are given.
    """
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = types.get(name, "constexpr")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(place,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix(":16")
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": FP_FUSION,
            **options,
        },
    )
    return Compiled(
        capability,
        compiled.metadata.shared,
        compiled.asm["ttgir"],
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher calls it.

    Attributes:
        kernel: The `triton.jit` function.
        grid: Programs along each axis.
        types, constants: As for `compile_kernel`.
        options: `num_warps` and what else is not an argument.
        numbers: Values of the integers among the arguments that are no constants.
    """

    kernel: Any
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def variant(self) -> tuple[Any, ...]:
        """Launches for which this is equal run the same machine code."""
        parts = (self.types, self.constants, self.options)
        return (self.kernel.__name__, *(tuple(sorted(x.items(), key=str)) for x in parts))

    def compile(self, capability: int) -> Compiled:
        """Machine code for `capability / 10`."""
        return compile_kernel(self.kernel, self.types, self.constants, capability, **self.options)


_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def record_launches(function: Callable[[], object]) -> list[Launch]:
    """What a function would launch, in order; nothing runs, so tensors may be on "meta"."""
    launches = []

    def record(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        types, constants = {}, {}
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            kind = None if parameter.is_constexpr else _type_of(value, parameter.do_not_specialize)
            if kind is None:
                constants[name] = value
            else:
                types[name] = kind
        numbers = {
            name: x for name, x in values.items() if type(x) is int and name not in constants
        }
        launches.append(Launch(kernel, grid, types, constants, options, numbers))

    with patch.object(triton.runtime.jit.JITFunction, "run", record):
        function()
    return launches


def _type_of(value: Any, plain: bool) -> str | None:
    """The type that Triton compiles an argument as; None: as a constant."""
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not plain):
        return None
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind if plain or value % 16 else f"{kind}:16"
