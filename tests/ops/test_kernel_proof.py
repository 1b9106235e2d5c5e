"""The whole way from `auto` to this library's kernels, through Triton's interpreter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import run_interpreted, starts_interpreter

from blip2fast.kernels.bias_gelu import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, MaskKind
from blip2fast.ops import (
    bias_gelu,
    dispatch,
    dropout_add_layer_norm,
    itc_loss,
    kernel_calls,
    kernel_kinds,
    kernel_proof,
    qformer_attention,
    qformer_cross_attention,
)
from blip2fast.ops.dispatch import HAS_TRITON, INTERPRETED, Backend
from blip2fast.ops.kernel_calls import Sizes, check_kernels, kernel_records, usual_calls
from blip2fast.ops.kernel_checks import Checks, use_checks
from blip2fast.ops.records import Record

interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs TRITON_INTERPRET")
# narrow, with a rest in every tile
SIZES = Sizes(hidden=48, heads=2, queries=5, text=7, images=17, features=16)


@pytest.mark.slow
@starts_interpreter
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checks on the CPU, with records of their own."""
    monkeypatch.setattr(dispatch, "_CHECKED_ON", ("cuda", "cpu"))
    dispatch.forget_decisions()
    with use_checks(Checks(tmp_path, shipped={})) as checks:
        yield checks
    dispatch.forget_decisions()


@interpreted
def test_every_kernel_of_both_stages_is_found_right(asked: Checks) -> None:
    """In fp16, at small sizes; and what is known afterwards is what a report gets."""
    records = check_kernels("cpu", torch.float16, SIZES, jobs=1)
    assert [str(record) for record in records if record.fault] == []
    kinds = {(record.key.op, record.key.kind) for record in records}
    expected = {
        (op, backends[0].check.kind(call))
        for op, backends, call in usual_calls(torch.device("cpu"), torch.float16, SIZES)
    }
    assert kinds == expected
    assert {record.key.backend for record in records} == {"triton"}
    assert {record.rival for record in records} == {"pytorch", "sdpa", "chunked"}
    assert set(kernel_records("cpu")) == set(records)


@interpreted
def test_auto_runs_the_kernel_once_it_is_checked(
    asked: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    kernels = bias_gelu.__globals__["_kernels"]
    monkeypatch.setitem(bias_gelu.__globals__, "_kernels", lambda: ran.append(1) or kernels())
    x = torch.randn(5, 7, dtype=torch.float16)
    out = bias_gelu(x)
    assert ran
    torch.testing.assert_close(out, reference.bias_gelu(x), rtol=2e-3, atol=1e-3)
    assert [record.key.kind for record in asked.known.values()] == ["dtype=fp16 bias=fp16"]


@interpreted
def test_the_interpreter_alone_is_no_reason_to_check() -> None:
    """Outside these tests its slow kernels are passed over as ever."""
    backends = kernel_calls.GELU_BACKENDS
    call = kernel_calls.BiasGeluCall(torch.float32, "cpu")
    assert dispatch.choose("bias_gelu", backends, call, "auto") == "pytorch"
    assert dispatch.passed_over("bias_gelu", backends, 0, call)[0] == [
        "Triton's interpreter runs its kernels, slowly: force it with impl='triton'"
    ]


class Recorded(Checks):
    """Everything was found right, and nothing may be checked; the kinds that were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, shipped={})
        self.asked: list[str] = []

    def find(self, requests):
        self.asked += [request.kind for request in requests]
        return [Record(request.key) for request in requests]

    settle = None


def _programs():
    """Each op's call by a function of tensors, of small inputs."""
    layout = AttentionLayout.build(3, 5, (4, 2, 7), MaskKind.BIDIRECTIONAL)
    temp = torch.tensor(0.07)
    return {
        "bias_gelu": (bias_gelu, (torch.randn(6, 48), torch.randn(48))),
        "dropout_add_layer_norm": (
            lambda x, w: dropout_add_layer_norm(x, x, w, w, x_bias=w),
            (torch.randn(6, 48), torch.randn(48)),
        ),
        "qformer_attention": (
            lambda qkv: qformer_attention(qkv, layout),
            (torch.randn(layout.num_rows, 3, 2, 24),),
        ),
        "qformer_cross_attention": (
            qformer_cross_attention,
            (torch.randn(3, 5, 2, 24), torch.randn(3, 17, 2, 2, 24)),
        ),
        "itc_loss": (
            lambda image, text: itc_loss(image, text, temp, negatives="none").loss,
            (torch.randn(6, 5, 16), torch.randn(6, 16)),
        ),
    }


@interpreted
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", list(_programs()))
def test_a_traced_program_runs_what_records_allow(
    op: str, dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks for the same kind of call as one that is not traced, sizes known or not."""
    monkeypatch.setattr(dispatch, "_CHECKED_ON", ("cuda", "cpu"))
    program, inputs = _programs()[op]
    graphs = []

    def look(graph: torch.fx.GraphModule, given: object):
        graphs.append(graph.code)
        return graph

    for checks, runs in ((Checks(tmp_path, shipped={}), False), (Recorded(tmp_path), True)):
        torch.compiler.reset()
        dispatch.forget_decisions()
        graphs.clear()
        with use_checks(checks):
            out = torch.compile(program, backend=look, fullgraph=True, dynamic=dynamic)(*inputs)
            (code,) = graphs
            # bias_gelu has one kernel, the others' operators are told the backend
            assert (f"blip2fast.{op}(" in code if op == "bias_gelu" else "'triton'" in code) == runs
            assert not checks.known
            if runs:
                traced = set(checks.asked)
                checks.asked.clear()
                torch.testing.assert_close(out, program(*inputs))
                assert traced == set(checks.asked)
    dispatch.forget_decisions()


def test_without_a_gpu_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel_calls, "checks", None)
    assert check_kernels() == []
    assert kernel_records() == []


# kinds of calls: coarse enough for a run to have few, fine enough to have one set of tiles each


def test_nothing_is_checked_while_operators_are_recorded(asked: Checks) -> None:
    """`make_fx` runs a program natively, with tensors that stand for others."""
    backends = kernel_calls.GELU_BACKENDS
    backends = (Backend("kernel", lambda call: [], lambda call: [], backends[0].check), backends[1])

    def program(x: torch.Tensor) -> torch.Tensor:
        call = kernel_calls.BiasGeluCall(x.dtype, "cpu")
        assert dispatch.choose("bias_gelu", backends, call, "auto") == "pytorch"
        reasons, stay = dispatch.passed_over("bias_gelu", backends, 0, call)
        assert "nothing is checked while a program is traced" in reasons[0]
        assert not stay
        return x + 1

    make_fx(program)(torch.zeros(3))
    assert not asked.known


def test_a_gpu_is_timed_by_its_own_clock_with_the_host_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []
    slept: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, other: object) -> float:
            return 2.5  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles))
    run = partial(happened.append, "run")
    assert kernel_proof._time(run, torch.device("cuda", 0), host_s=1e-3) == 2.5e-3
    assert happened == ["wait", "record", "run", "record", "wait"]
    # a millisecond at 2 GHz is two million
    assert slept[0] > 2_000_000


def test_every_gpu_is_asked_about_on_its_own() -> None:
    calls = [kernel_calls.BiasGeluCall(torch.float32, "cuda", gpu) for gpu in (0, 1, None)]
    assert [kernel_kinds.device_of(call) for call in calls] == ["cuda:0", "cuda:1", "cuda:0"]
    assert kernel_kinds.device_of(kernel_calls.BiasGeluCall(torch.float32, "cpu")) == "cpu"


def test_a_run_has_few_kinds() -> None:
    """Texts of 1 to 32 tokens beside 32 queries, which is what captions are, are of one kind."""
    kinds = {(kernel_kinds.self_rows(32, T), kernel_kinds.self_keys(32, T)) for T in range(1, 33)}
    assert len(kinds) == 1
    calls = usual_calls(torch.device("cuda", 0), torch.bfloat16)
    assert len({(op, backends[0].check.kind(call)) for op, backends, call in calls}) <= 20


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_calls_of_a_kind_have_the_same_tiles(width: int, dtype: torch.dtype) -> None:
    """Of self-attention, for pairs and for texts that see no query; of cross-attention."""
    config = pytest.importorskip("blip2fast.kernels.qformer_attention.config")
    found: dict[object, object] = {}
    for Q in (1, 5, 17, 32, 40):
        for T in range(150):
            for kind in (MaskKind.BIDIRECTIONAL, MaskKind.UNIMODAL):
                layout = AttentionLayout.build(1, Q, (T,) if T else (), kind if T else ())
                qkv = torch.empty(layout.num_rows, 3, 12, width, dtype=dtype, device="meta")
                tiles = (
                    config.self_forward_tiles(layout, qkv),
                    config.self_backward_tiles(layout, qkv),
                )
                name = (Q, kernel_kinds.self_rows(Q, T), kernel_kinds.self_keys(Q, T))
                # queries alone are a case of their own in the checks of their kind
                name = (*name, kind if T else None)
                assert found.setdefault(name, tiles) == tiles, (Q, T)
    for S in range(700):
        of = kernel_kinds.cross_keys(S)
        q = torch.empty(2, 32, 12, width, dtype=dtype, device="meta")
        forms = []
        for n in (S, of):
            kv = torch.empty(2, n, 2, 12, width, dtype=dtype, device="meta")
            tiles = config.cross_forward_tiles(q, kv, 2), *config.cross_backward_tiles(q, kv, 2)
            counts = [-(-n // t.block_n) for t in tiles]
            parts = [config.splits(1, c, t.full)[0] for c, t in zip(counts, tiles, strict=True)]
            forms.append((tiles, [part > 1 for part in parts]))
        assert forms[0] == forms[1], (S, of)


@pytest.mark.parametrize(("steps", "fault"), [(1, ""), (3, "largest error")])
def test_a_single_value_may_be_the_next_number(steps: int, fault: str) -> None:
    """PyTorch's one value may be the nearest by chance: its error of 0 says nothing of others'."""
    exact = torch.tensor(5.0150, dtype=torch.float64)
    plain = exact.float()
    ours = plain
    for _ in range(steps):
        ours = torch.nextafter(ours, torch.tensor(6.0))
    found = kernel_proof._inexact(ours, plain, exact, 0.0)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)
