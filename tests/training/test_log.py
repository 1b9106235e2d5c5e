"""The log of a run, read while it is written and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2fast.training.log import RunLog, read_metrics

FIRST, SECOND = '{"step": 1, "loss": 3.0}\n', '{"step": 2, "loss": 2.5}\n'


@pytest.mark.parametrize("end", range(len(SECOND) + 1))
def test_a_last_line_without_its_end_is_left_out(tmp_path: Path, end: int) -> None:
    """Also where what is there of it would be a line: a number may go on."""
    (tmp_path / "metrics.jsonl").write_text(FIRST + SECOND[:end])
    expected = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    assert read_metrics(tmp_path) == (expected if end == len(SECOND) else expected[:1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"step": 1, "lo\n' + SECOND, r"metrics.jsonl, line 1 is not JSON \(.*; delete it"),
        (FIRST + "\n", "metrics.jsonl, line 2 is not JSON"),
        (FIRST + '{"loss": 2.5}\n', "line 2: expected a step and its metrics, got '{\"loss"),
        (FIRST + "7\n", "line 2: expected a step and its metrics, got '7'"),
    ],
)
def test_other_damage_is_an_error_that_names_the_line(
    tmp_path: Path, lines: str, message: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not a file; give the output folder"):
        read_metrics(tmp_path)


def test_a_resumed_log_goes_on_after_the_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(FIRST + SECOND + "\0\0\0\n" + '{"step": 4, "loss": 2.0}\n')
    log = RunLog(tmp_path, start_step=1, max_steps=4, stage=2)
    log.write(2, {"loss": 2.25})
    log.close()
    assert path.read_text() == FIRST + '{"step": 2, "loss": 2.25}\n'
