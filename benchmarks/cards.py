"""What a GPU can issue, hold and move: the assumptions of the kernel model, and occupancy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sass import Instruction

# blocks share a multiprocessor's registers in whole warps of 256, and its memory in 128 bytes
_WARP_REGISTERS = 256
_SHARED_UNIT_BYTES = 128
PARTITIONS = 4  # of a multiprocessor, each with a scheduler that issues one instruction a cycle


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: As the tables call it.
        capability: 80, 90 or 120.
        multiprocessors: Of the card.
        clock_hz: Assumed while a kernel runs.
        bytes_per_s, flops_per_s: A large copy; a large product in bf16: what floors are stated
            against.
        l2_bytes_per_s: From the second-level cache to the multiprocessors.
        shared_bytes: Of a multiprocessor, 1 KB of which each block loses.
        warps, blocks: Most that a multiprocessor holds.
        cycles: A partition's cycles for a warp's instruction, by kind; other kinds take one, the
            cycle of issue. Kinds that all partitions share count four times.
        fma_per_cycle: A multiprocessor's products in 16 bits summed up in fp32, `mma.sync`.
        source: Where bandwidth and rate are from.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    flops_per_s: float
    l2_bytes_per_s: float
    shared_bytes: int
    warps: int
    blocks: int
    cycles: Mapping[str, float]
    fma_per_cycle: float
    source: str

    @property
    def wgmma_per_cycle(self) -> float:
        """Products a cycle of `wgmma`: what a large product reaches, at the assumed clock."""
        return self.flops_per_s / 2 / self.multiprocessors / self.clock_hz


# lanes a partition has for them: fp32 32 (A100: 16), integers 16 (sm_120: 32), special functions 4.
# A multiprocessor moves 128 bytes a cycle to and from shared memory, 64 from the cache; a shuffle
# is a pass through the same unit.
_HOPPER = {
    "fp32": 1.0,
    "integer": 2.0,
    "special": 8.0,
    "shuffle": 4.0,
    "shared": 4.0,
    "global": 8.0,
}
CARDS = (
    Card(
        "H200",
        90,
        132,
        1.755e9,
        4.3e12,
        790e12,
        6.5e12,
        228 * 1024,
        64,
        32,
        _HOPPER,
        1024 * 1.25,
        "measured: `machines.py`",
    ),
    Card(
        "A100 80 GB",
        80,
        108,
        1.41e9,
        1.75e12,
        265e12,
        4.0e12,
        164 * 1024,
        64,
        32,
        _HOPPER | {"fp32": 2.0},
        1024,
        "data sheet: 86 % of 2.04 TB/s, 85 % of 312 TFLOP/s",
    ),
    Card(
        "RTX 5090",
        120,
        170,
        2.41e9,
        1.55e12,
        190e12,
        5.0e12,
        100 * 1024,
        48,
        24,
        _HOPPER | {"integer": 1.0},
        256,
        "data sheet: 86 % of 1.79 TB/s, 90 % of 209 TFLOP/s",
    ),
)


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds at once.

    Attributes:
        blocks: How many; 0: the block does not fit.
        limit: `"registers"`, `"shared memory"`, `"warps"` or `"blocks"`.
    """

    blocks: int
    limit: str


def occupancy(card: Card, registers: int, shared_bytes: int, warps: int) -> Occupancy:
    """How many blocks of `warps` warps fit.

    Args:
        card: Which.
        registers: Of a thread.
        shared_bytes: Of a block, static and dynamic, without the 1 KB that the system takes.
        warps: Of a block.
    """
    of_warp = -(-registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
    # each partition has a quarter of the registers
    by_registers = 16384 // of_warp * PARTITIONS // warps
    of_block = -(-(shared_bytes + 1024) // _SHARED_UNIT_BYTES) * _SHARED_UNIT_BYTES
    found = {
        "registers": by_registers,
        "shared memory": card.shared_bytes // of_block,
        "warps": card.warps // warps,
        "blocks": card.blocks,
    }
    limit = min(found, key=found.__getitem__)
    return Occupancy(found[limit], limit)


_KINDS = {
    "tensor": "HMMA HGMMA QGMMA IMMA OMMA",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fp32": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "shuffle": "SHFL REDUX",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPSYNC MEMBAR FENCE WARPGROUP ERRBAR CCTL SYNCS",
    "shared": "LDS STS LDSM STSM MOVM ATOMS",
    "global": "LDG STG LDGSTS LD ST LDL STL RED ATOMG ATOM UBLKCP UTMALDG LDC",
    "control": "BRA EXIT BSSY BSYNC CALL RET NOP JMP BREAK YIELD WARPSYNC KILL",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_WIDTH = re.compile(r"\.(64|128)\b")


def kind(x: Instruction) -> str:
    """What an instruction is: `"tensor"`, `"special"`, `"fp32"`, `"integer"`, `"shuffle"`,
    `"barrier"`, `"shared"`, `"global"`, `"uniform"` or `"control"`.

    What moves, compares or packs counts as integer.
    """
    if x.name in ("LDC", "ULDC", "LDCU", "S2R", "CS2R", "S2UR", "R2UR"):
        return "uniform"
    if x.name in _KIND_OF:
        return _KIND_OF[x.name]
    return "uniform" if x.name.startswith("U") else "integer"


def bytes_a_lane(x: Instruction) -> int:
    """Of a load or store."""
    found = _WIDTH.search(x.suffixes)
    if found:
        return int(found[1]) // 8
    if re.search(r"\.[US]8\b", x.suffixes):
        return 1
    return 2 if re.search(r"\.[US]16\b", x.suffixes) else 4


def moved_bytes(x: Instruction) -> int:
    """Of a warp, to or from memory beyond the multiprocessor, if all lanes take part."""
    return 32 * bytes_a_lane(x) if x.name in ("LDG", "STG", "LDGSTS", "LDL", "STL") else 0


def products(x: Instruction) -> int:
    """Multiplications of one warp's matrix instruction; of `wgmma` those of its 16 rows."""
    if kind(x) != "tensor":
        return 0
    if x.name == "HGMMA":
        found = re.search(r"\.(\d+)x(\d+)x(\d+)", x.suffixes)
        if found is None:
            raise ValueError(f"no shape in {x.name}{x.suffixes}")
        m, n, k = map(int, found.groups())
        return m * n * k // 4
    found = re.search(r"\.(\d{4,5})\b", x.suffixes)
    shapes = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
    if found is None or found[1] not in shapes:
        raise ValueError(f"no shape in {x.name}{x.suffixes}")
    return shapes[found[1]]


def cycles(card: Card, x: Instruction) -> float:
    """That a partition's unit is busy with a warp's instruction."""
    group = kind(x)
    if group == "tensor":
        rate = card.wgmma_per_cycle if x.name == "HGMMA" else card.fma_per_cycle
        return products(x) * PARTITIONS / rate
    if group == "shared":
        # four matrices of 8 x 8 in 16 bits are 512 bytes; movmatrix none, but takes a pass
        times = 4 if x.name in ("LDSM", "STSM") and ".4" in x.suffixes else bytes_a_lane(x) / 4
        return card.cycles["shared"] * times
    if group == "global":
        return card.cycles["global"] * bytes_a_lane(x) / 4
    # the compiler moves and adds on either unit
    return card.cycles.get("fp32" if x.name == "IMAD" else group, 1.0)


def unit(x: Instruction) -> str:
    """What a warp's instruction keeps busy besides the scheduler."""
    return "fp32" if x.name == "IMAD" else "memory" if kind(x) in _MEMORY else kind(x)


# all go through one queue
_MEMORY = ("shared", "shuffle", "global")
