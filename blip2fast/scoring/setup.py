"""What every evaluation needs: data, model, folder, processes, conditions of its numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from blip2fast import __version__
from blip2fast.data.benchmarks import Sample, Subject, read_samples, samples_digest
from blip2fast.data.source_config import RecordSource
from blip2fast.scoring.models import ModelSource
from blip2fast.scoring.pictures import ImageSource, open_images
from blip2fast.scoring.predictions import BatchWriter, Predictions, Rows
from blip2fast.scoring.processes import Processes
from blip2fast.training.folder import FolderLock

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is evaluated on what.

    Attributes:
        model: the model.
        data: the benchmark's annotation file, or records.
        out: folder of predictions and result.
        images: folder of the pictures; or
        features: folder of a feature cache, instead.
        limit: evaluate the first samples only; None: all.
        batch_size: samples per batch (of retrieval also pairs).
        device: of this process; None: its GPU where there is one.
        workers: threads that read pictures.
        overwrite: delete what an earlier evaluation left in `out`; otherwise it goes on.
    """

    model: ModelSource
    data: RecordSource
    out: Path
    images: Path | None = None
    features: Path | None = None
    limit: int | None = None
    batch_size: int = 32
    device: str | None = None
    workers: int = 4
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


class Evaluation:
    """An evaluation in progress; made by `opened`.

    Attributes:
        setup, processes: as given.
        samples: of the benchmark.
        images: where its pictures are.
        device: of this process.
    """

    def __init__(
        self,
        setup: Setup,
        processes: Processes,
        samples: list[Sample],
        images: ImageSource,
        device: torch.device,
    ) -> None:
        self.setup, self.processes = setup, processes
        self.samples, self.images, self.device = samples, images, device
        self._started = time.monotonic()
        self._settings: dict[str, Any] = {}
        self._predictions: Predictions | None = None
        self._resumed = 0

    def load(self, load: Callable[[ModelSource, ImageSource, torch.device], T]) -> T:
        """Load the model in every process."""
        return self.processes.agree(lambda: load(self.setup.model, self.images, self.device))

    def begin(self, task: str, model_sha256: str, settings: Mapping[str, Any]) -> None:
        """Open the folder of predictions.

        Args:
            task: "retrieval", "caption" or "vqa".
            model_sha256: by which the model is known.
            settings: what else the predictions depend on.

        Raises:
            ValueError: the folder has predictions of other settings.
        """
        setup = self.setup
        self._settings = {
            "task": task,
            "model_sha256": model_sha256,
            "data_sha256": samples_digest(self.samples),
            "samples": len(self.samples),
            "dtype": setup.model.dtype,
            "batch_size": setup.batch_size,
            "images_from": "pictures" if setup.features is None else "features",
            **settings,
        }
        self._predictions = self.processes.first(
            lambda: Predictions(setup.out, self._settings, setup.overwrite)
        )

    def predict(
        self, batches: Sequence[T], compute: Callable[[Sequence[T]], Iterator[Rows]], unit: str
    ) -> list[Rows]:
        """The rows of all batches, in the first process; others get none.

        Batches that are finished already are read; the others are shared out.

        Args:
            compute: the rows of each of some batches, in order.
            unit: what a batch is, for the progress bar.
        """
        predictions = self._opened()
        done = self.processes.first(predictions.finished_batches)
        self._resumed = len(done)
        left = [number for number in range(len(batches)) if number not in done]
        mine = left[self.processes.rank :: self.processes.count]
        bar = tqdm(
            total=len(mine), unit=f" {unit}", disable=None if self.processes.rank == 0 else True
        )
        with BatchWriter(predictions.folder, self.processes.rank) as writer, bar:
            computed = compute([batches[number] for number in mine])
            for number, rows in zip(mine, computed, strict=True):
                writer.add(number, rows)
                bar.update()
        self.processes.gather(None)  # all have written
        if self.processes.rank:
            return []
        done = predictions.finished_batches()
        return [done[number] for number in range(len(batches))]

    def finish(self, rows: Rows, found: Mapping[str, Any]) -> dict[str, Any]:
        """Write the predictions and the result; the first process calls it.

        Args:
            rows: of all samples; those with an "error" could not be evaluated.
            found: "metrics", and what else belongs to the result.
        """
        failed = [{name: row[name] for name in ("id", "image", "error")} for row in rows
                  if "error" in row]  # fmt: skip
        result = {
            "task": self._settings["task"],
            **found,
            "samples": len(self.samples),
            "failed": failed,
            "conditions": self._conditions(),
        }
        self._opened().finish(rows, result)
        return result

    def _opened(self) -> Predictions:
        if self._predictions is None:
            raise ValueError("the evaluation has no folder yet: call begin first")
        return self._predictions

    def _conditions(self) -> dict[str, Any]:
        setup, cuda = self.setup, self.device.type == "cuda"
        packages = ("torch", "transformers", "numpy", "pillow")
        return {
            "model": setup.model.path,
            "data": setup.data.source,
            "split": setup.data.split,
            "limit": setup.limit,
            "images": str(setup.images or setup.features),
            **{name: value for name, value in self._settings.items() if name != "task"},
            "processes": self.processes.count,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
            "seconds": round(time.monotonic() - self._started, 2),
            "batches_of_earlier_starts": self._resumed,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "blip2fast": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        }


@contextmanager
def opened(
    setup: Setup,
    processes: Processes,
    subject: Subject,
    captions_per_image: int | None = None,
) -> Iterator[Evaluation]:
    """Read the samples and lock the folder for the time of an evaluation.

    Raises:
        ValueError: a fault of the data, or another evaluation in the folder.
    """
    device = processes.agree(lambda: processes.device(setup.device))
    images = processes.agree(lambda: open_images(setup.images, setup.features))
    samples = processes.first(
        lambda: read_samples(setup.data, subject, setup.images, setup.limit, captions_per_image)
    )
    lock = processes.agree(
        lambda: nullcontext() if processes.rank else FolderLock(_folder(setup.out), _say)
    )
    with lock:
        yield Evaluation(setup, processes, samples, images, device)


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file; give a folder")
    return path


def _say(line: str) -> None:
    print(line, file=sys.stderr)
