"""What a sweep found quickest: from its results into files, and from there to the launches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tune
from aot import Launch, record_launches
from kernel_configurations import CASES, Case, Inputs
from torch import Tensor

from blip2fast.kernels.bias_gelu import config as gelu
from blip2fast.kernels.dropout_add_layer_norm import config as norm
from blip2fast.kernels.itc import config as itc
from blip2fast.kernels.qformer_attention import config as attention
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.kernels.tuned import Tuned, formula_alone
from blip2fast.ops import kernel_cases
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")
OPS = {
    "bias_gelu": gelu,
    "dropout_add_layer_norm": norm,
    "itc": itc,
    "qformer_attention": attention,
}
UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL
HALF, FP32 = torch.bfloat16, torch.float32
Table = dict[tuple[int, str], tuple[Any, ...]]
Sweep = dict[str, Any]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Of every op, empty, whatever the files say."""
    found: dict[str, Table] = {op: {} for op in OPS}
    for op, config in OPS.items():
        monkeypatch.setattr(config.TUNED, "table", found[op])
    return found


def set_first(tables: dict[str, Table], place: int = 1) -> None:
    """For each class a configuration of its case: the `place`th after the default."""
    for case in CASES:
        configuration = list(case.configurations.values())[place]
        op, name = case.tunes
        tables[op][90, name] = tuple(tune.entries_of(op, name, configuration))


# launches


def recorded(case: Case, run: Callable[[Inputs], object], dropout_p: float) -> list[Any]:
    """Variants and grids of the launches of one case, the making of inputs left out."""
    inputs: list[Inputs] = []
    with formula_alone():
        record_launches(lambda: inputs.append(case.make("meta", dropout_p)))
    launches: list[Launch] = record_launches(lambda: run(inputs[0]))
    assert launches
    return [(launch.variant, launch.grid) for launch in launches]


def launcher(case: Case) -> Callable[..., object]:
    """What a library call runs; `case.run` hides what is tuned from it."""
    return case.run.args[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_class_launches_what_was_timed(case: Case, tables: dict[str, Table]) -> None:
    """Every configuration of a sweep, once it is in the table."""
    op, name = case.tunes
    for label, configuration in case.configurations.items():
        tables[op].clear()
        if label != "default":
            tables[op][90, name] = tuple(tune.entries_of(op, name, configuration))
        timed = recorded(case, lambda inputs, c=configuration: case.run(inputs, c), 0.1)
        tuned = recorded(case, lambda inputs: launcher(case)(**inputs), 0.1)
        assert tuned == timed, label


def test_a_sweep_times_the_formula_as_its_default(tables: dict[str, Table]) -> None:
    """Else a second sweep would compare with the winners of the first."""
    before = [recorded(case, lambda inputs, c=case: c.run(inputs, {}), 0.0) for case in CASES]
    # the first of one case is what the formula gives
    set_first(tables, 2)
    after = [recorded(case, lambda inputs, c=case: c.run(inputs, {}), 0.0) for case in CASES]
    own = [recorded(case, lambda inputs, c=case: launcher(c)(**inputs), 0.0) for case in CASES]
    assert before == after
    assert all(x != y for x, y in zip(own, after, strict=True))


def test_every_class_has_a_case() -> None:
    tuned = {(op, name) for op, config in OPS.items() for name in config.TUNED.classes}
    assert {case.tunes for case in CASES} == tuned
    assert set(OPS) == set(tune.OPS)


# classes and their neighbours


def self_tiles(
    kinds: Sequence[MaskKind],
    Q: int,
    T: int,
    *,
    N: int = 2,
    H: int = 12,
    D: int = 64,
    dtype: torch.dtype = HALF,
) -> list[Any]:
    """What calls get, forward and backward."""
    blocks = [0] * len(kinds) if N else None
    layout = AttentionLayout.build(N, Q, [T] * len(kinds), kinds, blocks)
    qkv = torch.empty(layout.num_rows, 3, H, D, dtype=dtype, device="meta")
    return [
        attention.self_forward_tiles(layout, qkv),
        attention.self_backward_tiles(layout, qkv),
    ]


def is_tuned(function: Callable[[], Any]) -> bool:
    """Whether a table has a say."""
    found = function()
    with formula_alone():
        return bool(found != function())


def test_self_attention_and_its_neighbours(
    tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_first(tables)
    # other than the formula whatever the call
    for (_, name), (entry,) in list(tables["qformer_attention"].items())[:4]:
        assert name.startswith("self")
        tables["qformer_attention"][90, name] = ({**entry, "num_warps": 16, "heads": 2},)

    def tuned(*call: Any, **options: Any) -> bool:
        return is_tuned(lambda: self_tiles(*call, **options))

    assert tuned((BI,), 32, 32)
    assert tuned((BI, UNI), 32, 1)
    assert tuned((BI,), 16, 17)
    assert not tuned((BI,), 16, 16)
    assert not tuned((BI,), 32, 33)
    assert tuned((UNI, CAUSAL), 32, 32)
    assert tuned((UNI, CAUSAL), 17, 17)
    assert not tuned((UNI, CAUSAL), 16, 16)
    assert not tuned((UNI, CAUSAL), 32, 33)
    assert not tuned((UNI, CAUSAL), 33, 5)
    # whose units are of both kinds; whose queries see no text; without queries
    assert not tuned((BI, CAUSAL), 32, 32)
    assert not tuned((UNI,), 32, 32)
    assert not tuned((UNI,), 0, 64, N=0)
    for kinds in ((BI,), (UNI, CAUSAL)):
        assert not tuned(kinds, 32, 32, dtype=FP32)
        assert not tuned(kinds, 32, 32, D=128)
        assert not tuned(kinds, 32, 32, D=32)
        assert tuned(kinds, 32, 32, D=33, dtype=torch.float16)
        assert not tuned(kinds, 32, 32, H=3), "2 heads of 3 at once"
        for other in (80, 100, 120):
            with monkeypatch.context() as patch:
                patch.setattr(attention, "capability", lambda device, other=other: other)
                assert not tuned(kinds, 32, 32)
    forward, backward = self_tiles((BI,), 32, 32)
    assert (forward.heads, forward.num_warps, forward.single) == (2, 16, True)
    assert (backward.heads, backward.num_warps, backward.block_d) == (2, 16, 64)


def cross_tiles(
    uses: int,
    S: int = 257,
    *,
    Q: int = 32,
    B: int = 30,
    D: int = 64,
    H: int = 12,
    dtype: torch.dtype = HALF,
) -> list[Any]:
    """What calls get, forward and backward, in one list."""
    q = torch.empty(B * uses, Q, H, D, dtype=dtype, device="meta")
    kv = torch.empty(B, S, 2, H, D, dtype=dtype, device="meta")
    N = B * uses
    return [
        attention.cross_forward_tiles(q, kv, N),
        *attention.cross_backward_tiles(q, kv, N),
    ]


def test_cross_attention_and_its_neighbours(
    tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_first(tables)

    def tuned(*call: Any, **options: Any) -> bool:
        return is_tuned(lambda: cross_tiles(*call, **options))

    assert [uses for uses in range(1, 10) if tuned(uses)] == [1, 3, 4]
    assert [S for S in (64, 224, 225, 256, 577) if tuned(1, S)] == [225, 256, 577]
    assert [Q for Q in (1, 16, 17, 32, 33, 64) if tuned(1, Q=Q)] == [17, 32]
    assert [Q for Q in (8, 16, 17, 32, 33, 40) if tuned(3, Q=Q)] == [17, 32]
    for uses in (1, 3):
        assert not tuned(uses, dtype=FP32)
        assert not tuned(uses, D=128)
        for other in (80, 100, 120):
            with monkeypatch.context() as patch:
                patch.setattr(attention, "capability", lambda device, other=other: other)
                assert not tuned(uses)
    # the rest of the keys, in tiles of the tuned width
    forward, *backward = cross_tiles(1, 257 + 15)
    assert (forward.block_n, forward.tail, forward.full) == (64, 16, True)
    assert [tiles.block_n for tiles in backward] == [64, 64]


def test_variants_do_not_grow(tables: dict[str, Table]) -> None:
    """A class has one set of tiles: batch and text length compile nothing new."""
    set_first(tables)
    for kinds in ((BI,), (UNI, CAUSAL)):
        texts = [(N, T) for N in (1, 2, 17, 255) for T in (1, 5, 16, 31, 32)]
        assert len({tuple(self_tiles(kinds, 32, T, N=N)) for N, T in texts}) == 1
    for uses in ((1,), (3, 4)):
        sizes = [(n, B) for n in uses for B in (1, 2, 16, 17, 255, 1000)]
        assert len({tuple(cross_tiles(n, B=B)) for n, B in sizes}) == 1


def test_keys_are_split_in_tiles_of_one_width(tables: dict[str, Table]) -> None:
    """`splits` counts tiles of the first owner; another's of another width would end elsewhere."""
    (case,) = [c for c in CASES if c.name == "cross_backward_32x257_n768_b256"]
    mixed = {"m64_n32_m128_n64"}
    for name, configuration in list(case.configurations.items())[1:]:
        entries = tune.entries_of(*case.tunes, configuration)
        assert (len({entry["block_n"] for entry in entries}) > 1) == (name in mixed)
        tables["qformer_attention"][90, case.tunes[1]] = tuple(entries)
        assert is_tuned(lambda: cross_tiles(3, 1025, B=22))
        one_size = name not in mixed and not entries[0]["uses"]
        assert is_tuned(lambda: cross_tiles(3, 1025, B=21)) == one_size


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("queries=32 rows=32 keys=64", {"self_forward", "self_backward"}),
        ("queries=17 rows=32 keys=64", {"self_forward", "self_backward"}),
        ("queries=32 rows=64 keys=128", set()),
        ("queries=32 keys=257 index=0 mask=0", {"one_use"}),
        ("queries=17 keys=257 index=1 mask=1", {"one_use", "several_uses"}),
        ("queries=32 keys=577 index=1 mask=0", {"one_use", "several_uses"}),
        ("queries=32 keys=161 index=1 mask=0", set()),
    ],
)
def test_the_check_at_first_use_runs_what_is_tuned(
    kind: str, classes: set[str], tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of a kind count as checked: small cases must get the tiles that large calls get."""
    set_first(tables)
    # owners of several widths, which few images do not get
    mixed = next(case for case in CASES if case.name == "cross_backward_32x257_n768_b256")
    tables["qformer_attention"][90, mixed.tunes[1]] = tuple(
        tune.entries_of(*mixed.tunes, mixed.configurations["m64_n32_m128_n64"])
    )
    ran: set[Any] = set()

    def ask_self(qkv: Tensor, layout: AttentionLayout, **options: Any) -> list[Tensor]:
        ran.add(attention.self_forward_tiles(layout, qkv))
        ran.add(attention.self_backward_tiles(layout, qkv))
        return [qkv, qkv]

    def ask_cross(q: Tensor, kv: Tensor, index: KVIndex | None, **options: Any) -> list[Tensor]:
        N = len(q) if index is None else len(index.index)
        ran.add(attention.cross_forward_tiles(q, kv, N))
        ran.add(attention.cross_backward_tiles(q, kv, N))
        return [q, q]

    monkeypatch.setattr(kernel_cases, "_small", lambda device: False)
    monkeypatch.setattr(kernel_cases, "qformer_attention", ask_self)
    monkeypatch.setattr(kernel_cases, "qformer_cross_attention", ask_cross)
    monkeypatch.setattr(
        kernel_cases,
        "_leaf",
        lambda shape, dtype, *_: torch.empty(*shape, dtype=dtype, device="meta"),
    )
    problem = kernel_cases.attention_problem(
        f"dtype=bf16 width=64 {kind} dropout=1", torch.device("cpu")
    )
    for case in problem.cases:
        case.run("triton")(case.inputs)
    for (_, name), entries in tables["qformer_attention"].items():
        if classes & set(name.split("/")):
            assert any(has_entries(tiles, entries) for tiles in ran), name


def has_entries(tiles: Any, entries: Sequence[dict[str, Any]]) -> bool:
    """Whether tiles are those of a class."""
    several = tiles if isinstance(tiles, tuple) else (tiles,)
    return len(several) == len(entries) and all(
        entry.items() <= vars(each).items() for each, entry in zip(several, entries, strict=True)
    )


def test_glue_and_its_neighbours(tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch) -> None:
    set_first(tables)
    cpu = torch.device("cpu")
    for function in (norm.forward_rows, norm.backward_rows):

        def tuned(C: int, dtype: torch.dtype = HALF, function: Any = function) -> bool:
            return is_tuned(lambda: function(C, dtype, cpu))

        assert [C for C in (256, 512, 513, 768, 1024, 1025) if tuned(C)] == [513, 768, 1024]
        assert not tuned(768, FP32)
        with monkeypatch.context() as patch:
            patch.setattr(norm, "capability", lambda device: 80)
            assert not tuned(768)
    for function in (gelu.forward_tile, gelu.backward_tile):

        def tile(dtype: torch.dtype = HALF, function: Any = function) -> bool:
            return is_tuned(lambda: function(torch.empty(3, 300, dtype=dtype)))

        assert tile()
        assert not tile(FP32)
        with monkeypatch.context() as patch:
            patch.setattr(gelu, "capability", lambda device: 80)
            assert not tile()


def test_itc_and_its_neighbours(tables: dict[str, Table]) -> None:
    set_first(tables)

    def tuned(
        Q: int = 32, D: int = 256, itemsize: int = 2, capability: int = 90, saved: bool = True
    ) -> set[bool]:
        return {
            is_tuned(lambda: itc.forward_tiles(Q, D, itemsize, capability, saved)),
            is_tuned(lambda: itc.backward_tiles(Q, D, itemsize, capability, saved, True)),
        }

    assert [Q for Q in (16, 17, 32, 33) if tuned(Q) == {True}] == [17, 32]
    assert [D for D in (128, 129, 256, 257) if tuned(D=D) == {True}] == [129, 256]
    for neighbour in (tuned(16), tuned(33), tuned(D=128), tuned(D=257), tuned(itemsize=4)):
        assert neighbour == {False}
    assert tuned(capability=80) == tuned(saved=False) == {False}
    assert itc.forward_tiles(17, 256, 2, 90, True).block_q == 32


# files


def one(name: str = "forward") -> dict[str, Any]:
    fields = gelu.TUNED.classes[name]
    return {name: [dict.fromkeys(fields, 4)]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "the file: expected an object"),
        ('{"sm_90": {}}', "'sm_90' is no compute capability"),
        ('{"90": []}', "90: expected an object"),
        ('{"90": {"sideways": []}}', "no class 'sideways'; there are forward, backward"),
        ('{"90": {"forward": {}}}', "forward: expected a list of 1"),
        ('{"90": {"forward": [4]}}', "forward: expected an object"),
        ('{"90": {"forward": [{"block_r": 4}]}}', "expected block_r, block_f, num_warps, not"),
        (json.dumps({"90": {"forward": one()["forward"] * 2}}), "forward: expected a list of 1"),
        (json.dumps({"90": one()}).replace("4}", '"4"}'), "num_warps cannot be '4'"),
        (json.dumps({"90": one()}).replace("4}", "true}"), "num_warps cannot be True"),
        (json.dumps({"90": one()}).replace("4}", "0}"), "num_warps cannot be 0"),
        (json.dumps({"90": one()}).replace("4}", "null}"), "num_warps cannot be None"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "tuned.json").write_text(text)
    tuned = Tuned(tmp_path, gelu.TUNED.classes)
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            tuned.entries(90, "forward")
        assert str(caught.value).startswith(f"{tmp_path / 'tuned.json'}: malformed: ")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_file_is_an_empty_one_and_is_read_once(tmp_path: Path) -> None:
    assert Tuned(tmp_path, gelu.TUNED.classes).entries(90, "forward") == ()
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"90": one()}))
    tuned = Tuned(tmp_path, gelu.TUNED.classes)
    assert tuned.entries(90, "forward") == tuple(one()["forward"])
    assert tuned.entries(80, "forward") == tuned.entries(90, "backward") == ()
    file.unlink()
    assert tuned.entries(90, "forward")
    with formula_alone():
        assert not tuned.entries(90, "forward")


@pytest.mark.parametrize("op", OPS)
def test_what_is_committed_is_as_tune_would_write_it(op: str, tmp_path: Path) -> None:
    tuned = OPS[op].TUNED
    assert tuned.path.resolve() == tune.KERNELS / op / "tuned.json"
    data = json.loads(tuned.path.read_text())
    tune.write(tmp_path / "tuned.json", data)
    assert (tmp_path / "tuned.json").read_bytes() == tuned.path.read_bytes()
    assert len(Tuned(tmp_path, tuned.classes, tuned.lists).table) == sum(map(len, data.values()))


# from a sweep


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    for op in OPS:
        (folder / op).mkdir(parents=True)
    return folder


def rows(case: str, times: dict[str, Any], dropouts: Sequence[float] = (0.0, 0.1)) -> Iterator[Any]:
    """Microseconds by configuration; of several, one for each rate; None: it does not run."""
    for name, given in times.items():
        several = given if isinstance(given, tuple) else (given,) * len(dropouts)
        for dropout, us in zip(dropouts, several, strict=True):
            row = {"case": case, "dropout": dropout, "configuration": name}
            if us is None:
                yield row | {"does_not_run": "an error"}
            else:
                of = {"median_s": 1e-6 * abs(us), "agrees": us > 0, "error": 0.0}
                yield row | of | {"floor_s": 1e-5, "of_floor": 10 / abs(us)}


def sweep_of(*several: Iterator[Any], **conditions: Any) -> Sweep:
    given = {"device": "NVIDIA H200", "capability": 90} | conditions
    return {"conditions": given, "rows": [row for some in several for row in some]}


def run_tune(tmp_path: Path, kernels: Path, sweep: Sweep) -> int:
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    options = ["--kernels", str(kernels), "--combined", str(tmp_path / "combined.json")]
    return tune.main([str(tmp_path / "sweep.json"), *options])


def contents(kernels: Path) -> dict[str, Any]:
    return {op: json.loads((kernels / op / "tuned.json").read_text()) for op in OPS}


FULL = sweep_of(
    # quick without dropout alone; the least mean; quicker, but wrong, or not at every rate
    rows(
        "self_forward_64x64_b256",
        {
            "default": (20, 40),
            "m64_w2": (10, 60),
            "m32_w2": (18, 30),
            "m32_w4": (-9, -9),
            "m16_w1": (9, None),
        },
    ),
    # a gain of 3 % is one, of less is none
    rows("gelu_forward_r33792_f3072", {"default": 103.1, "r4_f256_w4": 100}, (0.0,)),
    rows("gelu_backward_r33792_f3072", {"default": 102.9, "r4_f256_w4_p528": 100}, (0.0,)),
    rows("cross_backward_32x257_n768_b256", {"default": 900, "m64_n32_m128_n64": (500, 600)}),
    # of both sizes together
    rows("itc_backward_n1680", {"default": 100, "d128": 80, "images_d128_texts_d256": 90}, (0.0,)),
    rows(
        "itc_backward_n4096", {"default": 400, "d128": 420, "images_d128_texts_d256": 350}, (0.0,)
    ),
    rows("layer_norm_forward_r33792_c768", {"default": None, "r1_w4": -8}, (0.0, 0.1)),
)


def test_winners_of_a_sweep(
    tmp_path: Path, kernels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tune(tmp_path, kernels, FULL) == 0
    found = contents(kernels)
    assert found["qformer_attention"]["90"]["self_forward/no_causal"] == [
        {
            "block_m": 32,
            "block_n": 64,
            "heads": 1,
            "max_registers": None,
            "num_stages": 2,
            "num_warps": 2,
        }
    ]
    several = found["qformer_attention"]["90"]["cross_backward/several_uses"]
    assert [(x["block_m"], x["block_n"], x["interleaved"]) for x in several] == [
        (64, 32, False),
        (128, 64, False),
        (64, 32, True),
    ]
    assert set(found["qformer_attention"]["90"]) == {
        "self_forward/no_causal",
        "cross_backward/several_uses",
    }
    assert found["bias_gelu"] == {
        "90": {"forward": [{"block_r": 4, "block_f": 256, "num_warps": 4}]}
    }
    images, texts = found["itc"]["90"]["backward/q32_d256"]
    assert (images["out_d"], texts["out_d"]) == (128, 256)
    assert found["dropout_add_layer_norm"] == {}
    # the table
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == tune.HEADER
    cells = [line.split() for line in lines]
    assert cells[1] == ["self_forward_64x64_b256", "28.3", "m32_w2", "23.2", "1.22", "43", "%"]
    assert ["gelu_backward_r33792_f3072", "102.9", "default", "102.9", "1.00", "10", "%"] in cells
    assert "itc_backward_n1680+itc_backward_n4096" in [line[0] for line in cells]
    assert ["layer_norm_forward_r33792_c768", "none", "ran", "and", "agreed"] in cells


def test_it_says_the_same_twice_and_again_elsewhere(tmp_path: Path, kernels: Path) -> None:
    """As bytes: these files are part of the hash of the kernels' code, which records name."""
    run_tune(tmp_path, kernels, FULL)
    texts = [(kernels / op / "tuned.json").read_bytes() for op in OPS]
    assert all(text.endswith(b"}\n") for text in texts)
    run_tune(tmp_path, kernels, FULL)
    assert [(kernels / op / "tuned.json").read_bytes() for op in OPS] == texts
    there = tmp_path / "there"
    for op in OPS:
        (there / op).mkdir(parents=True)
        (there / op / "tuned.json").write_text("something else")
    combined = str(tmp_path / "combined.json")
    assert tune.main(["--install", combined, "--kernels", str(there)]) == 0
    assert [(there / op / "tuned.json").read_bytes() for op in OPS] == texts
    for op, config in OPS.items():
        assert Tuned(there / op, config.TUNED.classes, config.TUNED.lists).table.keys() == {
            (90, name) for name in contents(kernels)[op].get("90", ())
        }


def test_what_was_not_timed_stays(tmp_path: Path, kernels: Path) -> None:
    run_tune(tmp_path, kernels, FULL)
    before = contents(kernels)
    other = sweep_of(
        rows("gelu_forward_r33792_f3072", {"default": 50, "r4_f256_w4": 100}, (0.0,)),
        rows("self_forward_64x64_b256", {"default": None}),
        rows("self_backward_64x64_b256", {"default": 3, "m32_w8": 2}),
        capability=100,
    )
    run_tune(tmp_path, kernels, other)
    after = contents(kernels)
    # the default is not written down
    assert after["bias_gelu"] == before["bias_gelu"]
    assert set(after["qformer_attention"]["100"]) == {"self_backward/no_causal"}
    assert after["qformer_attention"]["90"] == before["qformer_attention"]["90"]
    other["conditions"]["capability"] = 90
    run_tune(tmp_path, kernels, other)
    assert contents(kernels)["bias_gelu"] == {}
    assert "self_forward/no_causal" in contents(kernels)["qformer_attention"]["90"]


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        (
            {"conditions": {"device": "a CPU"}, "rows": FULL["rows"]},
            "the sweep is of no GPU: a CPU",
        ),
        ({"conditions": {}, "rows": []}, "the sweep is of no GPU: no device named"),
        ({"conditions": {"device": "NVIDIA H200"}, "rows": []}, "the sweep has no times"),
        (
            sweep_of(rows("gelu_forward_r33792_f3072", {"default": None}, (0.0,))),
            "the sweep has no times",
        ),
        ([], "no sweep"),
    ],
)
def test_a_sweep_that_says_nothing_is_refused(
    tmp_path: Path, kernels: Path, sweep: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tune(tmp_path, kernels, sweep) == 1
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert not list(kernels.rglob("tuned.json"))


def test_what_is_not_ours_is_not_installed(
    tmp_path: Path, kernels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "combined.json"
    for text in ("{", "[]", '{"other": {}}', '{"itc": {}, "bias_gelu": {"90": {"sideways": []}}}'):
        file.write_text(text)
        assert tune.main(["--install", str(file), "--kernels", str(kernels)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not list(kernels.rglob("tuned.json"))
