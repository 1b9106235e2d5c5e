"""The Triton kernels of Q-Former attention: what is launched, and compiled for absent GPUs.

64 x 64 and 32 x 257, as BLIP-2 has them, are compiled in `test_kernels_compile.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from aot import SHARED_LIMIT_BYTES, Launch, record_launches

from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.kernels.tuned import formula_alone
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")
BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(function: Callable[[], object]) -> list[Launch]:
    """On an H100 by the formula; what may be tuned is in `test_kernel_configurations.py`."""
    with formula_alone():
        return record_launches(function)


def self_launches(
    N: int,
    Q: int,
    lengths: list[int],
    kind: MaskKind = MaskKind.BIDIRECTIONAL,
    *,
    width: int = 64,
    dtype: torch.dtype = BF16,
    p: float = 0.1,
) -> list[Launch]:
    """Forward and backward."""
    layout = AttentionLayout.build(N, Q, lengths, kind)
    qkv = meta(layout.num_rows, 3, 12, width, dtype=dtype)
    out, lse = qkv[:, 0].contiguous(), meta(layout.num_rows, 12, dtype=FP32)
    options: tuple[Any, ...] = (layout, 0.125, p, meta(2, dtype=torch.int64) if p else None)

    def both() -> None:
        self_forward(qkv, *options)
        self_backward(out, qkv, out, lse, *options)

    return launches(both)


def cross_launches(
    N: int,
    Q: int,
    B: int,
    S: int,
    *,
    indexed: bool = False,
    mask: bool = False,
    width: int = 64,
    dtype: torch.dtype = BF16,
    p: float = 0.1,
) -> list[Launch]:
    """Forward and backward, of one layer's slice of six."""
    q, kv = meta(N, Q, 12, width, dtype=dtype), meta(B, S, 6, 2, 12, width, dtype=dtype)[:, :, 1]
    index = KVIndex.build(torch.arange(N) % B, B) if indexed else None
    key_mask = meta(B, S, dtype=torch.bool) if mask else None
    options = (0.125, p, meta(2, dtype=torch.int64) if p else None)

    def both() -> None:
        cross_forward(q, kv, index, key_mask, N, *options)
        lse = meta(N, Q, 12, dtype=FP32)
        cross_backward(q, q, kv, q, lse, index, key_mask, *options)

    return launches(both)


def variants(several: list[list[Launch]]) -> set[Any]:
    return {launch.variant for some in several for launch in some}


def test_self_variants_do_not_grow() -> None:
    """Batch, text length and number of texts do not compile anything new within a tile's size."""
    sizes = [(N, T) for N in (1, 2, 3, 16, 17, 255, 1000) for T in (1, 5, 16, 31, 32)]
    kinds = (MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL)
    for kind in kinds:
        seen = variants([self_launches(N, 32, [T] * N, kind) for N, T in sizes])
        # one forward, one backward
        assert len(seen) == 2
    uneven = [self_launches(4, 32, [7] * n + [32], MaskKind.UNIMODAL) for n in (1, 3, 40, 500)]
    assert len(variants(uneven)) == 2
    # to the longest text there is: tiles of 64 and 128 keys, then loops, which are one variant
    longest = [self_launches(3, 32, [T] * 3) for T in range(1, 513)]
    assert len(variants(longest)) <= 6


def test_cross_variants_do_not_grow() -> None:
    sizes = [(B, uses) for B in (1, 2, 3, 16, 17, 255, 1000) for uses in (1, 2, 3, 9)]
    seen = variants([cross_launches(B * u, 32, B, 257, indexed=True) for B, u in sizes])
    # kernels: forward in parts or not, and putting parts together; backward three of them, of which
    # two in parts or not; tiles of 32 rows or more
    assert len(seen) <= 14
    more = [(B, uses) for B in range(1, 1200, 97) for uses in range(1, 12)]
    grown = variants([cross_launches(B * u, 32, B, 257, indexed=True) for B, u in more])
    assert len(seen | grown) == len(seen)
    windows = [cross_launches(B, 3, B, 15) for B in (1, 2, 3, 16, 1000, 65536)]
    assert len(variants(windows)) == 2
    # tokens: by what is left over after tiles
    tokens = [cross_launches(300, 32, 300, S) for S in range(1, 400)]
    assert len(variants(tokens)) <= 20


def check(launch: Launch, tensor_cores: bool = True) -> None:
    compiled = launch.compile(90)
    # what does not fit the registers
    assert compiled.resources["STACK"] == 0, f"{launch.kernel.__name__}: {compiled.resources}"
    assert compiled.resources["LOCAL"] == 0
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES[90]
    # sums in a fixed order
    assert not re.search(r"\batom\.|\bred\.global", compiled.ptx), launch.kernel.__name__
    # tiles of fewer than 64 rows use the older instruction everywhere
    instructions = ("wgmma.mma_async", "mma.sync")
    assert any(name in compiled.ptx for name in instructions) == tensor_cores
    if launch.constants.get("BLOCK_M") == 64 and tensor_cores:
        assert "wgmma.mma_async" in compiled.ptx


@pytest.mark.slow
def test_other_sizes_compile() -> None:
    """ITC with ITG, windows, long texts, a wide head in fp32, whose products use no tensor core."""
    for launch in self_launches(256, 32, [32] * 256, MaskKind.MULTIMODAL_CAUSAL):
        check(launch)
    for launch in cross_launches(65536, 3, 65536, 15):
        check(launch)
    for launch in self_launches(2, 256, [512, 512]):
        check(launch)
    for launch in cross_launches(2, 16, 2, 40, width=128, dtype=FP32, p=0.0):
        check(launch, tensor_cores=False)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_key_mask_is_loaded_as_bytes(p: float) -> None:
    """Triton 3.6 made operands 8 elements wide of them, more than a tile of 16 keys has.

    On an H200 outputs and gradients under dropout were then wrong in 16 bits.
    """
    for launch in cross_launches(2, 20, 2, 9, mask=True, width=48, dtype=torch.float16, p=p):
        compiled = launch.compile(90)
        assert "xi8" not in compiled.ttgir, launch.kernel.__name__
        widths = [int(x) for x in re.findall(r"kWidth = (\d+)", compiled.ttgir)]
        assert max(widths, default=0) <= 4
