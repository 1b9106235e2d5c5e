"""Checks of the CUDA kernels, emulated on the host: the whole way but for the compiler's code."""

from __future__ import annotations

from pathlib import Path

import pytest
from extension_build import build_extension, build_target, needs_compiler

from blip2fast._extension import has_op
from blip2fast.ops.kernel_checks import Checks, Request

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not has_op("itc_sweep"), reason="no operators of CUDA here"),
]
KINDS = [
    ("qformer_cross_attention", "dtype=bf16 width=16 queries=5 keys=17 index=0 mask=1 dropout=1"),
    ("qformer_cross_attention", "dtype=fp16 width=64 queries=3 keys=81 index=1 mask=0 dropout=0"),
    ("itc_loss", "dtype=fp16 width=24 queries=5 ids=1"),
    ("itc_loss", "dtype=bf16 width=16 queries=2 ids=0"),
]


def test_the_cuda_kernels_are_found_right(tmp_path: Path) -> None:
    build_extension(tmp_path)
    library = build_target("emulated/_C.so")
    requests = []
    for op, kind in KINDS:
        folder = "itc" if op == "itc_loss" else "qformer_attention"
        source = f"emulated_checks:{'itc' if op == 'itc_loss' else 'attention'}_problem"
        requests.append(Request(op, "cuda", f"{kind} library={library}", "cpu", folder, source))
    records = Checks(tmp_path / "cache", shipped={}).settle(requests)
    assert [str(record) for record in records if record.fault] == []
