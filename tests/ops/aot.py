"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# what a block may use, opted in to
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture.

    Attributes:
        capability: 80, 90 or 100.
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
    num_stages: int,
) -> Compiled:
    """Compile for compute capability `capability / 10`, without a GPU.

    Args:
        kernel: A `triton.jit` function.
        types: The type of each argument that is not a constant: `"*bf16"`, `"i32"`, ...; pointers
            and those whose type ends in `:16` are taken to be multiples of 16, as a launch sees.
        constants: The value of each of the others.
        capability: 80, 90 or 100.
        num_warps, num_stages: As for a launch.
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
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return Compiled(
        capability,
        compiled.metadata.shared,
        compiled.asm["ttgir"],
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )
