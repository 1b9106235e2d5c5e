"""Dropout, residual and LayerNorm after a linear layer, fused into one pass each way.

`LayerNorm(dropout(x) + residual)` closes every block of the Q-Former (post-norm, as in BERT).
Shapes: R rows, C hidden width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, overload

import torch
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm import pytorch, reference
from blip2fast.kernels.precision import wide_dtype
from blip2fast.ops.calls import DropoutAddLayerNormCall
from blip2fast.ops.checks import FLOATS, MAX_WIDTH, check_dropout, check_like, check_rows
from blip2fast.ops.dispatch import (
    AS_DEFINED,
    Backend,
    KernelCheck,
    choose,
    no_reasons,
    triton_reasons,
)
from blip2fast.ops.kernel_kinds import device_of, norm_kind
from blip2fast.ops.second_derivatives import once_differentiable


def _triton_reasons(call: DropoutAddLayerNormCall) -> list[str]:
    reasons = triton_reasons(call.device, *call.dtypes)
    if call.width > MAX_WIDTH:
        reasons.append(f"width {call.width}: at most {MAX_WIDTH}")
    return reasons


BACKENDS: tuple[Backend[DropoutAddLayerNormCall], ...] = (
    Backend(
        "triton",
        _triton_reasons,
        no_reasons,
        KernelCheck(
            "dropout_add_layer_norm",
            norm_kind,
            device_of,
            "blip2fast.ops.kernel_cases:norm_problem",
        ),
    ),
    Backend("pytorch", no_reasons, no_reasons),
    Backend("reference", no_reasons, lambda call: [AS_DEFINED]),
)


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = ...,
    eps: float = ...,
    dropout_p: float = ...,
    philox: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
    copy_dtype: None = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = ...,
    eps: float = ...,
    dropout_p: float = ...,
    philox: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
    copy_dtype: torch.dtype,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.layer_norm(F.dropout(x + x_bias, dropout_p) + residual, (C,), weight, bias, eps)`.

    Computed in fp32 (fp64 for fp64 data). Saved for the backward pass: the input of the LayerNorm
    (nothing extra if that is x) and two statistics per row; the dropout mask is regenerated.
    Gradients of `weight`, `bias` and `x_bias` are summed in a fixed order.

    Dtypes depend on the arguments alone; autocast has no effect.

    Args:
        x: `[R, C]`, fp16, bf16, fp32 or fp64.
        residual: `[R, C]`, of any of these types, or None.
        weight, bias: `[C]`, of the LayerNorm; fp32 parameters go with data of any type.
        x_bias: `[C]`, added to x before dropout: the bias of the linear layer that made x.
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of `x + x_bias`, 0 to below 1.
        philox: `[2]` int64 seed and offset of the dropout mask (`ops.philox.philox_state`), a
            different offset for each use; required if `dropout_p` is above 0. In the mask's
            counter, the row is the row of x and the head is 0.
        out_dtype: Dtype of the result; by default the wider one of `x` and `residual`, in which
            the sum is also saved.
        copy_dtype: Dtype of a second copy of the result, written in the same pass: the residual
            stream stays in fp32 while the next matmul reads 16 bits. Gradients of both are summed
            in fp32. None: no copy.
        impl: `"auto"`, `"triton"`, `"pytorch"` or `"reference"`.

    Returns:
        `[R, C]`, or with `copy_dtype` that and its copy `[R, C]`.

    Raises:
        ValueError: a shape, type, device or option does not fit.
        NotImplementedError: the requested backend does not support the call; says why.
    """
    check_rows("x", x)
    check_like("residual", residual, tuple(x.shape), x)
    width = (x.shape[1],)
    for name, row in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        check_like(name, row, width, x)
    check_dropout(dropout_p, philox, x)
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out_dtype = sum_dtype if out_dtype is None else out_dtype
    for name, dtype in (("out_dtype", out_dtype), ("copy_dtype", copy_dtype)):
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {dtype}")
    dtypes = (x.dtype, sum_dtype, out_dtype, copy_dtype or out_dtype)
    device = x.device
    call = DropoutAddLayerNormCall(
        width=x.shape[1],
        dtypes=dtypes,
        device=device.type,
        dropout=dropout_p > 0,
        gpu=device.index,
        parameters=weight.dtype,
    )
    impl = choose("dropout_add_layer_norm", BACKENDS, call, impl)
    philox = philox if dropout_p > 0 else None
    if impl == "reference" or (impl == "pytorch" and philox is None):
        if impl == "reference":
            out = reference.dropout_add_layer_norm(
                x, residual, weight, bias, x_bias, eps, dropout_p, philox, out_dtype
            )
        else:
            out = pytorch.without_dropout(x, residual, weight, bias, x_bias, eps, out_dtype)
        return out if copy_dtype is None else (out, out.to(copy_dtype))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    inputs = (x, residual, weight, bias, x_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, copy, *_ = torch.ops.blip2fast.dropout_add_layer_norm(
        *inputs, philox, eps, dropout_p, out_dtype, copy_dtype, save, impl
    )
    return out if copy_dtype is None else (out, copy)


torch.library.define(
    "blip2fast::dropout_add_layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? x_bias, Tensor? philox, "
    "float eps, float dropout_p, ScalarType out_dtype, ScalarType? copy_dtype, bool save, "
    "str impl) -> (Tensor out, Tensor copy, Tensor total, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "blip2fast::dropout_add_layer_norm_grad",
    "(Tensor dout, Tensor? dcopy, Tensor total, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor? philox, float dropout_p, ScalarType residual_dtype, ScalarType x_dtype, bool apart, "
    "bool needs_parameters, bool needs_x_bias, str impl) "
    "-> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias, Tensor dx_bias)",
)


def _backend(impl: str) -> Any:
    """The functions `forward` and `backward` of a backend."""
    if impl == "triton":
        # imported on first use: Triton is optional
        from blip2fast.kernels.dropout_add_layer_norm import backward, forward

        return SimpleNamespace(forward=forward.forward, backward=backward.backward)
    return pytorch


@torch.library.impl("blip2fast::dropout_add_layer_norm", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    philox: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    save: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    out, copy, total, mean, rstd = _backend(impl).forward(
        x, residual, weight, bias, x_bias, philox, eps, dropout_p, out_dtype, copy_dtype, save
    )
    if not save:
        return out, copy, x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    # a custom op must not return one of its inputs
    return out, copy, x.new_empty(0) if total is x else total, mean, rstd


@torch.library.register_fake("blip2fast::dropout_add_layer_norm")
def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    philox: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    save: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    kept = save and not _is_x(residual, x_bias, philox)
    rows = (x.shape[0],) if save else (0,)
    wide = wide_dtype(dtype)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape if copy_dtype else (0,), dtype=copy_dtype or out_dtype),
        x.new_empty(x.shape if kept else (0,), dtype=dtype),
        x.new_empty(rows, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _is_x(residual: Tensor | None, x_bias: Tensor | None, philox: Tensor | None) -> bool:
    """Whether the LayerNorm's input is x itself."""
    return residual is None and x_bias is None and philox is None


@torch.library.impl("blip2fast::dropout_add_layer_norm_grad", "CompositeExplicitAutograd")
def _backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, impl = arguments
    return tuple(_backend(impl).backward(dout, *others))


@torch.library.register_fake("blip2fast::dropout_add_layer_norm_grad")
def _backward_fake(
    dout: Tensor,
    dcopy: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    philox: Tensor | None,
    dropout_p: float,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype,
    apart: bool,
    needs_parameters: bool,
    needs_x_bias: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    wide, C = wide_dtype(total.dtype), weight.shape[0]
    return (
        total.new_empty(total.shape, dtype=residual_dtype),
        total.new_empty(total.shape if apart else (0,), dtype=x_dtype),
        total.new_empty(C if needs_parameters else 0, dtype=wide),
        total.new_empty(C if needs_parameters else 0, dtype=wide),
        total.new_empty(C if needs_x_bias else 0, dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, x_bias, philox, _, ctx.dropout_p, _, copy_dtype, _, ctx.impl = inputs
    _, copy, total, mean, rstd = output
    empty = () if copy_dtype else (copy,)
    ctx.mark_non_differentiable(total, mean, rstd, *empty)
    ctx.set_materialize_grads(False)
    ctx.types = [None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias)]
    total = x if _is_x(residual, x_bias, philox) else total
    ctx.save_for_backward(total, mean, rstd, weight, philox)


@once_differentiable("dropout_add_layer_norm")
def _autograd(
    ctx: Any, dout: Tensor | None, dcopy: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None:
        dout, dcopy = dcopy, None
    if dout is None:
        return (None,) * 12
    *tensors, philox = ctx.saved_tensors
    x_dtype, residual_dtype, weight_dtype, bias_dtype, x_bias_dtype = ctx.types
    residual_dtype = residual_dtype or x_dtype
    apart = philox is not None or residual_dtype != x_dtype
    needs = ctx.needs_input_grad
    dresidual, dx, dweight, dbias, dx_bias = torch.ops.blip2fast.dropout_add_layer_norm_grad(
        dout.contiguous(),
        None if dcopy is None else dcopy.contiguous(),
        *tensors,
        philox,
        ctx.dropout_p,
        residual_dtype,
        x_dtype,
        apart,
        needs[2] or needs[3],
        needs[4],
        ctx.impl,
    )
    return (
        (dx if apart else dresidual) if needs[0] else None,
        dresidual if needs[1] else None,
        dweight.to(weight_dtype) if needs[2] else None,
        dbias.to(bias_dtype) if needs[3] else None,
        dx_bias.to(x_bias_dtype) if needs[4] else None,
        *[None] * 7,
    )


torch.library.register_autograd(
    "blip2fast::dropout_add_layer_norm", _autograd, setup_context=_setup_context
)
