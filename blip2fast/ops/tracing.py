"""Whether a call is traced: then values decide nothing, and only operators that export run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_recording() -> bool:
    """Whether the call becomes a program for elsewhere: `torch.export`, ONNX, `torch.jit.trace`.

    `torch.compile` is none: it compiles again where a shape or a setting differs.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


def is_traced() -> bool:
    """Whether the call is compiled, recorded or transformed: shapes then depend on no value."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_transformed()
    )


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode AD transforms the call.

    Custom operators have no rules for it, and PyTorch's fused attention has no forward derivative.
    """
    return has_tangents() or bool(torch._C._are_functorch_transforms_active())


def has_tangents() -> bool:
    """Whether forward-mode AD is on: `torch.func.jvp`, `torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0


def has_values(x: Tensor) -> bool:
    """Whether the host may look at the values of `x` at no cost and without fixing a choice.

    Only on the CPU (elsewhere the host would wait), and not while a call is compiled, recorded or
    transformed by `torch.func`: a branch on a value would then hold for every later call.
    """
    return (
        x.device.type == "cpu"
        and (type(x) is Tensor or type(x) is nn.Parameter)
        and not is_traced()
    )
