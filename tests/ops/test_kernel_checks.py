"""Kernels are checked before `auto` takes them: every planted fault is refused for its reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_faults
import pytest
import torch

from blip2fast.ops import dispatch, kernel_checks, records
from blip2fast.ops.dispatch import Backend, KernelCheck, choose, kernels_set_to
from blip2fast.ops.kernel_checks import Checks, Request, use_checks
from blip2fast.ops.records import Record

SOURCE = "kernel_faults:problem"


def request(fault: str, rival: str = "slow", log: Path | None = None) -> Request:
    kind = f"fault={fault.replace(' ', '_')}" + (f" log={log}" if log else "")
    return Request("squares", "kernel", kind, "cpu", "bias_gelu", SOURCE, rival)


@pytest.fixture
def checks(tmp_path: Path) -> Checks:
    """Of nobody else, in a folder of its own."""
    return Checks(tmp_path / "cache", shipped={}, limit_s=60)


FAULTS = {
    "none": "",
    "wrong element": r"output: largest error 0\.01, allowed .*; worst at \[3, 5\]",
    "wrong gradient": r"gradient 0: largest error 0\.01, .*; worst at \[0, 0\]",
    "unwritten row": r"output was not written at row 8 \(of 17 elements in all\)",
    "nan": r"output is NaN at \[3, 5\]",
    "varies": "output differs between two runs on the same inputs",
    "crash": "crashed: SIGSEGV",
    "raises": "raised RuntimeError: CUDA error: an illegal memory access was encountered$",
    "slow": r"slower: \d+ us forward and backward, slow takes \d+ \(squares\)",
    # these say nothing about the kernels
    "no memory": r"raised torch\.OutOfMemoryError: CUDA out of memory",
    "killed": "crashed: SIGKILL",
}
OF_THE_MOMENT = ("no memory", "killed")


@dataclass(frozen=True)
class Found:
    """What one round of checks of all faults found, said, and left on disk."""

    records: dict[str, Record]
    warnings: list[str]
    checks: Checks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    checks = Checks(tmp_path_factory.mktemp("records"), shipped={}, limit_s=60)
    asked = [request(fault) for fault in FAULTS]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settled = checks.settle(asked)
        # neither checked nor said once more
        assert checks.settle(asked) == settled
    told = [str(warning.message) for warning in said]
    return Found(dict(zip(FAULTS, settled, strict=True)), told, checks)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_for_its_own_reason(found: Found, fault: str) -> None:
    record = found.records[fault]
    if not FAULTS[fault]:
        assert record.reason == ""
        return
    assert re.search(FAULTS[fault], record.reason), record.reason
    verdict = "could not be checked" if fault in OF_THE_MOMENT else "were checked"
    assert record.reason.startswith(f"its kernels {verdict} on the CPU: ")
    mine = [warning for warning in found.warnings if record.reason in warning]
    # being slower is no fault
    assert len(mine) == (fault != "slow")
    assert all("'kernel' is passed over" in warning for warning in mine)
    assert all("; slow runs instead" in warning for warning in mine)


def test_nothing_else_is_said(found: Found) -> None:
    assert len(found.warnings) == len(FAULTS) - len(("none", "slow")), found.warnings


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_start_reads_what_says_something_about_kernels(found: Found, fault: str) -> None:
    again = Checks(found.checks.file.path.parent, shipped={})
    expected = None if fault in OF_THE_MOMENT else found.records[fault]
    assert again.find([request(fault)]) == [expected]


def test_times_of_what_is_taken(found: Found) -> None:
    record = found.records["none"]
    assert 0 < record.ours_us < record.rival_us
    assert re.fullmatch(
        r"squares by kernel \(fault=none\): right on the CPU, \d+ us against \d+ of slow",
        str(record),
    )


def test_a_hang_is_ended(tmp_path: Path) -> None:
    checks = Checks(tmp_path, shipped={}, limit_s=2)
    with pytest.warns(RuntimeWarning, match="hung: no result after 2 s"):
        hung, right = checks.settle([request("hang"), request("none")])
    assert hung.settled
    # the one behind it was checked by another process
    assert right.reason == ""


def test_a_check_that_does_not_start(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "WORKER", "blip2fast.ops.not_there")
    with pytest.warns(RuntimeWarning, match="could not be checked .* does not start: ended with"):
        found = checks.settle([request("none"), request("slow")])
    assert [record.settled for record in found] == [False, False]


def test_a_compiling_run_beforehand_decides_nothing(checks: Checks) -> None:
    with pytest.warns(RuntimeWarning, match="crashed"):
        crashed, right = checks.settle([request("crash"), request("none")], jobs=2)
    assert crashed.reason
    assert right.reason == ""


# what a record is void for


def test_a_stale_hash_and_other_versions_are_no_record(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Checks(found.checks.file.path.parent, shipped={})
    monkeypatch.setattr(kernel_checks, "code_hash", lambda op, folder, backend: "of other code")
    assert again.find([request("none")]) == [None]
    monkeypatch.undo()
    here = records.machine("cpu")
    for name in ("card", "capability", "driver", "torch", "cuda", "triton", "package"):
        other = replace(here, **{name: "another"})
        monkeypatch.setattr(kernel_checks, "machine", lambda device, other=other: other)
        assert again.find([request("none")]) == [None], name
    monkeypatch.undo()
    assert again.find([request("none")]) != [None]


def test_the_hash_is_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an op's folder, tuned parameters included, and shared code; for `cuda` of its build."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for file in ("launch.py", "a/forward.py", "b/forward.py"):
        (tmp_path / file).write_text("x = 1\n")
    for file in ("a/tuned.json", "b/tuned.json"):
        (tmp_path / file).write_text('{"90": {"cross_forward": [1], "self_forward": [1]}}')
    monkeypatch.setattr(records, "KERNELS", tmp_path)
    monkeypatch.setattr(records, "compiled_code", lambda: "some code")

    def hashes() -> list[str]:
        records.code_hash.cache_clear()
        return [records.code_hash("an_op", "a", backend) for backend in ("triton", "cuda")]

    try:
        first = hashes()
        assert first[0] != first[1]
        for file in ("b/forward.py", "b/tuned.json", "a/README.md"):
            (tmp_path / file).write_text("{}\n")
        assert hashes() == first
        monkeypatch.setattr(records, "compiled_code", lambda: "other code")
        assert hashes()[0] == first[0]
        assert hashes()[1] != first[1]
        both = ("qformer_attention", "qformer_cross_attention")
        own = [records.code_hash(op, "a", "triton") for op in both]
        for file in ("launch.py", "a/forward.py", "a/tuned.json"):
            before = hashes()
            text = '{"90": {"cross_forward": [2], "self_forward": [1]}}'
            (tmp_path / file).write_text(text if file == "a/tuned.json" else "x = 2\n")
            assert not set(hashes()) & set(before), file
            now = [records.code_hash(op, "a", "triton") for op in both]
            # what is tuned for cross-attention is nothing to self-attention
            same = [x == y for x, y in zip(now, own, strict=True)]
            assert same == [file == "a/tuned.json", False]
            own = now
    finally:
        records.code_hash.cache_clear()


# records on disk


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    """A file stands where the folder would be: nobody, not even root, can write there."""
    (tmp_path / "file").write_text("")
    checks = Checks(tmp_path / "file" / "cache", shipped={})
    with pytest.warns(RuntimeWarning, match="kept for this process only") as said:
        found = checks.settle([request("none"), request("slow")])
    assert len(said) == 1
    assert checks.settle([request("none")]) == found[:1]
    assert [bool(record.reason) for record in found] == [False, True]
    assert checks.find([request("none"), request("slow")]) == found


def test_records_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        records.write_records(tmp_path / "records.json", [])
    finally:
        os.umask(before)
    assert (tmp_path / "records.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]


def test_a_file_that_is_not_ours_counts_as_empty(checks: Checks) -> None:
    checks.file.path.parent.mkdir()
    checks.file.path.write_text('{"records": [{"op": "cut off')
    with pytest.warns(RuntimeWarning, match="not a file of kernel records"):
        (record,) = checks.settle([request("none")])
    assert json.loads(checks.file.path.read_text())["records"] == [records.as_json(record)]


def test_two_processes_at_once_check_once_and_agree(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = """
import sys
from pathlib import Path
from blip2fast.ops.kernel_checks import Checks
from test_kernel_checks import request
print("ready", flush=True)
sys.stdin.readline()
folder, log = map(Path, sys.argv[1:])
(record,) = Checks(folder, shipped={}).settle([request("none", log=log)])
print(record)
"""
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cache"), str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert "right on the CPU" in told[0]
    assert told[0] == told[1]
    assert log.read_text() == "checked\n"


def test_waiting_for_another_process_ends(tmp_path: Path) -> None:
    holder, waiter = (Checks(tmp_path, shipped={}, wait_s=0.2) for _ in range(2))
    with holder.file.locked(1) as held:
        assert held
        with pytest.warns(RuntimeWarning, match="another process has held"):
            (record,) = waiter.settle([request("none")])
    assert not record.settled


def test_records_that_ship_need_no_check(tmp_path: Path) -> None:
    """The driver and patch releases of PyTorch do not count, all else does."""
    ours = request("crash").key
    proven = Record(replace(ours, driver="1.2", torch=f"{records._minor(ours.torch)}.99"))
    shipped = {proven.key.relaxed(): proven}
    checks = Checks(tmp_path, shipped=shipped)
    assert checks.settle([request("crash")]) == [proven]
    assert not checks.file.path.exists()
    for name in ("code", "card", "capability", "torch", "triton", "kind", "backend", "op"):
        other = replace(ours, **{name: "another"})
        assert other.relaxed() not in shipped, name


def test_the_table_that_ships_can_be_read() -> None:
    for key, record in records.shipped_records().items():
        assert record.settled, key
        assert not record.fault, key


def test_where_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert records.cache_folder() == tmp_path / "blip2fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert records.cache_folder() == Path.home() / ".cache" / "blip2fast"


# what `choose` does with it


@dataclass(frozen=True)
class SquaresCall:
    """A call of the planted kernel."""

    fault: str
    size: int = 1
    device: str = "cpu"


def _always(call: SquaresCall) -> list[str]:
    return []


BACKENDS = (
    Backend(
        "kernel",
        _always,
        _always,
        KernelCheck(
            "bias_gelu",
            lambda call: f"fault={call.fault.replace(' ', '_')}",
            lambda call: call.device,
            SOURCE,
        ),
    ),
    Backend("quick", lambda call: [] if call.fault == "beaten" else ["not today"], _always),
    Backend("slow", _always, _always),
)


@pytest.fixture
def asked(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    """`choose` checks on the CPU, and asks these checks."""
    monkeypatch.setattr(dispatch, "_CHECKED_ON", ("cuda", "cpu"))
    dispatch.forget_decisions()
    with use_checks(checks):
        yield checks
    dispatch.forget_decisions()


def test_auto_takes_what_is_right_and_quicker(asked: Checks) -> None:
    assert choose("squares", BACKENDS, SquaresCall("none"), "auto") == "kernel"
    # the rival is what `auto` takes otherwise, which here is quicker than any kernel of ours
    assert choose("squares", BACKENDS, SquaresCall("slow", 2), "auto") == "slow"
    assert {record.rival for record in asked.known.values()} == {"slow"}


def test_auto_takes_the_fallback_and_says_why(asked: Checks) -> None:
    call = SquaresCall("crash")
    with pytest.warns(RuntimeWarning, match="'kernel' is passed over, .*SIGSEGV; slow runs"):
        assert choose("squares", BACKENDS, call, "auto") == "slow"
    with pytest.raises(NotImplementedError) as error:
        choose("squares", BACKENDS, call, "quick")
    assert "kernel: its kernels were checked on the CPU: crashed: SIGSEGV" in str(error.value)
    # by force it runs all the same
    assert choose("squares", BACKENDS, call, "kernel") == "kernel"


def test_a_model_says_which_kernels_it_took(asked: Checks) -> None:
    assert dispatch.describe_choices() == []
    choose("squares", BACKENDS, SquaresCall("none"), "auto")
    with pytest.warns(RuntimeWarning, match="SIGSEGV"):
        choose("squares", BACKENDS, SquaresCall("crash"), "auto")
    # what is forced was no choice
    choose("squares", BACKENDS, SquaresCall("slow"), "slow")
    assert dispatch.describe_choices() == [
        "squares: kernel",
        "squares: slow, kernel is passed over: its kernels were checked on the CPU: crashed: "
        "SIGSEGV",
    ]


def test_the_settings(asked: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `never` nor `trust` checks anything."""
    monkeypatch.setattr(asked, "settle", None)
    for setting, taken in (("never", "slow"), ("trust", "kernel")):
        with kernels_set_to(setting):
            assert choose("squares", BACKENDS, SquaresCall("none"), "auto") == taken


def test_calls_of_a_kind_are_checked_once(asked: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("squares", BACKENDS, SquaresCall("none"), "auto") == "kernel"
    monkeypatch.setattr(asked, "_run", None)
    assert choose("squares", BACKENDS, SquaresCall("none", 2), "auto") == "kernel"
    # the same call does not even look
    monkeypatch.setattr(asked, "find", None)
    assert choose("squares", BACKENDS, SquaresCall("none", 2), "auto") == "kernel"


def test_nothing_is_checked_while_a_graph_is_captured(
    asked: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = SquaresCall("none")
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_available", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose("squares", BACKENDS, call, "auto") == "slow"
        with pytest.raises(NotImplementedError, match="while a CUDA graph is captured: call"):
            choose("squares", BACKENDS, call, "quick")
    assert not asked.known
    # afterwards it is
    assert choose("squares", BACKENDS, call, "auto") == "kernel"


def test_a_traced_program_reads_records_alone(asked: Checks) -> None:
    def program(x: torch.Tensor, size: int) -> torch.Tensor:
        name = choose("squares", BACKENDS, SquaresCall("none", size), "auto")
        return x + (1 if name == "kernel" else 0)

    x = torch.zeros(3)
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x, 1), x)
    assert not asked.known
    asked.settle([request("none")])
    torch.compiler.reset()
    assert torch.equal(compiled(x, 1), x + 1)


def test_without_a_device_nothing_is_checked(
    asked: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call = SquaresCall("none", device="cuda:0")
    assert choose("squares", BACKENDS, call, "auto") == "slow"
    assert not asked.known


def test_the_planted_kernel_is_right_without_a_fault() -> None:
    (out,) = kernel_faults.squares("kernel", "none", [torch.arange(153.0).view(9, 17)])
    assert torch.equal(out, torch.arange(153.0).view(9, 17) ** 2)
