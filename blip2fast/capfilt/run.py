"""Captions of a data set, written, ranked and kept: the work of `blip2fast capfilt`.

    out/settings.json          what the captions depend on; a run goes on only with the same
    out/predictions-<rank>.jsonl  row, image and all candidates with their scores, as they come
    out/captions.jsonl         records of the best captions, written last: train with it
    out/faults.jsonl           images that could not be read

Process r of n does the rows r, r + n, ...; what is there is passed over, whichever process or
number of processes wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from blip2fast.capfilt.captioners import Captioner, Sampling, check_captioner, load_captioner
from blip2fast.capfilt.rankers import Ranker, check_ranker, load_ranker
from blip2fast.data.images import read_picture
from blip2fast.data.manifest import replace_file, write_json
from blip2fast.data.records import CaptionRecord, plain_text
from blip2fast.data.sources import open_records
from blip2fast.inference.picture_files import read_ahead
from blip2fast.inference.results import ResultFile, check_writable

SETTINGS, CAPTIONS, FAULTS = "settings.json", "captions.jsonl", "faults.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the captions of a data set depend on.

    Attributes:
        records: source of caption records, of any layout (docs/data.md).
        images: folder from which records name their images.
        captioner: run of stage 2, or folder or hub name of a transformers captioner.
        ranker: run of stage 1, or folder or hub name of a transformers CLIP.
        sampling: of the captions.
        keep: best captions of an image that are kept; 2 in the BLIP-2 paper.
        match: rank by ITC and ITM together instead of ITC alone; for our own models.
    """

    records: str
    images: str
    captioner: str
    ranker: str
    sampling: Sampling = field(default_factory=Sampling)
    keep: int = 2
    match: bool = False

    def check(self, out: Path) -> None:
        """Refuse what cannot be done, before anything is loaded.

        Raises:
            ValueError: names what, and the remedy.
        """
        how = self.sampling
        for name, value in (
            ("num_captions", how.num_captions),
            ("keep", self.keep),
            ("max_new_tokens", how.max_new_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if not 0 < how.top_p <= 1:
            raise ValueError(f"top_p={how.top_p}: expected above 0 and at most 1")
        if not 0 <= how.min_new_tokens <= how.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={how.min_new_tokens}: expected 0 to {how.max_new_tokens}, "
                "max_new_tokens"
            )
        if how.seed < 0:
            raise ValueError(f"seed={how.seed}: expected 0 or more")
        if not Path(self.records).exists():
            raise ValueError(f"no records at {self.records}")
        if not Path(self.images).is_dir():
            raise ValueError(f"--images {self.images}: not a folder")
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; give a folder")
        check_writable(out / CAPTIONS)
        if (out / CAPTIONS).exists():
            raise ValueError(f"{out / CAPTIONS} exists: it is finished; give another folder")
        check_captioner(self.captioner)
        check_ranker(self.ranker, self.match)
        self._check_same(out)

    def values(self) -> dict[str, Any]:
        """What `settings.json` says."""
        return asdict(self)

    def _check_same(self, out: Path) -> None:
        path = out / SETTINGS
        if not path.is_file():
            if out.is_dir() and any(out.iterdir()):
                raise ValueError(f"{out} is not empty, and no capfilt began there")
            return
        there, now = json.loads(path.read_text(encoding="utf-8")), self.values()
        differing = [name for name in now if there.get(name) != now[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{out} was begun with {name} {there.get(name)!r}, not {now[name]!r}: go on with "
                "the same, or give another folder"
            )


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; from torchrun's environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Processes:
        """Of torchrun's variables; alone where there are none."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local = (int(os.environ.get(name, i == 1)) for i, name in enumerate(names))
        return cls(rank, world, local)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.world_size == 1:
            return
        if not torch.distributed.is_initialized():
            # the others may be days away, and nothing is exchanged until they come
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))
        torch.distributed.barrier()


@dataclass
class Bootstrapped:
    """What `bootstrap_captions` did.

    Attributes:
        rows: records of the data set.
        written: those that this call did, in this process.
        faults: images of this process that could not be read, one line each.
        captions: the file of records; None in processes other than the first.
    """

    rows: int
    written: int = 0
    faults: list[str] = field(default_factory=list)
    captions: Path | None = None


def bootstrap_captions(
    settings: Settings,
    out: str | Path,
    *,
    batch_size: int = 8,
    workers: int = 4,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    complain: Callable[[str], None] | None = None,
    language_model: str | None = None,
    image_encoder: str | None = None,
) -> Bootstrapped:
    """Write captions of images, rank them with the captions that are there, keep the best.

    The numbers that an image's captions are drawn with depend on the seed and its key alone, so
    batches and processes change nothing but the rounding of logits.

    Args:
        settings: what to do.
        out: folder of the results; an interrupted call goes on there.
        batch_size: images at a time.
        workers: threads that read pictures.
        dtype: of the models.
        processes: None: from torchrun's environment.
        complain: receives the fault of a picture at once.
        language_model: folder or hub name, where that of a captioning run is now.
        image_encoder: folder or hub name, where that of the runs, of both, is now.

    Raises:
        ValueError: as in `Settings.check`; or records that cannot be read.
    """
    out = Path(out)
    settings.check(out)
    shared = Processes.of_environment() if processes is None else processes
    records = open_records(settings.records, "caption", Path(settings.images))
    shared.wait()  # all have found the folder as it was
    if shared.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / SETTINGS, write_json(settings.values()))
    shared.wait()
    done = Bootstrapped(len(records))
    there = _rows_there(out, len(records))
    rows = [row for row in range(shared.rank, len(records), shared.world_size) if not there[row]]
    shared.wait()  # a file of results is cut to whole lines when its process opens it
    if rows:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", shared.local_rank) if cuda else torch.device("cpu")
        captioner = load_captioner(settings.captioner, dtype, device, language_model, image_encoder)
        ranker = load_ranker(settings.ranker, settings.match, dtype, device, image_encoder)
        path = out / f"predictions-{shared.rank}.jsonl"
        with (
            ResultFile(path, (), resume=True) as file,
            tqdm(total=len(rows), unit="image", disable=None) as bar,
        ):
            work = _Work(settings, captioner, ranker, records)
            for results in work.results(rows, batch_size, workers):
                for result in results:
                    fault = result.get("fault")
                    if fault is not None:
                        done.faults.append(fault)
                        if complain is not None:
                            complain(fault)
                file.add(*results)
                done.written += len(results)
                bar.update(len(results))
    shared.wait()
    if shared.rank == 0:
        done.captions = _finish(out, len(records), settings.keep)
    return done


@dataclass(frozen=True)
class _Work:
    """Writes and ranks the captions of some rows."""

    settings: Settings
    captioner: Captioner
    ranker: Ranker
    records: Sequence[CaptionRecord]

    def results(
        self, rows: Sequence[int], batch_size: int, workers: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Results of batches of rows: candidates with scores, best first, or a fault."""
        for batch in read_ahead(rows, self._load, batch_size, workers):
            results: list[dict[str, Any]] = [
                {"row": each.item, "image": self.records[each.item].image, "fault": each.fault}
                for each in batch
                if each.pixels is None
            ]
            whole = [(each.item, each.pixels) for each in batch if each.pixels is not None]
            if whole:
                results += self._ranked([row for row, _ in whole], [both for _, both in whole])
            yield results

    def _load(self, row: int) -> tuple[Tensor, Tensor]:
        """The picture as the captioner and as the ranker see it."""
        picture = read_picture(Path(self.settings.images), self.records[row].image)
        return self.captioner.transform(picture), self.ranker.transform(picture)

    def _ranked(
        self, rows: Sequence[int], pixels: Sequence[tuple[Tensor, Tensor]]
    ) -> list[dict[str, Any]]:
        records = [self.records[row] for row in rows]
        seen = torch.stack([mine for mine, _ in pixels])
        written = self.captioner.write(
            seen, [record.image for record in records], self.settings.sampling
        )
        texts = [
            _distinct(record.captions, some) for record, some in zip(records, written, strict=True)
        ]
        scores = self.ranker.scores(
            torch.stack([theirs for _, theirs in pixels]), [list(each) for each in texts]
        )
        return [
            {"row": row, "image": record.image, "captions": _best_first(each, found)}
            for row, record, each, found in zip(rows, records, texts, scores, strict=True)
        ]


def _distinct(web: Sequence[str], written: Sequence[str]) -> dict[str, str]:
    """Candidates of an image and where they are from; equal ones once, that of the web first."""
    found: dict[str, tuple[str, str]] = {}
    for source, texts in (("web", web), ("model", written)):
        for text in map(plain_text, texts):
            if text:
                found.setdefault(text.lower(), (text, source))
    return dict(found.values())


def _best_first(texts: Mapping[str, str], scores: Sequence[float]) -> list[dict[str, Any]]:
    ranked = [
        {"text": text, "score": round(score, 6), "from": source}
        for (text, source), score in zip(texts.items(), scores, strict=True)
    ]
    return sorted(ranked, key=lambda each: -float(each["score"]))


def _predictions(out: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Files, offsets and results that were written as a whole."""
    for path in sorted(out.glob("predictions-*.jsonl")):
        with path.open("rb") as lines:
            offset = 0
            for line in lines:
                if line.endswith(b"\n"):
                    yield path, offset, json.loads(line)
                offset += len(line)


def _rows_there(out: Path, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    there = np.zeros(count, bool)
    for path, _, result in _predictions(out):
        if not 0 <= result["row"] < count:
            raise ValueError(f"{path} has row {result['row']}, but there are {count} records")
        # images that could not be read are tried again
        there[result["row"]] |= "captions" in result
    return there


def _finish(out: Path, count: int, keep: int) -> Path:
    """Write the records in their order; those of images that could not be read are left out."""
    files: list[Path] = []
    where = np.full((count, 2), -1, np.int64)  # file and offset of each row
    faults: dict[int, dict[str, Any]] = {}
    for path, offset, result in _predictions(out):
        if not files or files[-1] != path:
            files.append(path)
        row = result["row"]
        if "captions" in result:
            where[row] = len(files) - 1, offset
            faults.pop(row, None)
        elif where[row, 0] < 0:
            faults[row] = {"image": result["image"], "fault": result["fault"]}

    def write_captions(path: Path) -> None:
        opened = [each.open("rb") for each in files]
        try:
            with path.open("w", encoding="utf-8") as lines:
                for number, offset in where[where[:, 0] >= 0].tolist():
                    opened[number].seek(offset)
                    result = json.loads(opened[number].readline())
                    texts = [each["text"] for each in result["captions"][:keep]]
                    record = {"image": result["image"], "captions": texts}
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        finally:
            for each in opened:
                each.close()

    lines = [json.dumps(faults[row], ensure_ascii=False) + "\n" for row in sorted(faults)]
    replace_file(out / FAULTS, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    replace_file(out / CAPTIONS, write_captions)
    return out / CAPTIONS
