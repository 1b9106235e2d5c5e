"""The Q-Former's attentions, forward and with their gradients.

Rivals work on padded data with a mask where the token buffer has texts of their own lengths, and on
copies of an image's keys and values where several query blocks read it. Padding is not timed, the
copies are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attention_inputs import CrossInputs, Results, SelfInputs, cross_work, self_work
from attention_rivals import cross_providers, self_providers
from shapes import CROSS_SHAPES, SELF_SHAPES, Placed, cells

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative norm from the fp32 formula; a GPU's fp32 products may be TF32
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
DROPOUT = 0.1


def variants(table: Mapping[str, Placed]) -> list[Any]:
    """Shapes by dtype, direction and dropout; on a GPU bf16 alone."""
    params = []
    for cell in cells(table):
        (name,) = cell.values
        where = table[name].where
        for dtype in ("bf16",) if where == "cuda" else DTYPES:
            for direction in ("forward", "train"):
                rates = [0.0]
                if where == "test" or (where == "cuda" and direction == "train"):
                    rates.append(DROPOUT)
                params += [
                    pytest.param(
                        name,
                        dtype,
                        direction,
                        p,
                        marks=cell.marks,
                        id=f"{name}-{dtype}-{direction}" + ("-dropout" if p else ""),
                    )
                    for p in rates
                ]
    return params


def agree(inputs: SelfInputs | CrossInputs, results: Results) -> None:
    """Raise AssertionError where an output or gradient is not what the formula gives in fp32."""
    assert len(results) == len(inputs.truth)
    tolerance = TOLERANCE[results[0].dtype]
    for which, (found, expected) in enumerate(zip(results, inputs.truth, strict=True)):
        assert found.shape == expected.shape, f"result {which}: shape {list(found.shape)}"
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < tolerance, f"result {which}: relative error {error:.1e}"


@pytest.mark.parametrize(("name", "dtype", "direction", "p"), variants(SELF_SHAPES))
def bench_self(
    name: str,
    dtype: str,
    direction: str,
    p: float,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
) -> None:
    shape, kind, train = SELF_SHAPES[name], DTYPES[dtype], direction == "train"
    takes_part = compiled and shape.headline and not p
    compare(
        self_providers(p, takes_part),
        lambda seed: SelfInputs(shape, kind, device, train, seed),
        agree,
        work=self_work(shape, kind.itemsize, train),
        dtype=kind,
        judged=self_providers(0.0, takes_part) if p else None,
    )


@pytest.mark.parametrize(("name", "dtype", "direction", "p"), variants(CROSS_SHAPES))
def bench_cross(
    name: str,
    dtype: str,
    direction: str,
    p: float,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
) -> None:
    shape, kind, train = CROSS_SHAPES[name], DTYPES[dtype], direction == "train"
    takes_part = compiled and shape.headline and not p
    compare(
        cross_providers(p, takes_part),
        lambda seed: CrossInputs(shape, kind, device, train, seed),
        agree,
        work=cross_work(shape, kind.itemsize, train),
        dtype=kind,
        judged=cross_providers(0.0, takes_part) if p else None,
    )
