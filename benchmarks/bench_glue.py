"""The ops between the large products against PyTorch's own, forward and backward.

R rows (queries and text tokens of a batch), C = 768, feed-forward width 3072, V = 30523 words.
Parameters are fp32, as they are in training; data is fp32 or bf16. "autocast": residuals are fp32
beside a bf16 product, and the result is wanted in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import Contender, Provider, Work, own_reasons
from shapes import GLUE_SHAPES, LM_SHAPES, RowsShape, cells
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.ops import bias_gelu, dropout_add_layer_norm, lm_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative norm from fp32; a GPU's fp32 products may be TF32
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
FFN = 4
AUTOCAST = "autocast"
# from the leaves to what is differentiated
Formula = Callable[..., Tensor | tuple[Tensor, ...]]


class Inputs:
    """Leaves of one call, and the gradients that come back to its results.

    Args:
        leaves: Data and parameters.
        formula: The definition.
        seed: Of the incoming gradients.
    """

    def __init__(self, leaves: list[Tensor], formula: Formula, seed: int) -> None:
        self.leaves = [x.requires_grad_() for x in leaves]
        self._formula = formula
        self._seed = seed

    @cached_property
    def douts(self) -> list[Tensor]:
        """Drawn once the results' shapes are known."""
        outs = results_of(self._formula, [x.detach() for x in self.leaves])
        generator = torch.Generator(outs[0].device).manual_seed(self._seed)
        return [
            torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
            if out.dim()
            else torch.ones_like(out)
            for out in outs
        ]

    @cached_property
    def truth(self) -> list[Tensor]:
        """Results and gradients in fp32."""
        leaves = [x.detach().float().requires_grad_() for x in self.leaves]
        return differentiate(self._formula, leaves, self.douts)

    @cached_property
    def errors(self) -> list[float]:
        """Relative errors of PyTorch's own functions in the type of the data.

        In bf16 on a CPU its LayerNorm's gradient of the weight was 3 % off at 1,000 rows.
        """
        return relative_errors(differentiate(self._formula, self.leaves, self.douts), self.truth)


def relative_errors(results: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Norm of each error over that of what is true."""
    return [
        float((found.float() - expected).norm() / expected.norm())
        for found, expected in zip(results, truth, strict=True)
    ]


def results_of(formula: Formula, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """One result or several."""
    results = formula(*leaves)
    return (results,) if isinstance(results, Tensor) else results


def differentiate(formula: Formula, leaves: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    outs = results_of(formula, leaves)
    incoming = [dout.to(out.dtype) for dout, out in zip(douts, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, incoming)]


def provider_of(formula: Formula, impl: str | None = None) -> Provider[Inputs]:
    """A provider of a formula, or of one of our backends."""

    def provider(inputs: Inputs) -> Contender:
        def call() -> list[Tensor]:
            return differentiate(formula, inputs.leaves, inputs.douts)

        return Contender({"": call if impl is None else lambda: own_reasons(impl, call)})

    return provider


def contenders(
    ours: Callable[[str], Formula], impls: tuple[str, ...], theirs: Formula, compiled: bool
) -> dict[str, Provider[Inputs]]:
    """Our backends by name, then PyTorch's functions, as they are and compiled."""
    found = {f"blip2fast {impl}": provider_of(ours(impl), impl) for impl in impls}
    found["torch"] = provider_of(theirs)
    if compiled:
        torch._dynamo.reset()
        found["torch.compile"] = provider_of(torch.compile(theirs, dynamic=False))
    return found


def agree(inputs: Inputs, results: list[Tensor]) -> None:
    """Raise AssertionError where a result is further from fp32 than rounding or PyTorch."""
    for found, expected in zip(results, inputs.truth, strict=True):
        assert found.shape == expected.shape, f"shapes {list(found.shape)}, {list(expected.shape)}"
    tolerance = TOLERANCE[inputs.leaves[0].dtype]
    for which, error in enumerate(relative_errors(results, inputs.truth)):
        bound = max(tolerance, 2 * inputs.errors[which])
        assert error < bound, f"result {which}: relative error {error:.1e}"


def leaf(seed: int, *size: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Random numbers in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    return scale * torch.randn(*size, generator=generator, device=device)


def by_dtype(table: Mapping[str, RowsShape], dtypes: Iterable[str] = DTYPES) -> list[Any]:
    """Shapes by dtype; on a GPU no fp32."""
    return [
        pytest.param(cell.values[0], dtype, marks=cell.marks, id=f"{cell.values[0]}-{dtype}")
        for cell in cells(table)
        for dtype in dtypes
        if table[cell.values[0]].where != "cuda" or dtype != "fp32"
    ]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("name", "dtype"), by_dtype(GLUE_SHAPES, (*DTYPES, AUTOCAST)))
def bench_dropout_add_layer_norm(
    name: str,
    dtype: str,
    p: float,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
) -> None:
    shape, kind = GLUE_SHAPES[name], DTYPES.get(dtype, torch.bfloat16)
    R, C, philox = shape.rows, shape.width, philox_state(0, device=device)
    stream = torch.float32 if dtype == AUTOCAST else kind

    def ours(rate: float) -> Callable[[str], Formula]:
        return lambda impl: (
            lambda x, residual, weight, bias: dropout_add_layer_norm(
                x,
                residual,
                weight,
                bias,
                dropout_p=rate,
                philox=philox,
                copy_dtype=x.dtype if dtype == AUTOCAST else None,
                impl=impl,
            )
        )

    def theirs(rate: float) -> Formula:
        def formula(
            x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
        ) -> Tensor | tuple[Tensor, Tensor]:
            total = F.dropout(x, rate, training=rate > 0) + residual
            # on CUDA data and parameters must be of one type
            weight, bias = weight.to(total.dtype), bias.to(total.dtype)
            out = F.layer_norm(total, (C,), weight, bias, 1e-12)
            return (out, out.to(x.dtype)) if dtype == AUTOCAST else out

        return formula

    def make_inputs(seed: int) -> Inputs:
        data = [leaf(2 * seed + i, R, C, device=device) for i in range(2)]
        leaves = [data[0].to(kind), data[1].to(stream)]
        return Inputs([*leaves, *(leaf(i, C, device=device) for i in range(2))], theirs(0.0), seed)

    impls, compiled = ("auto", "triton", "pytorch", "reference"), compiled and shape.headline
    x, rows = R * C * kind.itemsize, R * C * stream.itemsize
    # two in, one out; then three in, and one out that both inputs share where they can
    moved = 7 * x + (x if p else 0)
    if dtype == AUTOCAST:
        moved = 5 * x + 5 * rows  # as many, and a copy each way
    compare(
        contenders(ours(p), impls, theirs(p), compiled),
        make_inputs,
        agree,
        work=Work(20 * R * C, moved, x + 2 * rows),
        dtype=kind,
        judged=contenders(ours(0.0), impls, theirs(0.0), compiled) if p else None,
    )


@pytest.mark.parametrize(("name", "dtype"), by_dtype(GLUE_SHAPES))
def bench_bias_gelu(
    name: str, dtype: str, device: torch.device, compiled: bool, compare: Callable[..., None]
) -> None:
    shape, kind = GLUE_SHAPES[name], DTYPES[dtype]
    R, W = shape.rows, FFN * shape.width

    def ours(impl: str) -> Formula:
        return lambda x, bias: bias_gelu(x, bias, impl=impl)

    def theirs(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias.to(x.dtype))

    def make_inputs(seed: int) -> Inputs:
        data = leaf(seed, R, W, device=device).to(kind)
        return Inputs([data, leaf(seed, W, device=device)], theirs, seed)

    size = R * W * kind.itemsize
    compare(
        contenders(
            ours, ("auto", "triton", "pytorch", "reference"), theirs, compiled and shape.headline
        ),
        make_inputs,
        agree,
        work=Work(20 * R * W, 5 * size, 2 * size),  # one in, one out; then two in, one out
        dtype=kind,
    )


@pytest.mark.parametrize(("name", "dtype"), by_dtype(LM_SHAPES))
def bench_lm_cross_entropy(
    name: str, dtype: str, device: torch.device, compiled: bool, compare: Callable[..., None]
) -> None:
    shape, kind = LM_SHAPES[name], DTYPES[dtype]
    R, C, V = shape.rows, shape.width, shape.vocabulary
    labels = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(0)).to(device)

    def ours(impl: str) -> Formula:
        return lambda hidden, weight, bias: lm_cross_entropy(
            hidden, weight, bias, labels, impl=impl
        )[0]

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    def make_inputs(seed: int) -> Inputs:
        leaves = [
            leaf(seed, R, C, device=device).to(kind),
            leaf(seed, V, C, device=device, scale=0.02),
            leaf(seed + 1, V, device=device, scale=0.02),
        ]
        return Inputs(leaves, theirs, seed)

    hidden, weights = R * C * kind.itemsize, 4 * V * C
    compare(
        contenders(ours, ("auto", "chunked", "reference"), theirs, compiled and shape.headline),
        make_inputs,
        agree,
        # logits, and the gradients of both factors; weights in fp32 in, their gradient out
        work=Work(6 * R * C * V, 2 * (hidden + weights), hidden + weights),
        dtype=kind,
    )
