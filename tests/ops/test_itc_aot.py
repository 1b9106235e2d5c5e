"""The Triton kernels of the ITC sweep, compiled for GPUs that are not there.

BLIP-2's 32 queries of width 256 are in `test_kernels_compile.py`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from aot import SHARED_LIMIT_BYTES, Compiled, compile_kernel

from blip2fast.kernels.itc import backward, forward
from blip2fast.kernels.itc.config import (
    TritonConfig,
    backward_config,
    forward_config,
    shared_limit_bytes,
)
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled"),
]
NAMES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
KERNELS = {
    "forward": forward._itc_fwd_kernel,
    "image": backward._itc_bwd_image_kernel,
    "text": backward._itc_bwd_text_kernel,
}


def compile_itc(
    part: str,
    capability: int,
    *,
    saved: bool,
    Q: int = 32,
    D: int = 256,
    data: str = "*bf16",
    sample: bool = True,
    with_ids: bool = True,
) -> tuple[Compiled, TritonConfig]:
    """One of the three kernels with the tiles that a launch would choose."""
    itemsize = NAMES[data].itemsize
    if part == "forward":
        config = forward_config(Q, D, itemsize, capability)
    else:
        config = backward_config(Q, D, itemsize, capability, backward.loads_ahead(saved))
    types = {name: "*fp32" for name in KERNELS[part].arg_names if name.endswith("_ptr")}
    types |= {"image_ptr": data, "text_ptr": data, "arg_ptr": "*u8", "philox_ptr": "*i64"}
    types |= {"row_index_ptr": "*i32", "column_index_ptr": "*i32", "d_image_ptr": data}
    types |= dict.fromkeys(("M", "N", "first_row", "blocks_per_share"), "i32")
    types |= dict.fromkeys(("stride_image", "stride_query", "stride_text"), "i32:16")
    constants: dict[str, Any] = {
        "Q": Q,
        "D": D,
        "BLOCK_T": config.block_t,
        "BLOCK_I": config.block_i,
        "BLOCK_Q": config.block_q,
        "BLOCK_D": config.block_d,
        "OUT_D": config.out_d,
        "HAS_IDS": with_ids,
        "SAMPLE": sample,
        "SAVE": saved,
        "SAVED": saved,
        "LOCAL": True,
        "PRECISION": forward.precision(NAMES[data]),
    }
    types |= dict.fromkeys(("row_ids_ptr", "column_ids_ptr"), "*i64")
    if not with_ids:
        constants |= {"row_ids_ptr": None, "column_ids_ptr": None}
    if not sample:
        constants["philox_ptr"] = None
    names = KERNELS[part].arg_names
    compiled = compile_kernel(
        KERNELS[part],
        {k: v for k, v in types.items() if k in names and k not in constants},
        {k: v for k, v in constants.items() if k in names},
        capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return compiled, config


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("part", list(KERNELS))
@pytest.mark.parametrize(
    ("Q", "D", "data"),
    [(256, 256, "*bf16"), (5, 300, "*fp32"), (32, 1024, "*bf16"), (1, 16, "*bf16")],
)
def test_ends_of_the_range_fit(part: str, capability: int, Q: int, D: int, data: str) -> None:
    """Many queries may spill a few registers; no shape may ask for more shared memory than is."""
    compiled, config = compile_itc(part, capability, saved=False, Q=Q, D=D, data=data)
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[capability]
    assert compiled.resources["REG"] * 32 * config.num_warps <= 65536
    assert compiled.resources["STACK"] <= 128


@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize(("Q", "D"), [(64, 192), (128, 256)])
def test_cards_with_99_kb(Q: int, D: int, capability: int) -> None:
    """sm_120 is newer than sm_90 and has neither its products nor its shared memory."""
    assert SHARED_LIMIT_BYTES[capability] == shared_limit_bytes(capability) == 99 * 1024
    compiled, config = compile_itc("forward", capability, saved=True, Q=Q, D=D)
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[capability]
    assert compiled.resources["REG"] * 32 * config.num_warps <= 65536
    assert compiled.resources["STACK"] <= (0 if Q <= 64 else 128)
    assert "mma.sync" in compiled.ptx


def test_queries_stand_on_the_columns_of_the_product() -> None:
    """A maximum over 32 queries is 2 exchanges of 4 neighbours for every 2 of a thread's rows.

    Tile 128 x 128 on 8 warps, sm_90: a thread has 2 rows of 4 images: 8 maxima, 16 shuffles. With
    the query's index as well, twice as many; on the rows of the product it would be 129.
    """
    plain, config = compile_itc("forward", 90, saved=False, sample=False, with_ids=False)
    saving, _ = compile_itc("forward", 90, saved=True, sample=False, with_ids=False)
    assert (config.block_t, config.block_i * config.block_q) == (128, 128)
    assert saving.count("SHFL") - plain.count("SHFL") == 16
    # what only the statistics exchange is bounded by the gradient kernel, which has none of them
    text, tiles = compile_itc("text", 90, saved=False)
    rows = tiles.block_t * tiles.block_i // (32 * tiles.num_warps // 4)
    assert text.count("SHFL") == 2 * 2 * rows


@pytest.mark.parametrize("part", list(KERNELS))
def test_pairs_are_counted_in_64_bits(part: str) -> None:
    """What is saved of pair (i, j) lies at i * N + j, beyond 2^31 from N = 46,341 on."""
    compiled, _ = compile_itc(part, 90, saved=True)
    wide = re.findall(
        r"tt\.addptr [^:]*: tensor<[^>]*!tt\.ptr<(\w+)>[^>]*>, tensor<\w*x(i\d+)", compiled.ttgir
    )
    assert ("i8", "i64") in wide
    assert ("i8", "i32") not in wide
