"""The language-modelling head and its loss, without materialising the logits of all rows.

Shapes: R rows that have a label, C hidden width, V vocabulary size.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) is not used: its chunked path rejects label
smoothing, it does not count correct predictions, and it causes a graph break in `torch.compile`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2fast.kernels.lm_cross_entropy import chunked
from blip2fast.kernels.lm_cross_entropy.reference import reference
from blip2fast.kernels.precision import wide_dtype
from blip2fast.ops.checks import check_like, check_rows
from blip2fast.ops.dispatch import AS_DEFINED, Backend, choose, no_reasons
from blip2fast.ops.linear import is_quicker, onednn_product
from blip2fast.ops.second_derivatives import once_differentiable


@dataclass(frozen=True)
class LMCrossEntropyCall:
    """An `lm_cross_entropy` call, described for the choice of a backend."""

    words: int
    dtype: torch.dtype
    device: str


BACKENDS: tuple[Backend[LMCrossEntropyCall], ...] = (
    Backend("chunked", no_reasons, no_reasons),
    Backend("reference", no_reasons, lambda call: [AS_DEFINED]),
)


def lm_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, label_smoothing=...)`.

    The mean over the labels that are not ignored; NaN if there are none. Logits are computed for
    one chunk of rows at a time. Required gradients are computed in the forward pass, up to the
    factor that the backward pass supplies, so no matmul is repeated; a frozen `weight` or `bias`
    gets none. Statistics are in fp32 (fp64 for fp64 data).

    Matmuls run in the dtype of `hidden`, or in autocast's dtype under autocast; `weight` may stay
    in fp32 next to a narrower `hidden`, and its gradient is then accumulated in fp32.

    Args:
        hidden: `[R, C]`, fp16, bf16, fp32 or fp64.
        weight: `[V, C]`; the word embeddings if they are tied.
        bias: `[V]`, or None.
        labels: `[R]` int64, 0 to V - 1 or `ignore_index`.
        label_smoothing: s, 0 to 1: a target is `(1 - s) * label + s / V`.
        ignore_index: Label of rows to ignore.
        chunk_bytes: Most bytes of logits in memory at once; the default was the fastest measured.
        impl: `"auto"`, `"chunked"` or `"reference"`.

    Returns:
        `(loss, correct)`: the scalar loss, fp32 or fp64; and the number of labels whose logit is
        the largest (ties count), scalar int64, without gradient.

    Raises:
        ValueError: a shape, type, device, option or label (checked on the CPU only) does not fit.
        NotImplementedError: the requested backend does not support the call; says why.
    """
    _check(hidden, weight, bias, labels, label_smoothing, chunk_bytes)
    device = hidden.device.type
    call = LMCrossEntropyCall(weight.shape[0], hidden.dtype, device)
    impl = choose("lm_cross_entropy", BACKENDS, call, impl)
    if impl == "reference":
        return reference(hidden, weight, bias, labels, label_smoothing, ignore_index)
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    learning = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        loss, correct, *_ = torch.ops.blip2fast.lm_cross_entropy(
            hidden.contiguous(),
            weight,
            bias,
            labels,
            label_smoothing,
            ignore_index,
            chunked.DEFAULT_BYTES[device == "cpu"] if chunk_bytes is None else chunk_bytes,
            learning and hidden.requires_grad,
            learning and weight.requires_grad,
            learning and bias is not None and bias.requires_grad,
        )
    return loss, correct


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    chunk_bytes: int | None,
) -> None:
    check_rows("hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected [V, C], V above 0, got {list(weight.shape)}")
    check_like("weight", weight, (weight.shape[0], hidden.shape[1]), hidden)
    check_like("bias", bias, (weight.shape[0],), hidden)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected [R] = {[hidden.shape[0]]} int64 like the rows of hidden, got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected on {hidden.device} like hidden, got {labels.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected above 0, got {chunk_bytes}")


torch.library.define(
    "blip2fast::lm_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float label_smoothing, "
    "int ignore_index, int chunk_bytes, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor correct, Tensor count, Tensor dhidden, Tensor dweight, Tensor dbias)",
)
torch.library.define(
    "blip2fast::lm_cross_entropy_grad",
    "(Tensor dloss, Tensor count, Tensor dhidden, Tensor dweight, Tensor dbias, "
    "ScalarType weight_dtype, ScalarType bias_dtype) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("blip2fast::lm_cross_entropy", "CompositeExplicitAutograd")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    chunk_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    if labels.device.type == "cpu":
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))
        if wrong.any():
            raise ValueError(
                f"labels: expected 0 to {weight.shape[0] - 1} or ignore_index={ignore_index}, got "
                f"{labels[wrong][:8].tolist()}"
            )
    return chunked.forward(
        hidden,
        weight,
        bias,
        labels,
        label_smoothing,
        ignore_index,
        chunk_bytes,
        needs_hidden,
        needs_weight,
        needs_bias,
        product=_product if is_quicker(hidden, weight) else None,
    )


def _product(a: Tensor, b: Tensor, offset: Tensor | None) -> Tensor:
    return onednn_product(a, b.t(), offset)


@torch.library.register_fake("blip2fast::lm_cross_entropy")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    chunk_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    wide = wide_dtype(hidden.dtype)
    weight_dtype = chunked.weight_grad_dtype(hidden.dtype, weight.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        labels.new_empty(()),
        labels.new_empty(()),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        hidden.new_empty(weight.shape if needs_weight else (0,), dtype=weight_dtype),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=wide),
    )


@torch.library.impl("blip2fast::lm_cross_entropy_grad", "CompositeExplicitAutograd")
def _backward(
    dloss: Tensor,
    count: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    dtypes = (dhidden.dtype, weight_dtype, bias_dtype)
    return chunked.backward(dloss, count, (dhidden, dweight, dbias), dtypes)


@torch.library.register_fake("blip2fast::lm_cross_entropy_grad")
def _backward_fake(
    dloss: Tensor,
    count: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(dhidden),
        torch.empty_like(dweight, dtype=weight_dtype),
        torch.empty_like(dbias, dtype=bias_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, *_ = inputs
    _, correct, count, dhidden, dweight, dbias = output
    ctx.mark_non_differentiable(correct, count, dhidden, dweight, dbias)
    ctx.set_materialize_grads(False)
    ctx.types = weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.save_for_backward(count, dhidden, dweight, dbias)


@once_differentiable("lm_cross_entropy")
def _autograd(ctx: Any, dloss: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    count, *gradients = ctx.saved_tensors
    scaled = torch.ops.blip2fast.lm_cross_entropy_grad(dloss, count, *gradients, *ctx.types)
    needed = [x if needs else None for x, needs in zip(scaled, ctx.needs_input_grad, strict=False)]
    return (*needed, *[None] * 7)


torch.library.register_autograd(
    "blip2fast::lm_cross_entropy", _autograd, setup_context=_setup_context
)
