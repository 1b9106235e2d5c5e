"""The dropout mask in one Triton launch: the bits of the formula."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, GPU, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")
from blip2fast.kernels import keep_mask as kernel
from blip2fast.kernels import philox
from blip2fast.kernels.philox import keep_mask, philox_state, threshold


@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__, for_a_gpu=1)


@runs_kernels
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(
    ("columns", "first"), [(1, 0), (1, 3), (7, 2), (64, 0), (257, 1), (300, 6), (0, 0)]
)
def test_bits_of_the_formula(columns: int, first: int, p: float) -> None:
    state = philox_state(2**40 + 5, 2**32 - 1, DEVICE)
    rows = torch.tensor([0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1], device=DEVICE)
    heads = torch.tensor([0, 3, 2**32 - 1, 1, 2, 0], device=DEVICE)
    found = kernel.keep_mask(state, threshold(p), rows, heads, columns, first)
    expected = philox._keep(state, threshold(p), rows[:, None], heads[:, None], columns, first)
    assert found.shape == (6, columns)
    assert torch.equal(found, expected)


@runs_kernels
def test_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert kernel.keep_mask(philox_state(1, 0, DEVICE), 5, none, none, 8, 0).shape == (0, 8)


@runs_kernels
def test_op() -> None:
    state = philox_state(5, 2, DEVICE)
    rows = torch.arange(5, device=DEVICE)
    call = (state, rows, rows, threshold(0.4), 9, 1)
    torch.library.opcheck(torch.ops.blip2fast.philox_keep_mask.default, call)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_gpu_draws_the_mask_of_the_cpu() -> None:
    rows, heads = torch.arange(300), torch.arange(12)[:, None]
    expected = keep_mask(philox_state(7, 3), 0.1, rows, heads, 257)
    call = (philox_state(7, 3, "cuda"), 0.1, rows.cuda(), heads.cuda(), 257)
    assert torch.equal(keep_mask(*call).cpu(), expected)
    assert philox._launches(torch.device("cuda", 0)), "the kernel does not agree with the formula"
