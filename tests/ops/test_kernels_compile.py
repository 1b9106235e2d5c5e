"""Every launch of BLIP-2's training step and inference, compiled for each GPU it is dispatched on.

32 queries of 768 = 12 x 64, 257 image tokens, ITC features of 256: in the tiles that the launchers
choose for compute capability 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0. Nothing runs. The installed Triton
compiles, and in a process of its own the oldest that pyproject.toml allows, from the folder that
`make test` puts it into.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import triton
from aot import SHARED_LIMIT_BYTES, Compiled, Launch, record_launches
from kernel_configurations import BI, CAUSAL, UNI, CrossSize, ITCSize, RowsSize, dropout

from blip2fast.kernels.bias_gelu import backward as gelu_backward
from blip2fast.kernels.bias_gelu import config as gelu_config
from blip2fast.kernels.bias_gelu import forward as gelu_forward
from blip2fast.kernels.dropout_add_layer_norm import backward as norm_backward
from blip2fast.kernels.dropout_add_layer_norm import config as norm_config
from blip2fast.kernels.dropout_add_layer_norm import forward as norm_forward
from blip2fast.kernels.itc import backward as itc_backward
from blip2fast.kernels.itc import forward as itc_forward
from blip2fast.kernels.itc.interface import Options, Pairs
from blip2fast.kernels.keep_mask import keep_mask
from blip2fast.kernels.philox import threshold
from blip2fast.kernels.qformer_attention import config as attention_config
from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.kernels.tuned import formula_alone
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled"),
]
ROOT = Path(__file__).parents[2]
OLDEST_TRITON = "3.6"
OLDEST_TRITON_FOLDER = ROOT / "build" / f"triton-{OLDEST_TRITON}"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# mma.sync elsewhere, and everywhere where a tile has fewer than 64 rows
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
REGISTERS = 65536
COMPILER = "3.9" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else "3.6"
# Bytes of a thread's stack, where lies what does not fit its registers: the most seen of a kernel's
# launches by the formulas, by Triton and GPU; other kernels have none. Those of 40 and more are
# cross-attention with a key mask and several readers under dropout, and the gradient of texts where
# nothing was saved, on cards whose products take their operands from registers.
SPILLED_BYTES: dict[str, dict[int, dict[str, int]]] = {
    "3.6": {
        80: {"qformer_cross_attention_fwd": 8},
        86: {"qformer_attention_fwd": 8, "qformer_cross_attention_fwd": 56, "itc_bwd_text": 8},
        89: {"qformer_attention_fwd": 8, "qformer_cross_attention_fwd": 56, "itc_bwd_text": 8},
        90: {"qformer_cross_attention_fwd": 16},
        100: {
            "qformer_cross_attention_fwd": 16,
            "dropout_add_layer_norm_fwd": 8,
            "itc_bwd_text": 8,
            "itc_fwd": 8,
        },
        120: {"qformer_cross_attention_fwd": 16},
    },
    "3.9": {
        80: {"itc_bwd_text": 8},
        86: {"qformer_cross_attention_fwd": 8, "itc_bwd_text": 40},
        89: {"qformer_cross_attention_fwd": 8, "itc_bwd_text": 40},
        90: {"qformer_cross_attention_fwd": 8, "dropout_add_layer_norm_bwd": 8},
        100: {"qformer_cross_attention_fwd": 8, "itc_bwd_text": 16},
        120: {"qformer_attention_bwd": 8, "qformer_cross_attention_fwd": 48},
    },
}
# of any kernel in fp32, whose products are summed up in registers, not by tensor cores
SPILLED_BYTES_OF_FP32 = {
    "3.6": {80: 312, 86: 288, 89: 288, 90: 304, 100: 312, 120: 320},
    "3.9": {80: 272, 86: 304, 89: 304, 90: 336, 100: 336, 120: 352},
}
# of what a sweep on a GPU chose, as in `test_kernel_configurations.py`
SPILLED_BYTES_OF_TUNED = 64


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def self_calls() -> Iterator[Callable[[], object]]:
    """Training: ITC and ITG, then ITM's pairs and two negatives each. Images or texts alone."""
    lengths, blocks = [2 + 5 * i % 21 for i in range(256)], list(range(256))
    build = AttentionLayout.build
    first_pass = build(256, 32, lengths * 2, [UNI] * 256 + [CAUSAL] * 256, blocks * 2)
    second_pass = build(768, 32, lengths * 3, [BI] * 768)
    images, texts = build(256, 32, []), build(0, 0, lengths, UNI)

    def call(layout: AttentionLayout, p: float, dtype: torch.dtype, learns: bool) -> None:
        qkv = meta(layout.num_rows, 3, 12, 64, dtype=dtype)
        chosen = {"qkv": qkv, "layout": layout, "scale": 0.125, **dropout("meta", p)}
        out, lse = self_forward(**chosen)
        if learns:
            self_backward(dout=out, out=out, lse=lse, **chosen)

    for layout, p, dtype, learns in (
        (first_pass, 0.0, BF16, True),
        (first_pass, 0.1, BF16, True),
        (second_pass, 0.0, BF16, True),
        (second_pass, 0.1, BF16, True),
        (second_pass, 0.1, FP16, True),
        (second_pass, 0.1, FP32, True),
        # stage 2, and features
        (images, 0.1, BF16, True),
        (images, 0.0, BF16, False),
        (texts, 0.0, BF16, False),
    ):
        yield lambda given=(layout, p, dtype, learns): call(*given)


def cross_calls() -> Iterator[Callable[[], object]]:
    """In ITM an image is read three times on average; with 16 images keys may be split."""

    def call(size: CrossSize, p: float, mask: bool) -> None:
        key_mask = meta(size.images, size.tokens, dtype=torch.bool) if mask else None
        chosen = size.forward_inputs("meta", p) | {"key_mask": key_mask}
        out, lse = cross_forward(**chosen)
        del chosen["num_blocks"]
        cross_backward(dout=out, out=out, lse=lse, **chosen)

    for images, uses, p, mask, dtype in (
        (256, 1, 0.0, False, BF16),
        (256, 1, 0.1, False, BF16),
        (256, 1, 0.1, True, BF16),
        (256, 1, 0.1, False, FP32),
        (256, 3, 0.0, False, BF16),
        (256, 3, 0.1, False, BF16),
        (256, 3, 0.1, True, BF16),
        (16, 1, 0.1, False, BF16),
        (16, 3, 0.1, False, BF16),
    ):
        size = CrossSize(images, uses, dtype=dtype)
        yield lambda given=(size, p, mask): call(*given)


def row_calls() -> Iterator[Callable[[], object]]:
    """LayerNorm as under autocast, GELU, and the mask of the embeddings' dropout."""
    norm, gelu = RowsSize(33_792, 768), RowsSize(33_792, 3072)
    for p in (0.0, 0.1):
        yield lambda p=p: norm_forward.forward(**norm.norm_forward_inputs("meta", p))
        yield lambda p=p: norm_backward.backward(**norm.norm_backward_inputs("meta", p))
    inference = norm.norm_forward_inputs("meta", 0.0) | {"save": False}
    yield lambda: norm_forward.forward(**inference)
    yield lambda: gelu_forward.forward(**gelu.gelu_forward_inputs("meta", 0.0))
    yield lambda: gelu_backward.backward(**gelu.gelu_backward_inputs("meta", 0.0))
    rows, philox = meta(33_792, dtype=torch.int64), meta(2, dtype=torch.int64)
    yield lambda: keep_mask(philox, threshold(0.1), rows, rows, 768, 0)


def itc_calls() -> Iterator[Callable[[], object]]:
    """Similarities are saved, or too many to be; with ids of images; without drawing negatives."""
    size, ids, nothing = ITCSize(1680), meta(1680, dtype=torch.int64), meta(0, 0, dtype=FP32)

    def call(saves: bool, pairs: Pairs) -> None:
        chosen = size.forward_inputs("meta", 0.0) | {"pairs": pairs}
        options = Options(chosen["options"].philox, save=saves)
        itc_forward.sweep(**chosen | {"options": options})
        # starts from a sweep of its own
        chosen = size.backward_inputs("meta", 0.0) | {"pairs": pairs}
        saved = chosen["saved"] if saves else (nothing, nothing.to(torch.uint8))
        itc_backward.sweep_grad(**chosen | {"saved": saved})

    for saves, pairs in (
        (True, Pairs(0, None, None)),
        (False, Pairs(0, None, None)),
        (False, Pairs(0, ids, ids)),
    ):
        yield lambda given=(saves, pairs): call(*given)
    inference = size.forward_inputs("meta", 0.0) | {"options": Options(None)}
    yield lambda: itc_forward.sweep(**inference)


def launches(capability: int) -> dict[tuple[Any, ...], Launch]:
    """By variant, as dispatched on a GPU of this compute capability."""
    found: dict[tuple[Any, ...], Launch] = {}
    with ExitStack() as stack:
        for module in (attention_config, gelu_config, norm_config, itc_forward, itc_backward):
            stack.enter_context(patch.object(module, "capability", lambda device: capability))
        for calls in (self_calls, cross_calls, row_calls, itc_calls):
            for call in calls():
                found |= {launch.variant: launch for launch in record_launches(call)}
    return found


def faults(launch: Launch, compiled: Compiled, tuned: bool) -> Iterator[str]:
    """What is wrong with a launch on the GPU that it was compiled for."""
    capability, resources, ptx = compiled.capability, compiled.resources, compiled.ptx
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    warps = launch.options["num_warps"]
    # none: no products
    precision = launch.constants.get("PRECISION")
    bound = SPILLED_BYTES[COMPILER][capability].get(name, 0)
    if precision == "ieee":
        bound = SPILLED_BYTES_OF_FP32[COMPILER][capability]
    if tuned:
        bound = SPILLED_BYTES_OF_TUNED
    if resources["STACK"] > bound or resources["LOCAL"] > 0:
        yield f"spills {resources}, more than {bound}"
    if compiled.shared_bytes > SHARED_LIMIT_BYTES[capability]:
        yield f"{compiled.shared_bytes} bytes of shared memory"
    if resources["REG"] * 32 * warps > REGISTERS:
        yield f"{resources['REG']} registers of {warps} warps"
    # sums in a fixed order
    if re.search(r"\batom\.|\bred\.global", ptx):
        yield "atomic additions"
    newest = TENSOR_CORES.get(capability, "mma.sync")
    if precision == "ieee":
        if newest in ptx or "mma.sync" in ptx:
            yield "fp32 on tensor cores"
    elif precision is not None:
        rows = launch.constants.get("BLOCK_M") or launch.constants["BLOCK_T"]
        if newest not in ptx and (rows >= 64 or "mma.sync" not in ptx):
            yield f"no {newest}"
    # at least 8 bytes a thread at once where memory bounds, 16 of ITC's features
    if "layer_norm" in name or "gelu" in name:
        for access in ("ld", "st"):
            if not re.search(rf"{access}\.global\.v[24]", ptx):
                yield f"no wide {access}.global"
    if "itc" in name:
        # past the registers where tiles are loaded ahead
        ahead = launch.options["num_stages"] > 1
        wide = r"cp\.async\.cg\.shared\.global .*, 0x10," if ahead else r"ld\.global\.v4"
        if not re.search(wide, ptx):
            yield "no wide loads"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_and_fits(capability: int) -> None:
    with formula_alone():
        formula = launches(capability)
    found = []
    for variant, launch in (formula | launches(capability)).items():
        compiled = launch.compile(capability)
        found += [
            f"{launch.kernel.__name__}: {fault}; {launch.types}, {launch.constants}"
            for fault in faults(launch, compiled, tuned=variant not in formula)
        ]
    assert not found, "\n".join(found)


def run_with(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Python with the packages of a folder before those that are installed."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(triton.__version__.startswith(OLDEST_TRITON + "."), reason="it is this one")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_and_fits_with_the_oldest_triton(capability: int) -> None:
    folder = OLDEST_TRITON_FOLDER
    assert (folder / ".installed").is_file(), f"no {folder}: make {folder.relative_to(ROOT)}"
    version = run_with(folder, ["-c", "import triton; print(triton.__version__)"])
    assert version.stdout.startswith(OLDEST_TRITON + "."), version.stdout + version.stderr
    test = f"{__file__}::{test_compiles_and_fits.__name__}[{capability}]"
    done = run_with(folder, ["-m", "pytest", "-q", "-p", "no:cacheprovider", test])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout, done.stdout[-6000:]
