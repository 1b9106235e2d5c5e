"""From what was counted and measured to hundreds of GPUs: hours, network, storage, and limits.

Plain arithmetic on numbers that say where they are from. Nothing here was run at that size.
Legend as in `shapes.py`; b pairs a process, P processes, N = b P pairs in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cards import CARDS
from machines import KNOWN

# ViT-g/14 at 224 pixels, and the Q-Former of the recipes
IMAGE_TOKENS, IMAGE_WIDTH, QUERIES, FEATURE_WIDTH, WIDTH, CROSS_LAYERS = 257, 1408, 32, 256, 768, 6
TEXT_TOKENS = 32
PAIRS = 129_000_000
# of a text: the statistics of a process's images that it is compared with, fp32 and int64; counted
STATISTICS_BYTES = 64
GPUS_A_MACHINE = 8
# share of a GPU's rate: what a captured step or a large encoder might reach; assumed
HOPED_SHARE = 0.5


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: As tables call it.
        sheet_flops_per_s: bf16, dense, of the data sheet.
        flops_per_s: What a large product reaches.
        source: Of that.
        memory_gb: Of the data sheet.
        nvlink_bytes_per_s: One way, of the data sheet.
    """

    name: str
    sheet_flops_per_s: float
    flops_per_s: float
    source: str
    memory_gb: int
    nvlink_bytes_per_s: float


_H200_RATE = KNOWN[0].flops_per_s["bfloat16"]
_A100_RATE = next(card.flops_per_s for card in CARDS if card.name.startswith("A100"))
GPUS = (
    Gpu("A100 40 GB", 312e12, _A100_RATE, "assumed: 85 % of the data sheet", 40, 300e9),
    Gpu("H100 80 GB", 989e12, _H200_RATE, "assumed: as the H200, the same chip", 80, 450e9),
    Gpu("H200 141 GB", 989e12, _H200_RATE, "measured: `machines.py`", 141, 450e9),
)
# of a machine of eight GPUs, one way
NETWORKS = {
    "10 Gb/s": 10e9 / 8,
    "200 Gb/s": 200e9 / 8,
    "400 Gb/s": 400e9 / 8,
    "8 x 400 Gb/s": 8 * 400e9 / 8,
}


@dataclass(frozen=True)
class Recipe:
    """A training of the paper.

    Attributes:
        name: Of `configs/NAME.yaml`.
        steps, batch: Of the paper, on 16 GPUs.
        a_process: b.
        days: What the paper states for the largest model on 16 A100 of 40 GB, at most; None: not
            stated.
    """

    name: str
    steps: int
    batch: int
    a_process: int
    days: float | None = None

    @property
    def samples(self) -> int:
        """In all."""
        return self.steps * self.batch

    def steps_on(self, processes: int) -> float:
        """For as many samples, with as many on each process."""
        return self.samples / (self.a_process * processes)


STAGE1 = Recipe("vitg_stage1", 250_000, 1680, 105, 6)
STAGE2 = (
    Recipe("vitg_opt2.7b_stage2", 80_000, 1920, 120),
    Recipe("vitg_flant5xxl_stage2", 80_000, 1520, 95, 3),
)


# FLOPs


def negatives_flops(cross_layers: int, tokens: int, width: int, hidden: int) -> int:
    """Keys and values of one negative image of another process: forward, and their weights'."""
    return 2 * (2 * tokens * width * cross_layers * 2 * hidden)


def contrast_flops(pairs: int, queries: int = QUERIES, width: int = FEATURE_WIDTH) -> int:
    """ITC of one pair against N: a product forward, two backward."""
    return 3 * 2 * queries * width * pairs


def pair_flops(alone: float, processes: int, a_process: int) -> float:
    """Of a pair of stage 1 on P processes, from what it takes on one without ITC."""
    several = negatives_flops(CROSS_LAYERS, IMAGE_TOKENS, IMAGE_WIDTH, WIDTH)
    return alone + several * (processes > 1) + contrast_flops(a_process * processes)


def pairs_at_share(alone: float, share: float) -> float:
    """N from which on ITC is that share of a pair's FLOPs."""
    rest = pair_flops(alone, 2, 0)
    return share / (1 - share) * rest / contrast_flops(1)


# seconds


@dataclass(frozen=True)
class Speed:
    """How quick a step is.

    Attributes:
        share: Of a GPU's rate while it computes.
        host_s: Least time of a step, in which the host queues it.
    """

    share: float
    host_s: float = 0.0

    def step_s(self, flops: float, gpu: Gpu) -> float:
        """Of a step."""
        return max(self.host_s, flops / (self.share * gpu.flops_per_s))


def busy_share(of_floor: float, gaps: float) -> float:
    """Share of a GPU's rate between the gaps, from that of the whole step and the share of gaps."""
    return of_floor / (1 - gaps)


def hours(steps: float, step_s: float) -> float:
    """Of a training."""
    return steps * step_s / 3600


def samples_per_s(recipe: Recipe, days: float) -> float:
    """That a training of so many days gets through."""
    return recipe.samples / (days * 86_400)


# network


def handed_bytes(
    processes: int,
    a_process: int,
    parameters: int,
    zero_stage: int,
    image: tuple[int, int] = (IMAGE_TOKENS, IMAGE_WIDTH),
    feature_width: int = FEATURE_WIDTH,
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, int]:
    """What a process hands to the large collectives of a stage-1 step in bf16.

    Of the ids and lengths that go with negatives, and of single numbers, hundreds of bytes are left
    out. `tests/repository/test_scaling.py` holds it to what was counted on small models.

    Returns:
        `gradients` and `text gradients` (all-reduce), `weights` (all-gather, ZeRO 1 and 2), `texts`
        (all-gather), `statistics` and `negatives` (all-to-all).
    """
    tokens, width = image
    several = processes > 1
    return {
        "gradients": 2 * parameters,
        "weights": 2 * parameters // processes if several and zero_stage else 0,
        "texts": 4 * a_process * feature_width if several else 0,
        "text gradients": 4 * a_process * processes * feature_width if several else 0,
        "statistics": STATISTICS_BYTES * a_process * processes if several else 0,
        "negatives": a_process * (2 * tokens * width + 8 * text_tokens) if several else 0,
    }


_ALL_REDUCE, _ALL_GATHER, _ALL_TO_ALL = "all-reduce", "all-gather", "all-to-all"
COLLECTIVES = {
    "gradients": _ALL_REDUCE,
    "weights": _ALL_GATHER,
    "texts": _ALL_GATHER,
    "text gradients": _ALL_REDUCE,
    "statistics": _ALL_TO_ALL,
    "negatives": _ALL_TO_ALL,
}


def leaving_a_process(name: str, handed: float, processes: int) -> float:
    """Bytes that leave a process, by a ring where all take part."""
    others = processes - 1
    factors = {
        _ALL_REDUCE: 2 * others / processes,
        _ALL_GATHER: others,
        _ALL_TO_ALL: others / processes,
    }
    return handed * factors[COLLECTIVES[name]]


def leaving_a_machine(name: str, handed: float, processes: int) -> float:
    """Bytes that leave a machine of eight GPUs: a ring crosses its border once."""
    if processes <= GPUS_A_MACHINE:
        return 0.0
    if COLLECTIVES[name] == _ALL_TO_ALL:
        outside = (processes - GPUS_A_MACHINE) / processes
        return GPUS_A_MACHINE * handed * outside
    return leaving_a_process(name, handed, processes)


def network_s(handed: Mapping[str, float], processes: int, bytes_per_s: float) -> float:
    """Seconds at the border of a machine, nothing of it hidden behind the step."""
    left = sum(leaving_a_machine(name, x, processes) for name, x in handed.items())
    return left / bytes_per_s


# storage


@dataclass(frozen=True)
class Stored:
    """How the frozen tokens of an image are kept.

    Attributes:
        name: As tables call it.
        image_bytes: Of one.
        supported: By `blip2fast features`.
    """

    name: str
    image_bytes: int
    supported: bool

    def terabytes(self, images: int = PAIRS) -> float:
        """Of so many images."""
        return self.image_bytes * images / 1e12


# a class token and 16 x 16 patches; pooled in squares of 2 x 2
_POOLED = 1 + (IMAGE_TOKENS - 1) // 4
STORED = (
    Stored("fp32", IMAGE_TOKENS * IMAGE_WIDTH * 4, True),
    Stored("bf16", IMAGE_TOKENS * IMAGE_WIDTH * 2, True),
    # a scale in fp32 for each token
    Stored("int8", IMAGE_TOKENS * (IMAGE_WIDTH + 4), True),
    Stored("bf16, pooled 2 x 2", _POOLED * IMAGE_WIDTH * 2, False),
    Stored("int8, pooled 2 x 2", _POOLED * (IMAGE_WIDTH + 4), False),
)
BF16 = STORED[1]


def read_bytes_per_s(images_per_s: float, stored: Stored = BF16) -> float:
    """That so many images a second are read with."""
    return images_per_s * stored.image_bytes


def encoded_per_s(encoder_flops: float, gpu: Gpu, share: float = HOPED_SHARE) -> float:
    """Images a second that a GPU encodes when it does nothing else."""
    return share * gpu.flops_per_s / encoder_flops


# limits of a machine; assumed, but for those of Linux on x86-64
HOST_BYTES = 1e12
DISK_BYTES = 30e12
FILE_SYSTEM_BYTES_PER_S = 3e9
WORKERS = 8
ADDRESS_BYTES = 2**47
MAPS = 65_530
FILE_BYTES = 4 * 2**30


def index_bytes(opened: float, copied: float) -> float:
    """Of a name of a feature cache on a machine with forked workers.

    Args:
        opened: In the process of each GPU.
        copied: In each of its workers, of what they share at first.
    """
    return GPUS_A_MACHINE * (opened + WORKERS * copied)


def images_by_index(bytes_a_name: float) -> float:
    """Images whose names fill nine tenths of a machine's memory."""
    return 0.9 * HOST_BYTES / bytes_a_name
