"""What a sweep may launch: right at small sizes, and at full size what fits an H100."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import triton
from aot import SHARED_LIMIT_BYTES, Compiled, Launch, record_launches
from kernel_configurations import (
    BI,
    CASES,
    CAUSAL,
    UNI,
    Case,
    Configuration,
    CrossSize,
    Inputs,
    ITCSize,
    Outputs,
    RowsSize,
    SelfSize,
    cross_cases,
    gelu_cases,
    itc_cases,
    norm_cases,
    self_cases,
)

from blip2fast.kernels.qformer_attention import reference
from blip2fast.ops.dispatch import INTERPRETED

HALF = torch.float16
# tiles of 64 keys and one token more, images with 2 to 5 readers, heads that two go through
SMALL = [
    *self_cases("bidirectional", SelfSize((BI,), (5, 32, 0), heads=2, dtype=HALF)),
    *self_cases("multimodal", SelfSize((UNI, CAUSAL), (7, 22), heads=2, dtype=HALF)),
    *cross_cases("once", CrossSize(2, tokens=65, layers=2, heads=1, dtype=HALF)),
    *cross_cases("thrice", CrossSize(8, 3, tokens=65, layers=2, heads=1, dtype=HALF)),
    *norm_cases("rows", RowsSize(9, 33, dtype=HALF)),
    *gelu_cases("rows", RowsSize(9, 300, dtype=HALF)),
    *itc_cases("pairs", ITCSize(70, queries=8, width=32, dtype=HALF)),
]


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__, for_a_gpu=len(CASES))


def self_reference(inputs: Inputs) -> Outputs:
    """Of `self_forward`, or of `self_backward` where there is a gradient to start from."""
    qkv = inputs["qkv"].float().requires_grad_()
    names = ("layout", "scale", "dropout_p", "philox")
    out, lse = reference.qformer_attention(qkv, *(inputs[name] for name in names))
    if "dout" not in inputs:
        return out.detach(), lse.detach()
    return torch.autograd.grad(out, qkv, inputs["dout"].float())


@runs_kernels
@pytest.mark.parametrize(
    ("case", "dropout_p"),
    [
        pytest.param(case, p, id=f"{case.name}-{p}")
        for case in SMALL
        for p in ([0.0] if case.name.startswith(("gelu", "itc")) else [0.0, 0.3])
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_all_configurations_compute_the_same(case: Case, dropout_p: float) -> None:
    torch.manual_seed(0)
    inputs = case.make(DEVICE, dropout_p)
    expected = (case.reference or self_reference)(inputs)
    assert next(iter(case.configurations.items())) == ("default", {})
    for name, configuration in case.configurations.items():
        for place, (x, y) in enumerate(
            zip(case.run(inputs, configuration), expected, strict=False)
        ):
            assert x.shape == y.shape, (name, place)
            assert relative_error(x, y) < 4 * torch.finfo(HALF).eps, (name, place)


def test_images_are_read_as_often_as_tiles_make_a_difference() -> None:
    """Rows of an image that fit tiles of 64, of 128, and none."""
    for images in (8, 256):
        index = CrossSize(images, 3).index(DEVICE)
        assert index is not None
        rows = 32 * index.offsets.diff()
        assert rows.min() == 64
        assert ((64 < rows) & (rows <= 128)).any()
        assert rows.max() > 128


def relative_error(x: Tensor, y: Tensor) -> float:
    """Of all finite numbers together; what is not finite must be the same."""
    finite = y.isfinite()
    assert torch.equal(x[~finite].float(), y[~finite].float())
    return ((x - y)[finite].double().norm() / y[finite].double().norm()).item()


def test_configurations_differ_and_cases_say_their_work() -> None:
    assert len(set(names(CASES))) == len(CASES)
    for case in CASES:
        assert 5 <= len(case.configurations) <= 10
        assert len({str(x) for x in case.configurations.values()}) == len(case.configurations)
        assert case.bytes > 0
        assert (case.flops > 0) == case.name.startswith(("self", "cross", "itc"))


# Bytes of a thread's stack with Triton 3.6. Several dq fill the registers, and what is spilled is
# little of what a loop reads; a limit makes room for one more program.
SPILLED_BYTES = {
    "uses2_n64_w4_s2": 96,
    "uses3_n64_w4_s2": 256,
    "m64_w4_r168_joined": 48,
    "m32_n64_w2_s3_r200": 64,
    "m32_n32_w2_s4_r168": 48,
    "m64_n32_w4_s3_interleaved_r96": 32,
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_all_configurations_fit_an_h100(case: Case) -> None:
    """They were chosen by what Triton 3.6 spills; a later one may spill a few registers more."""
    more = 0 if triton.__version__.startswith("3.6") else 64
    seen: dict[object, Compiled] = {}
    for dropout_p in (0.0, 0.1):
        for name, configuration in case.configurations.items():
            for launch in launches(case, dropout_p, configuration):
                if launch.variant in seen:
                    continue
                compiled = seen[launch.variant] = launch.compile(90)
                assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[90], name
                assert compiled.resources["STACK"] <= SPILLED_BYTES.get(name, 0) + more, name
                assert compiled.resources["LOCAL"] == 0, name


def launches(case: Case, dropout_p: float, configuration: Configuration) -> list[Launch]:
    """What a case would launch; the forward pass that a backward one starts from is left out."""
    inputs: list[Inputs] = []
    record_launches(lambda: inputs.append(case.make("meta", dropout_p)))
    return record_launches(lambda: case.run(inputs[0], configuration))
