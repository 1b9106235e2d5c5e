"""Which benchmarks the plain command times, and what each is expected to take.

`pytest benchmarks/ --benchmark-only` times the cells below, in this order, and ends within
`LIMIT_S`; `--full` times all. They bear the mark `brief`, which `-m` understands, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

# the whole run; the cells below add up to less, so that a slower machine gets through, too
LIMIT_S = 600.0
# of measuring, for each contender of a cell on average, where samples are short
CONTENDER_S = 0.3
LEAST_ROUNDS = 3
# a round of all contenders that takes longer than this is taken once less
LONG_ROUND_S = 10.0
# of a stage-1 step: a wrong one shows in three pairs as in eight
JUDGED_PAIRS = 3
# of a cell that is not below
UNKNOWN_S = 20.0

Cells = Mapping[str, Mapping[str, float]]


def _each(seconds: float, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, seconds)


# By suite, the seconds of each cell on 2 cores of an EPYC, as the plain command took on 2026-11-28.
# Models and inputs are made; every contender is called to be judged, to warm up (twice where it
# takes less than a second), for its peak, and once a round.
CPU: Cells = {
    "stage1_step": {
        # first, so that a slower machine is known for one
        "step[scenes-fp32]": 3,
        "step[scenes-bf16]": 4,
        "step[vit_g_b8-fp32]": 88,
        "step[vit_g_b8-bf16]": 46,
    },
    "qformer": {
        "forward[vit_g_b1-fp32]": 8,
        "forward[vit_g_b1-bf16]": 6,
        "forward[vit_g_b4-fp32]": 14,
        "forward[vit_g_b4-bf16]": 8,
    },
    "image_encoder": {
        "encode[vit_g_2_blocks_b1-fp32]": 5,
        "encode[vit_g_2_blocks_b1-bf16]": 3,
        "encode[vit_g_2_blocks_b4-fp32]": 13,
        "encode[vit_g_2_blocks_b4-bf16]": 6,
        "encode[vit_l_2_blocks_b4-fp32]": 8,
        "encode[vit_l_2_blocks_b4-bf16]": 4,
    },
    "itc": {
        "itc[n256-fp32-forward]": 7,
        "itc[n256-fp32-train]": 13,
        "itc[n1680_cpu-fp32-forward]": 6,
        "itc[n1680_cpu-fp32-train]": 16,
    },
    "captioning": {
        "caption[small_opt_b8-greedy]": 5,
        "caption[small_opt_b8-beam5]": 9,
        "caption[small_t5_b8-greedy]": 5,
        "caption[small_t5_b8-beam5]": 7,
    },
    # before the next suite, which makes ZeRO-3 replace `F.linear` in the whole process
    "end_to_end": {
        "cached[small_b8-fp32]": 20,
        "cached[small_b8-bf16]": 13,
        "pictures[vit_l_2_blocks_b4-fp32]": 24,
        "pictures[vit_g_2_blocks_b4-fp32]": 29,
        "stage2[small_b8-fp32]": 19,
        "caption_folder[small_opt_b8-greedy]": 11,
    },
    "stage2_step": {
        "step[small]": 16,
    },
    "qformer_attention": {
        "self[64x64_b16-fp32-forward]": 4,
        "self[64x64_b16-bf16-forward]": 4,
        "self[stage1_pass2_b16-fp32-train]": 4,
        "self[stage1_pass2_b16-bf16-train]": 4,
        "cross[32x257_b16-fp32-forward]": 3,
        "cross[32x257_b16-bf16-forward]": 2,
        "cross[stage1_pass2_b16-fp32-train]": 5,
        "cross[stage1_pass2_b16-bf16-train]": 4,
    },
    "glue": {
        "dropout_add_layer_norm[r1000-fp32-0.0]": 2,
        "dropout_add_layer_norm[r1000-autocast-0.1]": 2,
        "dropout_add_layer_norm[r5000-fp32-0.1]": 2,
        "dropout_add_layer_norm[r5000-bf16-0.1]": 2,
        "bias_gelu[r1000-fp32]": 2,
        "bias_gelu[r1000-bf16]": 2,
        "lm_cross_entropy[r170-fp32]": 5,
        "lm_cross_entropy[r170-bf16]": 4,
    },
    "pictures": {
        "loader[jpeg_640x480-0]": 2,
        "loader[jpeg_2048x1536-2]": 6,
        "feature_cache[jpeg_640x480-0]": 2,
    },
}
# the suites of gpu.sh; seconds are its limits, shared out
GPU: Cells = {
    "stage1_step": {
        **_each(
            35,
            "step[vit_g_b256_cuda-bf16]",
            "step[vit_g_b256_dropout_cuda-bf16]",
            "step[vit_g_b64_dropout_cuda-bf16]",
        ),
        **_each(25, "shares[vit_g_b256_cuda]", "shares[vit_g_b256_dropout_cuda]"),
    },
    "itc": _each(
        10,
        *(
            f"itc[{name}-bf16-{direction}]"
            for name in ("n1680", "n4096", "n16384")
            for direction in ("forward", "train")
        ),
    ),
    "qformer_attention": _each(
        5,
        *(
            f"{name}-bf16-{direction}]"
            for name in ("self[64x64", "self[stage1_pass2", "cross[32x257", "cross[stage1_pass2")
            for direction in ("forward", "train", "train-dropout")
        ),
    ),
    "glue": _each(
        6,
        *(
            f"dropout_add_layer_norm[r33792-{dtype}-{p}]"
            for dtype in ("bf16", "autocast")
            for p in ("0.0", "0.1")
        ),
        "bias_gelu[r33792-bf16]",
        "lm_cross_entropy[r2816-bf16]",
    ),
    "qformer": {"forward[vit_g_b1_cuda-bf16]": 25},
}


def cell_of(nodeid: str) -> tuple[str, str]:
    """Suite and name of a benchmark, as result files have them, from pytest's name for it."""
    path, _, name = nodeid.partition("::")
    return PurePosixPath(path).stem.removeprefix("bench_"), name.removeprefix("bench_")


def chosen(on_gpu: bool) -> dict[tuple[str, str], float]:
    """The cells of the plain command in order, with the seconds of each."""
    table = GPU if on_gpu else CPU
    return {(suite, cell): s for suite, cells in table.items() for cell, s in cells.items()}


def expected_seconds(nodeids: Iterable[str], on_gpu: bool) -> list[float]:
    """What each benchmark should take."""
    known = chosen(on_gpu)
    return [known.get(cell_of(nodeid), UNKNOWN_S) for nodeid in nodeids]


def names_a_cell(arguments: Iterable[str]) -> bool:
    """Whether a command names benchmarks one by one, `FILE::NAME`, which then run as named."""
    return any("::" in argument for argument in arguments)
