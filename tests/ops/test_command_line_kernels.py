"""`blip2fast kernels check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blip2fast import command_line, ops
from blip2fast.ops.records import Key, Record, read_records

KEY = Key("bias_gelu", "triton", "dtype=fp16", "abc", "a card", "9.0", *"123456"[:5])
RECORDS = [
    Record(KEY, rival="pytorch", ours_us=10.4, rival_us=20.0, seconds=3.2),
    Record(KEY, fault="crashed: SIGSEGV", seconds=7.0),
]


def test_prints_and_writes_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(
        device: str | None, dtype: torch.dtype, *, again: bool, jobs: int | None, tell: Any
    ) -> list[Record]:
        assert (device, dtype, again, jobs) == ("cuda:1", torch.float16, True, 2)
        tell(RECORDS[1])
        # what an interrupted command leaves
        assert read_records(file) == RECORDS[1:]
        return RECORDS

    monkeypatch.setattr(ops, "check_kernels", check)
    file = tmp_path / "found.json"
    options = "--device cuda:1 --precision fp16 --again --jobs 2 --out"
    command_line.main(["kernels", "check", *options.split(), str(file)])
    assert capsys.readouterr().out.splitlines() == [
        "bias_gelu by triton (dtype=fp16): its kernels were checked on a card: crashed: SIGSEGV "
        "(7 s)",
        "bias_gelu by triton (dtype=fp16): right on a card, 10 us against 20 of pytorch, as "
        "recorded before",
        "1 of 2 kinds are right and quicker here",
    ]
    assert read_records(file) == RECORDS


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command_line.main(["kernels", "check"])
    assert capsys.readouterr().out == "no CUDA device: nothing to check\n"
