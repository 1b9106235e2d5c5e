"""What a run's records cost at the start and in memory, by a table of any number of rows.

    python benchmarks/large_table.py 100000000 /tmp/tables   # 9 GB of disk there, minutes
    python benchmarks/report.py                              # then docs/data.md

Writes the table in batches, lets the system forget what it holds of the file, and starts in a fresh
process what a run does with its records: imports, opening, the look at some of them, their digest,
batches of tokenized captions by worker processes. Prints and writes
`benchmarks/results/DATE_large-table.json`; the table is deleted unless `--keep` is given.

There are no pictures: an image is the number that its key says. The memory of a process is its
private part (USS), its share of all (PSS) and what is resident, with shared libraries and pages of
the table (RSS).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Workers that are spawned import this file again, so what is heavy is imported where it is used.

ROOT = Path(__file__).parent.parent
DIGITS, BATCH_ROWS = 9, 65_536
KEY = ("", ".jpg")
CAPTION = ("a picture that nobody drew, numbered ", ", among others")
# texts, and the offsets of an image, of a list of captions and of a caption
ROW_BYTES = sum(map(len, (*KEY, *CAPTION))) + 2 * DIGITS + 3 * 4
VOCABULARY = 30_522  # as many words as BERT's
WAYS = ("fork", "spawn", "no workers")


@dataclass(frozen=True)
class Load:
    """What the process reads.

    Attributes:
        workers: of the ways that have workers.
        batches, batch_size: read in each way, before memory is looked at.
        ways: how workers are started; the first one's time is that of the start.
    """

    workers: int = 2
    batches: int = 400
    batch_size: int = 256
    ways: tuple[str, ...] = WAYS


def numbered(start: int, stop: int, before: str, after: str) -> Any:
    """An Arrow column of the texts `before`, a number of nine digits, `after`."""
    import numpy as np
    import pyarrow as pa

    rows, first = stop - start, len(before)
    width = first + DIGITS + len(after)
    texts = np.empty((rows, width), np.uint8)
    texts[:, :first] = np.frombuffer(before.encode(), np.uint8)
    texts[:, first + DIGITS :] = np.frombuffer(after.encode(), np.uint8)
    left = np.arange(start, stop, dtype=np.int32)
    for place in reversed(range(first, first + DIGITS)):
        left, digit = np.divmod(left, 10)
        texts[:, place] = digit + ord("0")
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(texts))


def write_table(path: Path, rows: int) -> Path:
    """A table as an import writes it, whose images and captions tell the numbers of their rows."""
    import hashlib

    import numpy as np
    import pyarrow as pa

    from blip2fast.data.records import CaptionRecord
    from blip2fast.data.table import DESCRIPTION, ROWS, TableWriter

    with TableWriter(path, "caption") as writer:
        writer.add(CaptionRecord("x", ("x",)))
        writer.finish({})
    file = path / ROWS
    with pa.OSFile(str(file), "rb") as source:
        schema = pa.ipc.open_file(source).schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as table:
        for start in range(0, rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, rows)
            each = np.arange(stop - start + 1, dtype=np.int32)
            captions = pa.ListArray.from_arrays(each, numbered(start, stop, *CAPTION))
            columns = [numbered(start, stop, *KEY), captions]
            table.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    described = json.loads((path / DESCRIPTION).read_text())
    described |= {"rows": rows, "bytes": file.stat().st_size, "sha256": digest}
    (path / DESCRIPTION).write_text(json.dumps(described))
    return path


def forget(file: Path) -> None:
    """Write a file out and let the system drop its pages from memory, where it can."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(table: Path, load: Load = Load()) -> dict[str, Any]:
    """Start a fresh process that reads a table.

    Returns:
        `seconds` to the first batch by part; `before`, the bytes that the process holds when it
        has imported everything; and `memory` by way: bytes of the `main` process and of each of
        `workers`, and `first_batch_s`.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    from blip2fast.data.table import ROWS

    forget(table / ROWS)
    told = {"table": str(table), "load": asdict(load), "started": time.time()}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(told)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_here(table: Path, load: Load, started: float) -> dict[str, Any]:
    """As `measure`, in this process, which was asked for at the time `started`."""
    # what a run imports for its data and model
    from blip2fast.data.batches import BatchPlan, PlannedBatches
    from blip2fast.data.sources import checked_keys, open_records
    from blip2fast.data.texts import Stage1Texts
    from blip2fast.training.build import build_run  # noqa: F401
    from blip2fast.training.data_identity import identify_data
    from blip2fast.training.loading import read_batches

    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = time.time() - started - sum(seconds.values())

    lap("imports")
    before, looked = held_by(os.getpid()), time.time()
    started += time.time() - looked
    records = open_records(str(table), "caption")
    lap("opening")
    keys = checked_keys(records)
    lap("looking at some records")
    tokenizer = small_tokenizer()
    lap("making a tokenizer")
    identify_data(records, number_images, keys, [tokenizer])  # type: ignore[arg-type]
    lap("digest of these records")
    texts = NumberedTexts(Stage1Texts(tokenizer, 32, 0))
    plan = BatchPlan(len(records), load.batch_size, 0)
    batches: Any = PlannedBatches(records, plan, number_images, texts)
    memory = {}
    for way in load.ways:
        workers = 0 if way == "no workers" else load.workers
        if workers:
            multiprocessing.set_start_method(way, force=True)
        begin = time.time()
        # by then workers have read as much as they will, but are there
        last = load.batches - 1 - 2 * workers
        for number, batch in enumerate(
            read_batches(batches, range(load.batches), workers, False, print)
        ):
            if number == 0:
                if way == load.ways[0]:
                    lap("starting workers, first batch")
                first = time.time() - begin
            if batch["images"].tolist() != batch["numbers"].tolist():
                raise ValueError(f"batch {number}: images and captions of different rows")
            if number == last:
                children = sorted(each.pid for each in multiprocessing.active_children())
                if len(children) != workers:
                    raise ValueError(f"{len(children)} workers, not {workers}")
                memory[way] = {
                    "first_batch_s": first,
                    "main": held_by(os.getpid()),
                    "workers": [held_by(pid) for pid in children],
                }
    return {"rows": len(records), "seconds": seconds, "before": before, "memory": memory}


def held_by(pid: int) -> dict[str, int]:
    """Bytes of a process: USS, PSS and RSS."""
    import psutil

    info = psutil.Process(pid).memory_full_info()
    return {kind: getattr(info, kind) for kind in ("uss", "pss", "rss")}


def small_tokenizer() -> Any:
    """A tokenizer of whole words, as large as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"".join(CAPTION).replace(",", "").split()]
    words += [f"word{n}" for n in range(VOCABULARY - len(words))]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def number_images(keys: Sequence[str], batch: Any) -> dict[str, Any]:
    """In the place of images the numbers in their keys."""
    import torch

    return {"images": torch.tensor([int(key.removesuffix(KEY[1])) for key in keys])}


@dataclass
class NumberedTexts:
    """Texts of stage 1, and the numbers in the captions, to hold those of the images to."""

    texts: Any

    def __call__(self, records: Sequence[Any], batch: Any) -> dict[str, Any]:
        import torch

        first = len(CAPTION[0])
        told = [int(records[i].captions[0][first : first + DIGITS]) for i in batch.indices]
        return {**self.texts(records, batch), "numbers": torch.tensor(told)}


def run(rows: int, folder: Path, load: Load, keep: bool) -> dict[str, Any]:
    """Write a table, measure, delete it.

    Raises:
        ValueError: the table is there already, or the disk has no room for it.
    """
    import psutil
    from machines import run_conditions

    from blip2fast.data.table import ROWS

    folder.mkdir(parents=True, exist_ok=True)
    needed, free = rows * ROW_BYTES * 1.05, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: {rows:,} rows take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
    path = folder / f"{rows}-rows"
    if path.exists():
        raise ValueError(f"{path} exists; delete it or give another folder")
    begin = time.time()
    try:
        write_table(path, rows)
        written = time.time() - begin
        conditions = run_conditions() | {
            "load_average": os.getloadavg()[0],
            "memory_bytes": psutil.virtual_memory().total,
        }
        found = measure(path, load)
        size = (path / ROWS).stat().st_size
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)
    return {
        "conditions": conditions,
        "bytes": size,
        "writing_s": written,
        "load": asdict(load),
        **found,
    }


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--measure"]:
        told = json.loads(sys.argv[2])
        load = Load(**told["load"])
        print(json.dumps(measure_here(Path(told["table"]), load, told["started"])))
        return 0
    from results import RESULTS, rounded

    parser = argparse.ArgumentParser(description="Start and memory of a run by a large table.")
    parser.add_argument("rows", type=int, help="of the table; 100000000 take 9 GB of disk")
    parser.add_argument("folder", type=Path, help="where the table is written; on a local disk")
    parser.add_argument("--workers", type=int, default=Load.workers)
    parser.add_argument("--batches", type=int, default=Load.batches, help="read in each way")
    parser.add_argument("--batch-size", type=int, default=Load.batch_size)
    parser.add_argument("--keep", action="store_true", help="leave the table there")
    parser.add_argument("--out", type=Path, help="of the result; default: benchmarks/results/")
    given = parser.parse_args()
    if not given.batch_size <= given.rows <= 10**DIGITS:
        parser.error(f"rows {given.rows}: from {given.batch_size} (a batch) to {10**DIGITS:,}")
    if given.workers < 1 or given.batches <= 2 * given.workers:
        parser.error(f"--workers {given.workers}, --batches {given.batches}: more batches are read")
    load = Load(given.workers, given.batches, given.batch_size)
    try:
        result = rounded(run(given.rows, given.folder, load, given.keep))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    path = given.out or RESULTS / f"{result['conditions']['date']}_large-table.json"
    path.write_text(text)
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
