"""What a process holds does not grow with the records: not in itself, and not in a worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import large_table
from large_table import Load, measure, write_table

from blip2fast.data.records import CaptionRecord
from blip2fast.data.sources import MOST_CHECKED, SAMPLED, checked_keys
from blip2fast.data.table import RecordTable

# that of 10^8 records takes 9 GB of disk
MANY = int(os.environ.get("BLIP2FAST_TABLE_ROWS", "6000000"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts private pages as Linux does")
def test_memory_does_not_grow_with_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    load = Load(workers=1, batches=40, batch_size=200)
    found = []
    for rows in (SAMPLED, MANY):
        found.append(measure(write_table(tmp_path / str(rows), rows), load))
        assert found[-1]["rows"] == rows
    for way in load.ways:
        few, many = (each["memory"][way] for each in found)
        assert len(many["workers"]) == (way != "no workers")
        # a list of records took 513 bytes a record and 372 more in a worker, a permutation 16
        for before, after in zip(
            [few["main"], *few["workers"]], [many["main"], *many["workers"]], strict=True
        ):
            assert after["uss"] - before["uss"] < 50e6
            assert after["rss"] - before["rss"] < 150e6
            assert after["pss"] < 500e6


def test_the_table_is_as_an_import_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_table, "BATCH_ROWS", 64)
    table = RecordTable([write_table(tmp_path / "table", 150)], "caption")
    table.validate()
    told = "a picture that nobody drew, numbered {:09d}, among others"
    assert list(table) == [CaptionRecord(f"{n:09d}.jpg", (told.format(n),)) for n in range(150)]


def test_a_table_that_is_there_or_has_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1,000,000,000,000,000 rows take .* GB are free"):
        large_table.run(10**15, tmp_path, Load(), keep=False)
    (tmp_path / "300-rows").mkdir()
    with pytest.raises(ValueError, match="300-rows exists; delete it or give another folder"):
        large_table.run(300, tmp_path, Load(), keep=False)
    assert (tmp_path / "300-rows").is_dir()


def test_few_records_are_looked_at_as_a_run_starts() -> None:
    few = [CaptionRecord(str(i), ("a",)) for i in range(100)]
    assert len(checked_keys(few)) == 100

    class Many:
        def __len__(self) -> int:
            return MOST_CHECKED * 50

        def __getitem__(self, index: int) -> CaptionRecord:
            return CaptionRecord(str(index), ("a",))

    keys = sorted(map(int, checked_keys(Many())))  # type: ignore[arg-type]
    assert len(keys) == SAMPLED
    assert (keys[0], keys[-1]) == (0, MOST_CHECKED * 50 - 500)
