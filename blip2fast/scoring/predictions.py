"""The folder of an evaluation: predictions that a stopped one goes on from, and its result.

    settings.json             what the predictions depend on
    batches/00000.jsonl       of each process: a line for each batch that it has finished
    predictions.jsonl         a line for each sample, when all is done
    result.json               metrics and conditions

Samples are divided into batches once, whatever the number of processes, and a batch is done or not:
an evaluation that was stopped and went on, with any number of processes, has the same predictions
as one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2fast.data.manifest import replace_file, write_json

SETTINGS, BATCHES = "settings.json", "batches"
PREDICTIONS, RESULT = "predictions.jsonl", "result.json"

Rows = list[dict[str, Any]]


class Predictions:
    """What an evaluation has found so far.

    Args:
        folder: created if it does not exist.
        settings: what predictions depend on, as JSON has it.
        overwrite: delete what an earlier evaluation left.

    Raises:
        ValueError: the folder is a file, or has predictions of other settings; names these.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; give a folder")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._remove()
        # as it will be read again
        wanted = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.is_file():
            self._compare(json.loads(path.read_text(encoding="utf-8")), wanted)
        elif (folder / PREDICTIONS).exists() or (folder / BATCHES).exists():
            raise ValueError(
                f"--out {folder}: has predictions without {SETTINGS}; give --overwrite"
            )
        replace_file(path, write_json(wanted))
        (folder / BATCHES).mkdir(exist_ok=True)

    def _remove(self) -> None:
        for name in (PREDICTIONS, RESULT, SETTINGS):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / BATCHES, ignore_errors=True)

    def _compare(self, before: Any, now: dict[str, Any]) -> None:
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"--out {self.folder} has predictions with {name} {before.get(name)!r}, now it "
                    f"is {now.get(name)!r}: give another --out, or --overwrite"
                )

    def finished_batches(self) -> dict[int, Rows]:
        """The rows of each finished batch, by its number; what was cut off is left out."""
        found: dict[int, Rows] = {}
        for path in sorted((self.folder / BATCHES).glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    values = json.loads(line)
                    found[values["batch"]] = values["rows"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # the line that a killed process was writing
        return found

    def finish(self, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
        """Write the predictions of all samples, and the result, which comes last."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(
            self.folder / PREDICTIONS, lambda path: path.write_text(text, encoding="utf-8")
        )
        replace_file(self.folder / RESULT, write_json(result))


class BatchWriter:
    """Appends finished batches to the file of one process.

    Args:
        folder: as in `Predictions`.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = (folder / BATCHES / f"{rank:05d}.jsonl").open("a", encoding="utf-8")
        # a killed process may have left half a line
        self._file.write("\n")

    def add(self, batch: int, rows: Rows) -> None:
        """Write a batch, so that it is not lost if the process is killed from now on."""
        self._file.write(json.dumps({"batch": batch, "rows": rows}, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> BatchWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
