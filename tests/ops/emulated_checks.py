"""The CUDA kernels as `auto` would check them, emulated on the host: see test_emulated_kernels.py.

The process that checks imports this by name; a kind says where the emulated library is.
"""

from __future__ import annotations

import torch

from blip2fast.kernels.qformer_attention import cuda as _attention_cuda
from blip2fast.ops import kernel_cases, qformer_attention
from blip2fast.ops.dispatch import Backend
from blip2fast.ops.itc import loss as itc
from blip2fast.ops.kernel_kinds import read_kind
from blip2fast.ops.kernel_proof import Problem


def _emulate(kind: str) -> None:
    """Let `impl="cuda"` run the emulated operators on CPU tensors."""
    torch.ops.load_library(read_kind(kind)["library"])
    _attention_cuda._OPS = torch.ops.blip2fast_emulated
    for op in (qformer_attention, itc.itc_loss):
        names = op.__globals__
        anywhere = Backend("cuda", lambda call: [], lambda call: [])
        names["BACKENDS"] = (anywhere, *names["BACKENDS"][1:])
    for name in ("itc_sweep", "itc_sweep_grad"):
        operator = getattr(torch.ops.blip2fast_emulated, name)
        torch.library.impl(f"blip2fast_C::{name}", "CPU")(operator)


def attention_problem(kind: str, device: torch.device) -> Problem:
    _emulate(kind)
    return kernel_cases.attention_problem(kind, device)


def itc_problem(kind: str, device: torch.device) -> Problem:
    _emulate(kind)
    return kernel_cases.itc_problem(kind, device)
