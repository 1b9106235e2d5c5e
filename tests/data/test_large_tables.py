"""What a process holds does not grow with the records: not in itself, and not in a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blip2fast.data.records import CaptionRecord
from blip2fast.data.sources import MOST_CHECKED, SAMPLED, checked_keys
from blip2fast.data.table import DESCRIPTION, ROWS, TableWriter

ROOT = Path(__file__).parents[2]
_BATCH = 50_000
# a multiple of _BATCH; that of 10^8 records takes some 3 GB of disk
MANY = int(os.environ.get("BLIP2FAST_TABLE_ROWS", "6000000"))

RUN = """
import json, sys
import psutil, torch
from torch.utils.data import DataLoader
from blip2fast.data.batches import BatchPlan, PlannedBatches
from blip2fast.data.sources import checked_keys, open_records
from blip2fast.data.texts import drawn_captions

def images(keys, batch):
    return {"images": torch.tensor([int(key) for key in keys])}

def texts(records, batch):
    captions = drawn_captions(records, batch, 0)
    return {"texts": torch.tensor([int(text) for text in captions])}

if __name__ == "__main__":
    records = open_records(sys.argv[1], "caption")
    checked_keys(records)
    batches = PlannedBatches(records, BatchPlan(len(records), 200, 0), images, texts)
    found = []
    for context in (None, "fork", "spawn"):
        loader = DataLoader(
            batches, None, sampler=range(100), num_workers=int(context is not None),
            multiprocessing_context=context,
        )
        for number, batch in enumerate(loader):
            assert torch.equal(batch["images"], batch["texts"])
            if number == 99 - 5:  # a worker still runs
                own = psutil.Process()
                busy = max([own, *own.children()], key=lambda each: each.pid)
                found.append((own if context is None else busy).memory_info().rss)
    print(json.dumps([len(records), *found]))
"""


def numbers(start: int, stop: int) -> pa.Array:
    """The numbers as texts of nine digits."""
    digits = np.char.zfill(np.arange(start, stop).astype("S9"), 9).tobytes()
    offsets = np.arange(stop - start + 1, dtype=np.int32) * 9
    return pa.StringArray.from_buffers(
        stop - start, pa.py_buffer(offsets.tobytes()), pa.py_buffer(digits)
    )


def write_table(path: Path, rows: int) -> Path:
    """A table whose images and captions are the numbers of its rows."""
    with TableWriter(path, "caption") as writer:
        writer.add(CaptionRecord("x", ("x",)))
        writer.finish({})
    schema = pa.schema([("image", pa.string()), ("captions", pa.list_(pa.string()))])
    with pa.OSFile(str(path / ROWS), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for start in range(0, rows, _BATCH):
            texts = numbers(start, start + _BATCH)
            lists = pa.ListArray.from_arrays(np.arange(_BATCH + 1, dtype=np.int32), texts)
            file.write_batch(pa.RecordBatch.from_arrays([texts, lists], schema=schema))
    described = json.loads((path / DESCRIPTION).read_text())
    described |= {"rows": rows, "bytes": (path / ROWS).stat().st_size}
    (path / DESCRIPTION).write_text(json.dumps(described))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    held = []
    for rows in (50_000, MANY):
        table = write_table(tmp_path / str(rows), rows)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "run.py"), str(table)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        count, *bytes_held = json.loads(done.stdout)
        assert count == rows
        held.append(bytes_held)
    # a list of records took 513 bytes a record and 372 more in a worker, a permutation 16
    for few, many in zip(*held, strict=True):
        assert many - few < 150e6
        assert many < 600e6


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
