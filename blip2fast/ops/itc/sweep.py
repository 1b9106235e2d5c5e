"""The ITC sweep as a PyTorch op: one pass over all pairs, on a named backend.

`kernels/itc/interface.py` defines its inputs and outputs; `ops/itc/loss.py` computes the loss.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from blip2fast._extension import why_not
from blip2fast.kernels.cuda_needs import gpu_reasons, readable
from blip2fast.kernels.itc import chunked, reference
from blip2fast.kernels.itc.cpu import sweep as cpu
from blip2fast.kernels.itc.interface import (
    DIFFERENTIABLE,
    LSE,
    Options,
    Pairs,
    Sweep,
    Weights,
    index_dtype,
    statistics_shape,
)
from blip2fast.kernels.precision import wide_dtype
from blip2fast.ops.calls import ITCCall
from blip2fast.ops.dispatch import (
    ALL_PAIRS,
    Backend,
    KernelCheck,
    cuda_reasons,
    no_reasons,
    triton_reasons,
)
from blip2fast.ops.kernel_kinds import device_of, itc_kind
from blip2fast.ops.linear import onednn_product, takes_onednn
from blip2fast.ops.second_derivatives import once_differentiable

WHY_NO_CUDA = why_not("itc_sweep")


def _kernel_reasons(call: ITCCall) -> list[str]:
    """Why none of the hand-written kernels can run the call."""
    reasons = []
    if call.legacy_epsilon:
        reasons.append(f"legacy_epsilon {call.legacy_epsilon}: only 0")
    if not 16 <= call.width <= 1024:
        reasons.append(f"feature width {call.width}: only 16 to 1024")
    if call.queries > 256:
        reasons.append(f"{call.queries} queries: at most 256")
    return reasons


def _cuda_reasons(call: ITCCall) -> list[str]:
    reasons = _kernel_reasons(call)
    if call.width > 256 or call.width % 8:
        reasons.append(f"feature width {call.width}: only multiples of 8 up to 256")
    if call.queries > 32:
        reasons.append(f"{call.queries} queries: at most 32")
    reasons += gpu_reasons("features", call.device, call.capability)
    return reasons + cuda_reasons(call.dtype, WHY_NO_CUDA)


def _triton_reasons(call: ITCCall) -> list[str]:
    return _kernel_reasons(call) + triton_reasons(call.device, call.dtype, what="features")


_CHECK: KernelCheck[ITCCall] = KernelCheck(
    "itc", itc_kind, device_of, "blip2fast.ops.kernel_cases:itc_problem"
)
BACKENDS: tuple[Backend[ITCCall], ...] = (
    Backend("cuda", _cuda_reasons, no_reasons, _CHECK),
    Backend("triton", _triton_reasons, no_reasons, _CHECK),
    Backend("chunked", no_reasons, no_reasons),
    Backend("reference", no_reasons, lambda call: [ALL_PAIRS]),
)

torch.library.define(
    "blip2fast::itc_sweep",
    "(Tensor image, Tensor text, Tensor temp, Tensor? row_ids, Tensor? column_ids, "
    "Tensor? philox, SymInt first_row, bool local, bool legacy, bool save, ScalarType? products, "
    "str impl) -> "
    "(Tensor rows, Tensor columns, Tensor row_index, Tensor column_index, Tensor sim, Tensor arg)",
)
torch.library.define(
    "blip2fast::itc_sweep_grad",
    "(Tensor image, Tensor text, Tensor temp, Tensor row_lse, Tensor row_weight, "
    "Tensor column_lse, Tensor column_weight, Tensor? row_ids, Tensor? column_ids, "
    "SymInt first_row, bool local, Tensor sim, Tensor arg, str impl) -> "
    "(Tensor d_image, Tensor d_text, Tensor d_temp)",
)


def _backend(impl: str, device: str) -> Any:
    """The functions `sweep` and `sweep_grad` of a backend on a kind of device."""
    if impl == "triton":
        # imported on first use: Triton is optional
        from blip2fast.kernels.itc import backward, forward

        return SimpleNamespace(sweep=forward.sweep, sweep_grad=backward.sweep_grad)
    if impl == "chunked" and device == "cpu":
        return SimpleNamespace(
            sweep=partial(cpu.sweep, product=_product),
            sweep_grad=partial(chunked.sweep_grad, config=cpu.TILES),
        )
    return {"reference": reference, "chunked": chunked}[impl]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T`."""
    return onednn_product(a, b) if takes_onednn(a, b) else a @ b.T


def _rounded(features: Tensor, products: torch.dtype | None) -> Tensor:
    return features if products is None else features.to(products)


@torch.library.impl("blip2fast::itc_sweep", "CompositeExplicitAutograd")
def _sweep(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    philox: Tensor | None,
    first_row: int,
    local: bool,
    legacy: bool,
    save: bool,
    products: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, ...]:
    image, text = _rounded(image, products), _rounded(text, products)
    if impl == "cuda":
        found: tuple[Tensor, ...] = torch.ops.blip2fast_C.itc_sweep(
            readable(image), readable(text), temp, row_ids, column_ids, philox, first_row, save
        )
        return found
    pairs = Pairs(first_row, row_ids, column_ids)
    options = Options(philox, legacy, save)
    return tuple(_backend(impl, image.device.type).sweep(image, text, temp, pairs, options))


@torch.library.register_fake("blip2fast::itc_sweep")
def _sweep_fake(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    philox: Tensor | None,
    first_row: int,
    local: bool,
    legacy: bool,
    save: bool,
    products: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, ...]:
    (M, Q, _), N, dtype = image.shape, text.shape[0], wide_dtype(image.dtype)
    values, indices = statistics_shape(legacy)
    kept = (M, N) if save else (0, 0)
    return (
        image.new_empty(values, M, dtype=dtype),
        image.new_empty(values, N, dtype=dtype),
        image.new_empty(indices, M, dtype=torch.int64),
        image.new_empty(indices, N, dtype=torch.int64),
        image.new_empty(kept, dtype=dtype),
        image.new_empty(kept, dtype=index_dtype(Q)),
    )


@torch.library.impl("blip2fast::itc_sweep_grad", "CompositeExplicitAutograd")
def _sweep_grad(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    local: bool,
    sim: Tensor,
    arg: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "cuda":
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.blip2fast_C.itc_sweep_grad(
            readable(image),
            readable(text),
            temp,
            row_lse,
            row_weight,
            column_lse,
            column_weight,
            row_ids,
            column_ids,
            first_row,
            local,
            sim,
            arg,
        )
        return grads
    pairs = Pairs(first_row, row_ids, column_ids)
    sides = Weights(row_lse, row_weight), Weights(column_lse, column_weight)
    d_image, d_text, d_temp = _backend(impl, image.device.type).sweep_grad(
        image, text, temp, pairs, sides, local, (sim, arg)
    )
    return d_image, d_text, d_temp


@torch.library.register_fake("blip2fast::itc_sweep_grad")
def _sweep_grad_fake(image: Tensor, text: Tensor, temp: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format),
        torch.empty_like(text, memory_format=torch.contiguous_format),
        torch.empty_like(temp),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, temp, row_ids, column_ids, _, ctx.first_row, ctx.local, *_ = inputs
    ctx.products, ctx.impl = inputs[-2:]
    swept = Sweep(*output)
    # a zero gradient materialised for `sim` would be [M, N]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, temp, row_ids, column_ids, *swept)


@once_differentiable("itc_loss")
def _backward(
    ctx: Any, d_rows: Tensor | None, d_columns: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor | None, ...]:
    image, text, temp, row_ids, column_ids, *output = ctx.saved_tensors
    swept = Sweep(*output)
    row_weight, column_weight = (
        torch.zeros_like(x[:DIFFERENTIABLE]) if dx is None else dx[:DIFFERENTIABLE].contiguous()
        for x, dx in ((swept.rows, d_rows), (swept.columns, d_columns))
    )
    types = [x.dtype for x in (image, text, temp)]
    image, text = _rounded(image, ctx.products), _rounded(text, ctx.products)
    scale = None
    if image.dtype.itemsize == 2:
        # a pair's gradient is about 1 / N^2, which underflows in 16 bits: scale it near 1 by a
        # power of two, which is exact, and scale back in fp32
        most = torch.maximum(row_weight.abs().amax(), column_weight.abs().amax())
        scale = torch.where(most > 0, most / torch.frexp(most).mantissa, 1.0)
        row_weight, column_weight = row_weight / scale, column_weight / scale
    grads = torch.ops.blip2fast.itc_sweep_grad(
        image,
        text,
        temp,
        swept.rows[LSE],
        row_weight,
        swept.columns[LSE],
        column_weight,
        row_ids,
        column_ids,
        ctx.first_row,
        ctx.local,
        swept.sim,
        swept.arg,
        ctx.impl,
    )
    if scale is not None:
        grads = [(x.float() * scale).to(kind) for x, kind in zip(grads, types, strict=True)]
    return (*grads, *[None] * 9)


torch.library.register_autograd("blip2fast::itc_sweep", _backward, setup_context=_setup_context)
