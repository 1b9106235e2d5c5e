"""The kernel model: machine code parsed and replayed, occupancy, and the table in results/."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_work
import kernel_model
import model_tables
import torch
import triton
from cards import CARDS, Occupancy, bytes_a_lane, cycles, kind, moved_bytes, occupancy, products
from cuda_work import quickest_splits
from kernel_configurations import CASES
from kernel_work import NotModelled, PlainLaunches, Programs, memory_bytes, programs
from predict import Constants, Kernel, executed, part_of, predict, soft_maximum
from sass import Code, Instruction, Loop, Warp, outline, parse

from blip2fast.ops.dispatch import INTERPRETED

compiles = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")
H200, A100, RTX = CARDS


def sass(*lines: tuple[str, int, int, int]) -> str:
    """Text as `cuobjdump` prints it, of `(instruction, stall, scoreboard set, those awaited)`: a
    scoreboard of 7 is none, those awaited are bits.
    """
    found = ["\t\tFunction : made_up", '\t.headerflags\t@"EF_CUDA_SM90"']
    for place, (text, stall, sets, waits) in enumerate(lines):
        control = (stall | 1 << 4 | sets << 5 | 7 << 8 | waits << 11) << 41
        found.append(f"        /*{16 * place:04x}*/  {text} ;  /* 0x{place:016x} */")
        found.append(f"{'':40}/* 0x{control:016x} */")
    return "\n".join(found)


# rows of a table are summed up: 4 instructions of a loop, then one of two ends
LOOP = sass(
    ("S2R R0, SR_TID.X", 2, 0, 0),
    ("@P0 EXIT", 5, 7, 1),
    ("LDG.E.128 R4, desc[UR4][R2.64]", 4, 1, 0),
    ("FFMA R8, R4, R4, R8", 4, 7, 2),
    ("ISETP.NE.AND P1, PT, R0, RZ, PT", 13, 7, 0),
    ("@P1 BRA 0x20", 5, 7, 0),
    ("@P2 BRA 0x0a0", 5, 7, 0),
    ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 7, 0),
    ("STG.E.64 desc[UR4][R2.64], R8", 1, 7, 0),
    ("EXIT", 5, 7, 0),
    ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 7, 0),
    ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 7, 0),
    ("STG.E.64 desc[UR4][R2.64], R8", 1, 7, 0),
    ("EXIT", 5, 7, 0),
    ("BRA 0x0e0", 0, 7, 0),
    ("NOP", 0, 7, 0),
)


def test_instructions_are_read_with_how_they_are_scheduled() -> None:
    found = parse(LOOP)
    assert len(found) == 14  # without the padding
    load = found[2]
    assert (load.at, load.name, load.suffixes) == (0x20, "LDG", ".E.128")
    assert (load.stall, load.sets, load.waits) == (4, (1, None), ())
    assert found[3].waits == (1,)
    assert (found[5].guard, found[5].target) == ("P1", 0x20)
    with pytest.raises(ValueError, match="no instructions"):
        parse("Function : nothing")


def test_loops_and_ways_through_the_code() -> None:
    code = Code.of(LOOP)
    assert code.loops == (Loop(2, 5),)
    short, long = sorted(code.paths(lambda x: x.name == "HMMA"), key=len)
    assert short == {*range(7), 7, 8, 9}
    assert long == {*range(7), 10, 11, 12, 13}
    assert code.paths(lambda x: x.name == "MUFU") == [set(range(14))]
    items = outline(code, short)
    assert executed(items, {Loop(2, 5): 3.0})[code.instructions[3]] == 3
    inner = sass(
        *(("FADD R0, R0, R1", 4, 7, 0),) * 2, ("@P0 BRA 0x10", 5, 7, 0), ("@P1 BRA 0x0", 5, 7, 0)
    )
    assert Code.of(inner + "\n").loops == (Loop(0, 3, (Loop(1, 2),)),)


def test_a_call_that_does_not_return_is_a_branch() -> None:
    """A loop's way out may be one; a subroutine for a division is not on any way."""
    code = Code.of(
        sass(
            ("@P1 CALL.REL.NOINC 0x60", 5, 7, 0),
            ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 7, 0),
            ("@!P0 CALL.REL.NOINC 0x40", 5, 7, 0),
            ("BRA 0x0", 5, 7, 0),
            ("STG.E.64 desc[UR4][R2.64], R8", 1, 7, 0),
            ("EXIT", 5, 7, 0),
            ("FADD R0, R0, R1", 4, 7, 0),
            ("RET.REL.NODEC R2 0x0", 5, 7, 0),
        )
    )
    assert code.jumps == {2: 4, 3: 0}
    assert code.loops == (Loop(0, 3),)
    assert code.paths(lambda x: x.name == "HMMA") == [set(range(6))]


def test_a_warp_waits_for_scoreboards_and_stalls() -> None:
    code = Code.of(LOOP)
    items = outline(code, min(code.paths(lambda x: x.name == "HMMA"), key=len))

    def run(trips: float, memory: float) -> float:
        warp = Warp(lambda x: memory if x.name == "LDG" else 20.0, lambda x: 0.0)
        return warp.run(items, {Loop(2, 5): trips}.__getitem__)

    # S2R's 20 and EXIT's 5; a turn is the load's 100 and stalls of 4, 13 and 5; then 5, 8, 1 and 5
    assert run(1, 100) == 25 + 122 + 19
    assert run(7, 100) - run(6, 100) == 122
    assert run(1, 300) - run(1, 100) == 200


def test_copies_and_products_that_nobody_waits_for_overlap() -> None:
    def cycles_of(*lines: tuple[str, int, int, int]) -> float:
        warp = Warp(lambda x: {"LDGSTS": 500.0}.get(x.name, 0.0), lambda x: 64.0)
        return warp.run(list(parse(sass(*lines))), {}.__getitem__)

    ask, group = ("LDGSTS.E.128 [R1], desc[UR4][R2.64]", 2, 7, 0), ("LDGDEPBAR", 2, 7, 0)
    assert cycles_of(ask, group, ask, group, ("DEPBAR.LE SB0, 0x1", 2, 7, 0)) == 502
    assert cycles_of(ask, group, ask, group, ("DEPBAR.LE SB0, 0x0", 2, 7, 0)) == 506
    product = ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", 1, 7, 0)
    done = ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, 7, 0)
    assert cycles_of(product, product) == 2
    assert cycles_of(product, product, done) == 129


@pytest.mark.parametrize(
    ("card", "registers", "shared_kb", "warps", "blocks", "limit"),
    [
        # NVIDIA's own table: 2,048 threads of 32 registers, 65,536 registers, 227 KB a block
        (H200, 32, 0, 32, 2, "registers"),
        (H200, 64, 0, 32, 1, "registers"),
        (H200, 255, 0, 8, 1, "registers"),
        (H200, 128, 0, 4, 4, "registers"),
        # 88 are taken for 86: five warps a partition
        (H200, 86, 24, 4, 5, "registers"),
        (H200, 24, 0, 1, 32, "blocks"),
        (H200, 32, 227, 4, 1, "shared memory"),
        (H200, 32, 113, 4, 2, "shared memory"),
        (H200, 32, 114, 4, 1, "shared memory"),
        (A100, 32, 163, 4, 1, "shared memory"),
        (A100, 32, 164, 4, 0, "shared memory"),
        (RTX, 32, 0, 8, 6, "warps"),
        (RTX, 32, 99, 8, 1, "shared memory"),
        (RTX, 32, 100, 8, 0, "shared memory"),
    ],
)
def test_occupancy(card, registers, shared_kb, warps, blocks, limit) -> None:
    found = occupancy(card, registers, shared_kb * 1024, warps)
    assert found == Occupancy(blocks, limit)


def test_what_instructions_are_and_take() -> None:
    def one(text: str) -> Instruction:
        return parse(sass((text, 1, 7, 0)))[0]

    product = one("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24")
    assert products(product) * 4 == 64 * 256 * 16
    # all products of a large matrix product, at its rate
    seconds = cycles(H200, product) / H200.clock_hz / H200.multiprocessors
    assert 2 * 64 * 256 * 16 / seconds == pytest.approx(H200.flops_per_s)
    assert products(one("HMMA.16816.F32 R0, R4, R6, R0")) == 2048
    with pytest.raises(ValueError, match=r"no shape in HMMA\.999"):
        products(one("HMMA.999.F32 R0, R4, R6, R0"))
    assert bytes_a_lane(one("LDG.E.U8 R0, desc[UR4][R2.64]")) == 1
    assert moved_bytes(one("STG.E.128 desc[UR4][R2.64], R4")) == 512
    assert moved_bytes(one("LDS.128 R0, [R4]")) == 0
    kinds = {"MUFU.EX2 R0, R1": "special", "IMAD R0, R1, R2, R3": "integer"}
    kinds |= {"SHFL.BFLY PT, R0, R1, 0x1, 0x1f": "shuffle", "LDSM.16.M88.4 R0, [R4]": "shared"}
    kinds |= {"UIADD3 UR4, UR4, 0x1, URZ": "uniform", "FFMA R0, R1, R2, R3": "fp32"}
    kinds |= {"BAR.SYNC 0x0": "barrier", "LDGSTS.E.128 [R0], desc[UR4][R2.64]": "global"}
    assert {text: kind(one(text)) for text in kinds} == kinds
    # integers have half the lanes of floating point on one card, and not on another
    assert cycles(H200, one("LOP3.LUT R0, R1, R2, R3, 0xc0, !PT")) == 2
    assert cycles(RTX, one("LOP3.LUT R0, R1, R2, R3, 0xc0, !PT")) == 1


def made_up(grid: int, registers: int = 128) -> Kernel:
    return Kernel("made_up", Code.of(LOOP), registers, 0, 0, 4, grid)


def test_time_grows_with_waves_and_bytes_and_names_what_it_waits_for() -> None:
    constants = Constants(launch_s=0.0)
    work = [Programs(528.0, (100.0,))]
    # four blocks on each of 132 multiprocessors, all at once, then twice
    once = predict(H200, made_up(528), work, 1.0, constants)
    twice = predict(H200, made_up(1056), [Programs(1056.0, (100.0,))], 1.0, constants)
    assert (once.waves, once.bound) == (1.0, "latency")
    assert twice.seconds == pytest.approx(2 * once.seconds, rel=1e-3)
    alone = part_of(H200, made_up(528), work[0], constants).alone_cycles
    assert once.seconds == pytest.approx(alone / H200.clock_hz, rel=0.01)
    moved = predict(H200, made_up(528), work, 4.3e9, constants)
    assert moved.bound == "memory"
    assert moved.seconds == pytest.approx(1e-3, rel=0.01)
    assert soft_maximum([3.0, 4.0], 2) == 5.0
    with pytest.raises(NotModelled, match="1 loops in the machine code, not 2"):
        predict(H200, made_up(528), [Programs(528.0, (1.0, 2.0))], 1.0, constants)
    too_many = Kernel("made_up", Code.of(LOOP), 255, 0, 0, 16, 1)
    with pytest.raises(NotModelled, match="a block does not fit: registers"):
        predict(H200, too_many, [Programs(1.0, (1.0,))], 1.0, constants)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rules_cover_what_is_launched(case) -> None:
    """Every program of a grid is accounted for, no byte of the floor is left out."""
    recorded, _ = kernel_model.launches(case, 0.0, H200, None)
    for launch in recorded:
        parts = programs(case, launch)
        assert sum(part.count for part in parts) == math.prod(launch.grid)
        assert any(part.way is not None for part in parts) or len(recorded) > 1
    assert sum(memory_bytes(case, recorded)) >= case.bytes


def test_splits_are_those_of_the_launcher() -> None:
    """Few blocks are cut until multiprocessors are busy, many are not."""
    assert quickest_splits(1, 64, 1, 64, 132) == 64
    assert quickest_splits(210, 14, 1, 14, 132) == 1
    assert quickest_splits(132, 14, 1, 14, 132) == 1


def test_a_library_without_kernels_says_what_to_do(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cuda_work, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(sys, "argv", ["kernel_model.py", "--cuda"])
    assert kernel_model.main() == 1
    assert "no _C.so: build it with nvcc (csrc/README.md)" in capsys.readouterr().err
    (tmp_path / "_C.so").write_bytes(b"no code")
    assert kernel_model.main() == 1
    assert "_C.so has no CUDA kernels" in capsys.readouterr().err


def test_what_pytorch_launches_itself_is_counted() -> None:
    with PlainLaunches() as plain:
        x = torch.empty(4, 8, device="meta")
        x.view(8, 4)[1:].t()
        torch.zeros(2, device="cpu")
        assert plain.count == 0
        x + x
    assert (plain.count, plain.bytes) == (1, 3 * 128)


@compiles
def test_products_in_machine_code_are_those_of_the_operation() -> None:
    """Counted from SASS: 32 queries with 4 tiles of 64 keys and one of 16, twice, 64 wide."""
    case = next(case for case in CASES if case.name == "cross_forward_32x257_b256")
    chosen = case.configurations["m32_n64_w2_s3"]
    (launch,), _ = kernel_model.launches(case, 0.0, H200, chosen)
    kernel = kernel_model.kernel_of(launch, H200)
    (work,) = programs(case, launch)
    (items,) = kernel.ways
    (loop,) = kernel.code.loops
    assert work.trips == (4.0,)
    counts = executed(items, {loop: 4.0})
    of_program = kernel.warps * sum(times * products(x) for x, times in counts.items())
    assert of_program == 2 * 32 * (4 * 64 + 16) * 64


@compiles
def test_the_committed_table_is_what_the_script_writes() -> None:
    data = json.loads(kernel_model.FILE.read_text())
    own = f"triton {triton.__version__}"
    assert own in data, f"python benchmarks/kernel_model.py --write: no {own} in {list(data)}"
    case = next(case for case in CASES if case.name.startswith("gelu_forward"))
    found = kernel_model.row(case, 0.0, H200)
    assert found in data[own]["shipped"], found
    (launch,) = found["launches"]
    assert launch["stack_bytes"] == 0
    assert launch["inner_loop"]["special"] > 0
    assert "tensor" not in launch["inner_loop"]
    assert kernel_model.significant(0.00012346) == 0.0001235


def test_tables_set_the_model_beside_the_measured_times() -> None:
    parts = {"latency": 9e-5, "memory": 4e-5, "issue": 2e-5}
    launch = {"parts_s": parts, "registers": 40, "stack_bytes": 8, "shared_bytes": 2048, "warps": 4}
    launch |= {"blocks": 5, "limit": "registers", "waves": 2.0, "bound": "latency", "seconds": 4e-5}
    row = {"case": "x", "dropout": 0.0, "card": "H200", "configuration": "a", "floor_s": 5e-5}
    row |= {"predicted_s": 1e-4, "of_floor": 0.5, "plain_launches": 6, "launches": [launch, launch]}
    data = {"triton 3.6.0": {"shipped": [row], "sweep": [row, row | {"configuration": "b"}]}}
    sweep = [{"case": "x", "dropout": 0.0, "configuration": "a", "median_s": 8e-5}]
    sweep.append(sweep[0] | {"configuration": "b", "median_s": 1.2e-4})
    assert model_tables.unhidden_s(row) == pytest.approx(1e-4)
    text = model_tables.measured_card_table(data, sweep)
    assert "| 40 + 8 B | 2 | 5 x 4 (registers) | 2.0 |" in text
    assert "| 50.0 µs | 100 µs | 50 % | 80.0 µs | 62 % | +25 % | latency | 100 µs | 6 |" in text
    assert "| x | 0 | 2 | +4 % | -17 % to +25 % | 0 % |" in model_tables.sweep_errors_table(
        data, sweep
    )
