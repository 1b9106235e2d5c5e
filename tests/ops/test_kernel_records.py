"""The script that makes the table of proven kernels from what was found on GPUs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from blip2fast.ops.records import Key, Record, read_records, shipped_records, write_records

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_records.py"
KEY = Key(
    op="bias_gelu",
    backend="triton",
    kind="dtype=bf16",
    code="abc",
    card="NVIDIA H200",
    capability="9.0",
    driver="580.1",
    torch="2.11.0",
    cuda="13.0",
    triton="3.6.0",
    package="0.1",
)
RIGHT = Record(KEY, rival="pytorch", ours_us=10.0, rival_us=20.0)


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_records", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_was_right_and_quicker_on_a_gpu(script: ModuleType, tmp_path: Path) -> None:
    table, found = tmp_path / "table.json", tmp_path / "found.json"
    other = replace(RIGHT, key=replace(KEY, kind="dtype=fp16"))
    stale = replace(RIGHT, key=replace(KEY, code="old", kind="dtype=fp32"))
    write_records(table, [replace(RIGHT, ours_us=15.0), stale])
    bad = [
        replace(other, key=replace(other.key, op="itc_loss"), fault="slower: 30 us"),
        replace(other, key=replace(other.key, card="the CPU")),
        replace(other, key=replace(other.key, op="itc_loss"), ours_us=0.0),
    ]
    write_records(found, [RIGHT, other, *bad])
    records, left_out = script.merge([found], table, {"abc"})
    assert records == [RIGHT, other]
    assert len(left_out) == 4
    assert script.merge([found], table)[0] == [RIGHT, other, stale]


def test_a_record_goes_through_a_file_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    records = [RIGHT, replace(RIGHT, key=replace(KEY, kind="x"), fault="a 'fault'\nof two lines")]
    write_records(file, records)
    assert read_records(file) == records
    assert set(shipped_records(file)) == {record.key.relaxed() for record in records}
