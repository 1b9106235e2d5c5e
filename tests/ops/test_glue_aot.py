"""The Triton kernels of the glue ops, compiled for GPUs that are not there.

As they are launched under autocast at BLIP-2's sizes: `test_kernels_compile.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
from aot import SHARED_LIMIT_BYTES, Compiled, compile_kernel

from blip2fast.kernels.bias_gelu import backward as gelu_backward
from blip2fast.kernels.bias_gelu import forward as gelu_forward
from blip2fast.kernels.bias_gelu.config import TILE
from blip2fast.kernels.dropout_add_layer_norm import backward as norm_backward
from blip2fast.kernels.dropout_add_layer_norm import forward as norm_forward
from blip2fast.kernels.dropout_add_layer_norm.config import rows_config
from blip2fast.kernels.philox import threshold
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled"),
]
CAPABILITIES = [80, 90, 100]


def check(compiled: Compiled, wide_loads: bool) -> None:
    assert compiled.resources["LOCAL"] == 0
    assert compiled.resources["STACK"] == 0
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[compiled.capability]
    if wide_loads:
        # at least 8 bytes a thread at once
        assert "ld.global.v2" in compiled.ptx or "ld.global.v4" in compiled.ptx
        assert "st.global.v2" in compiled.ptx or "st.global.v4" in compiled.ptx


def compile_norm(C: int, capability: int, backward: bool, dropout: bool) -> Compiled:
    """Products and residuals in bf16."""
    config = rows_config(C)
    data = "*bf16"
    constants: dict[str, Any] = {
        "C": C,
        "BLOCK_R": config.block_r,
        "BLOCK_C": config.block_c,
        "DROPOUT": dropout,
        "THRESHOLD": threshold(0.1),
        "COPY": False,
    }
    types = {"weight_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "total_ptr": data}
    types |= {"R": "i32", "scale": "fp32"}
    if dropout:
        types["philox_ptr"] = "*i64"
    else:
        constants["philox_ptr"] = None
    if backward:
        types |= {"dout_ptr": data, "dresidual_ptr": data, "dx_ptr": data, "sums_ptr": "*fp32"}
        constants |= {"APART": dropout, "PARAMETERS": True, "X_BIAS": True}
        kernel = norm_backward._dropout_add_layer_norm_bwd_kernel
    else:
        types |= {"x_ptr": data, "residual_ptr": data, "out_ptr": data, "eps": "fp32"}
        types |= {"bias_ptr": "*fp32", "x_bias_ptr": "*fp32"}
        constants |= {"HAS_RESIDUAL": True, "HAS_X_BIAS": True}
        constants |= {"SAVE_TOTAL": True, "SAVE_STATISTICS": True}
        kernel = norm_forward._dropout_add_layer_norm_fwd_kernel
    if backward:
        constants["dcopy_ptr"] = None
    else:
        types["copy_ptr"] = data
    return compile_kernel(
        kernel, types, constants, capability, num_warps=config.num_warps, num_stages=3
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("C", "dropout"), [(64, True), (768, False), (768, True), (8192, True)])
@pytest.mark.parametrize("backward", [False, True])
def test_layer_norm_compiles(C: int, capability: int, backward: bool, dropout: bool) -> None:
    check(compile_norm(C, capability, backward, dropout), wide_loads=C >= 768)


def compile_gelu(width: int, capability: int, backward: bool) -> Compiled:
    data = "*bf16"
    types = {"x_ptr": data, "bias_ptr": "*fp32", "R": "i32"}
    constants: dict[str, Any] = {
        "F": width,
        "BLOCK_R": TILE.block_r,
        "BLOCK_F": TILE.block_f,
        "HAS_BIAS": True,
        "NARROW": True,
    }
    if backward:
        types |= {"dout_ptr": data, "dx_ptr": data, "sums_ptr": "*fp32"}
        constants["SUM"] = True
        kernel = gelu_backward._bias_gelu_bwd_kernel
    else:
        types["out_ptr"] = data
        kernel = gelu_forward._bias_gelu_fwd_kernel
    return compile_kernel(
        kernel, types, constants, capability, num_warps=TILE.num_warps, num_stages=3
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("backward", [False, True])
def test_gelu_of_a_width_that_no_tile_divides_compiles(capability: int, backward: bool) -> None:
    check(compile_gelu(100, capability, backward), wide_loads=False)
