"""Merge what checks of kernels found on real cards into the table that ships with the package.

    blip2fast kernels check --out h200.json        (on the GPU)
    python benchmarks/kernel_records.py h200.json ...

Only kernels that were right and quicker get in, and of two records of the same thing the later. A
record of other code than there is now is of no use and goes, unless --keep-stale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from blip2fast.ops.kernel_calls import current_codes
from blip2fast.ops.records import SHIPPED, Record, read_records, write_records


def merge(
    files: Sequence[Path], table: Path, codes: set[str] | None = None
) -> tuple[list[Record], list[str]]:
    """The records that the table is to hold, and why others are not in it.

    Args:
        files: In the form of the user's file of records, older ones first.
        table: What ships now.
        codes: Hashes of the code that there is; None: any.
    """
    kept: dict[object, Record] = {}
    left_out = []
    for file in (table, *files):
        for record in read_records(file):
            if record.fault:
                left_out.append(f"{file.name}: {record}")
            elif record.key.card == "the CPU" or not record.ours_us:
                left_out.append(f"{file.name}: {record}: not timed on a GPU")
            elif codes is not None and record.key.code not in codes:
                left_out.append(f"{file.name}: {record}: of other code")
            else:
                kept[record.key.relaxed()] = record
    return sorted(kept.values(), key=lambda r: (r.key.card, r.key.op, r.key.kind)), left_out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, default=SHIPPED)
    parser.add_argument("--keep-stale", action="store_true", help="keep records of other code")
    given = parser.parse_args()
    for file in given.files:
        if not file.is_file():
            parser.error(f"{file}: not a file")
    codes = None if given.keep_stale else current_codes()
    records, left_out = merge(given.files, given.table, codes)
    write_records(given.table, records)
    print(*left_out, f"{given.table}: {len(records)} records", sep="\n")


if __name__ == "__main__":
    main()
