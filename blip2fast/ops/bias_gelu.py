"""Bias and exact GELU in one pass each way. Shapes: R rows, F width of the feed-forward layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.bias_gelu import reference
from blip2fast.kernels.precision import wide_dtype
from blip2fast.ops.calls import BiasGeluCall
from blip2fast.ops.checks import check_like, check_rows
from blip2fast.ops.dispatch import (
    AS_DEFINED,
    Backend,
    KernelCheck,
    choose,
    no_reasons,
    triton_reasons,
)
from blip2fast.ops.kernel_kinds import device_of, gelu_kind
from blip2fast.ops.second_derivatives import once_differentiable


def _triton_reasons(call: BiasGeluCall) -> list[str]:
    return triton_reasons(call.device, call.dtype)


BACKENDS: tuple[Backend[BiasGeluCall], ...] = (
    Backend(
        "triton",
        _triton_reasons,
        no_reasons,
        KernelCheck("bias_gelu", gelu_kind, device_of, "blip2fast.ops.kernel_cases:gelu_problem"),
    ),
    Backend("pytorch", no_reasons, no_reasons),
    Backend("reference", no_reasons, lambda call: [AS_DEFINED]),
)


def bias_gelu(x: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """`F.gelu(x + bias)`, the exact GELU.

    Computed in fp32 (fp64 for fp64 data). Only x is saved for the backward pass, so the result may
    be modified in place. The gradient of `bias` is summed in a fixed order. The result has the
    dtype of x; autocast has no effect.

    Args:
        x: `[R, F]`, fp16, bf16, fp32 or fp64.
        bias: `[F]`, of the linear layer that made x, or None; fp32 goes with data of any type.
        impl: `"auto"`, `"triton"`, `"pytorch"` or `"reference"`.

    Returns:
        `[R, F]`, in the type of x.

    Raises:
        ValueError: a shape, type or device does not fit.
        NotImplementedError: the requested backend does not support the call; says why.
    """
    check_rows("x", x)
    check_like("bias", bias, (x.shape[1],), x)
    call = BiasGeluCall(
        x.dtype, x.device.type, x.device.index, None if bias is None else bias.dtype
    )
    impl = choose("bias_gelu", BACKENDS, call, impl)
    if impl == "reference":
        return reference.bias_gelu(x, bias)
    if impl == "pytorch":
        return F.gelu(x if bias is None else x + bias.to(x.dtype))
    out: Tensor = torch.ops.blip2fast.bias_gelu(x.contiguous(), bias)
    return out


torch.library.define("blip2fast::bias_gelu", "(Tensor x, Tensor? bias) -> Tensor")
torch.library.define(
    "blip2fast::bias_gelu_grad",
    "(Tensor dout, Tensor x, Tensor? bias, bool needs_bias) -> (Tensor dx, Tensor dbias)",
)


def _kernels() -> Any:
    """The functions `forward` and `backward`, imported on first use: Triton is optional."""
    from blip2fast.kernels.bias_gelu import backward, forward

    return SimpleNamespace(forward=forward.forward, backward=backward.backward)


@torch.library.impl("blip2fast::bias_gelu", "CompositeExplicitAutograd")
def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _kernels().forward(x, bias)
    return out


@torch.library.register_fake("blip2fast::bias_gelu")
def _forward_fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("blip2fast::bias_gelu_grad", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = _kernels().backward(dout, x, bias, needs_bias)
    return dx, dbias


@torch.library.register_fake("blip2fast::bias_gelu_grad")
def _backward_fake(
    dout: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    width = x.shape[1] if needs_bias else 0
    return x.new_empty(x.shape), x.new_empty(width, dtype=wide_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias)


@once_differentiable("bias_gelu")
def _autograd(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.blip2fast.bias_gelu_grad(
        dout.contiguous(), x, bias, ctx.needs_input_grad[1]
    )
    return (
        dx if ctx.needs_input_grad[0] else None,
        dbias.to(bias.dtype) if ctx.needs_input_grad[1] else None,
    )


torch.library.register_autograd("blip2fast::bias_gelu", _autograd, setup_context=_setup_context)
