"""Dropout, residual and LayerNorm with PyTorch's own kernels, forward and backward.

What needs several passes goes over the data in pieces that stay in a cache. Shapes: R rows, C
width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blip2fast.kernels.dropout_add_layer_norm.reference import keep

# elements of a piece: 256 KB in fp32, a quarter of a core's second-level cache
_PIECE = 1 << 16


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    philox: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and what the backward pass needs.

    Returns:
        `(out [R, C], total [R, C], mean [R], rstd [R])`: `total` is the sum that was normalised,
        in the wider type of `x` and `residual`; it may be `x` itself.
    """
    total = _add(x, residual, x_bias, philox, dropout_p)
    wide = torch.promote_types(total.dtype, torch.float32)
    normed = total.to(_norm_dtype(total, out_dtype))
    # fp32 parameters beside half-precision data: the statistics are then kept in fp32
    out, mean, rstd = torch.native_layer_norm(
        normed, normed.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return out.to(out_dtype), total, mean.flatten(), rstd.flatten()


def backward(
    dout: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        dout: `[R, C]`.
        total, mean, rstd: As `forward` gave them.
        weight, philox, dropout_p: As they were.
        residual_dtype, x_dtype: Types of the gradients.
        apart: Whether the gradient of x is another than that of the residual.
        needs_parameters, needs_x_bias: Which sums over rows to compute.

    Returns:
        `(dresidual [R, C], dx [R, C], dweight [C], dbias [C], dx_bias [C])`; what was not asked
        for is empty, and dx where it is not `apart`. The last three are in fp32 or fp64.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    dtype = _norm_dtype(total, dout.dtype)
    asked = [True, needs_parameters, needs_parameters]
    weight = weight.to(wide)
    dtotal, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(dtype),
        total.to(dtype),
        total.shape[-1:],
        mean[:, None],
        rstd[:, None],
        weight,
        torch.empty_like(weight) if needs_parameters else None,
        asked,
    )
    nothing = weight.new_empty(0)
    dx = total.new_empty(0, dtype=x_dtype)
    if apart:
        dx = _drop(dtotal, philox, dropout_p, x_dtype)
    dresidual = dtotal.to(residual_dtype)
    dx_bias = (dx if apart else dresidual).sum(0, dtype=wide) if needs_x_bias else nothing
    if not needs_parameters:
        dweight = dbias = nothing
    elif total.shape[0] == 0:
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight)
    return dresidual, dx, dweight.to(wide), dbias.to(wide), dx_bias


def _norm_dtype(total: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """The type that `native_layer_norm` reads and writes."""
    # on a GPU it takes data and parameters of one type only
    if total.dtype == out_dtype and total.device.type == "cpu":
        return total.dtype
    return torch.promote_types(total.dtype, torch.float32)


def _add(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    philox: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`dropout(x + x_bias) + residual`."""
    if x_bias is None and philox is None:
        return x if residual is None else x + residual
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 / (1 - dropout_p)
    total = torch.empty(x.shape, dtype=dtype, device=x.device)
    for rows in _pieces(x):
        part = x[rows]
        if x_bias is not None:
            part = part.to(wide) + x_bias.to(wide)
        if philox is not None:
            part = part * _keep(part, philox, dropout_p, rows.start)
        if residual is None:
            torch.mul(part, scale, out=total[rows])
        else:
            torch.add(residual[rows], part, alpha=scale, out=total[rows])
    return total


def _drop(dtotal: Tensor, philox: Tensor | None, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """The gradient of what dropout was applied to."""
    if philox is None:
        return dtotal.to(dtype)
    dx = torch.empty(dtotal.shape, dtype=dtype, device=dtotal.device)
    for rows in _pieces(dtotal):
        part = dtotal[rows]
        kept = part * _keep(part, philox, dropout_p, rows.start)
        torch.mul(kept, 1 / (1 - dropout_p), out=dx[rows])
    return dx


def _keep(part: Tensor, philox: Tensor, dropout_p: float, first_row: int) -> Tensor:
    R, C = part.shape
    return keep(R, C, philox, dropout_p, first_row)


def _pieces(x: Tensor) -> Iterator[slice]:
    """Rows at a time: few on a CPU, all on a GPU."""
    R, C = x.shape
    step = max(1, _PIECE // max(C, 1)) if x.device.type == "cpu" else max(R, 1)
    for start in range(0, R, step):
        yield slice(start, min(start + step, R))
