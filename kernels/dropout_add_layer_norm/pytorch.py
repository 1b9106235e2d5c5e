"""Dropout, residual and LayerNorm with PyTorch's own kernels. Shapes: R rows, C width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm.reference import keep


def without_dropout(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The op as differentiable PyTorch functions, which `torch.compile` can fuse; `[R, C]`."""
    if x_bias is not None:
        x = x + _as(x_bias, x.dtype)
    total = x if residual is None else x + residual
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = _as(total, _norm_dtype(total, out_dtype))
    # fp32 parameters with half-precision data: statistics are then in fp32
    weight, bias = _as(weight, wide), _as(bias, wide)
    return _as(F.layer_norm(normed, normed.shape[-1:], weight, bias, eps), out_dtype)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    philox: Tensor,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, its copy and the tensors that the backward pass needs.

    Returns:
        `(out [R, C], copy [R, C], total [R, C], mean [R], rstd [R])`: `copy` is empty without
        `copy_dtype`; `total` is the LayerNorm's input, in the wider type of `x` and `residual`.
    """
    total = x if x_bias is None else x + x_bias.to(x.dtype)
    kept, scale = _keep(x, philox, dropout_p), 1 / (1 - dropout_p)
    if residual is None:
        total = torch.ops.aten.native_dropout_backward(total, kept, scale)
    else:
        total = torch.addcmul(residual, total, kept, value=scale)
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = total.to(_norm_dtype(total, out_dtype))
    out, mean, rstd = torch.native_layer_norm(
        normed, normed.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    # a separate output even if the dtypes are the same
    copy = x.new_empty(0, dtype=out_dtype) if copy_dtype is None else out.to(copy_dtype, copy=True)
    return out.to(out_dtype), copy, total, mean.flatten(), rstd.flatten()


def backward(
    dout: Tensor,
    dcopy: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    philox: Tensor,
    dropout_p: float,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype,
    apart: bool,
    needs_parameters: bool,
    needs_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        dout: `[R, C]`, gradient of the output.
        dcopy: `[R, C]`, gradient of its copy, or None.
        total, mean, rstd: As returned by `forward`.
        weight, philox, dropout_p: As passed to `forward`.
        residual_dtype, x_dtype: Dtypes of the gradients.
        apart: Whether the gradients of x and of the residual differ; true under dropout.
        needs_parameters, needs_x_bias: Which sums over rows to compute.

    Returns:
        `(dresidual [R, C], dx [R, C], dweight [C], dbias [C], dx_bias [C])`; the sums are in fp32
        or fp64, and empty if not requested.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    if dcopy is not None:
        dout = dout.to(torch.promote_types(dout.dtype, torch.float32)) + dcopy
    dtype, weight = _norm_dtype(total, dout.dtype), weight.to(wide)
    dtotal, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(dtype),
        total.to(dtype),
        total.shape[-1:],
        mean[:, None],
        rstd[:, None],
        weight,
        weight if needs_parameters else None,
        [True, needs_parameters, needs_parameters],
    )
    kept, scale = _keep(total, philox, dropout_p), 1 / (1 - dropout_p)
    dx = torch.ops.aten.native_dropout_backward(dtotal, kept, scale).to(x_dtype)
    nothing = weight.new_empty(0)
    return (
        dtotal.to(residual_dtype),
        dx,
        dweight.to(wide) if needs_parameters else nothing,
        dbias.to(wide) if needs_parameters else nothing,
        dx.sum(0, dtype=wide) if needs_x_bias else nothing,
    )


def _norm_dtype(total: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which PyTorch's LayerNorm runs."""
    # on a GPU, data and parameters must have the same dtype
    if total.dtype == out_dtype and total.device.type == "cpu":
        return total.dtype
    return torch.promote_types(total.dtype, torch.float32)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without the microsecond that a no-op call costs."""
    return x if x.dtype == dtype else x.to(dtype)


def _keep(x: Tensor, philox: Tensor, dropout_p: float) -> Tensor:
    R, C = x.shape
    return keep(R, C, philox, dropout_p)
