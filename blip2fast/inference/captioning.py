"""Captions of many picture files: side-car files or one file, as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from blip2fast.data.records import plain_text
from blip2fast.inference.picture_files import load_with, read_ahead
from blip2fast.inference.results import ResultFile, check_result_path, check_writable, write_text

if TYPE_CHECKING:
    from blip2fast.inference.inputs import GenerationOptions
    from blip2fast.inference.model import Blip2

COLUMNS = ("image", "caption")


@dataclass(frozen=True)
class Outputs:
    """Where captions of files go.

    Attributes:
        ext: suffix of a side-car beside each picture, a caption a line; empty: none.
        out: one file of all, `.jsonl` (caption records) or `.csv` (a row for each caption).
        resume: pass over what is there, instead of refusing it.
    """

    ext: str = ""
    out: Path | None = None
    resume: bool = False

    def check(self, pictures: Sequence[Path]) -> None:
        """Refuse outputs that cannot be written, or that are there.

        Raises:
            ValueError: names the first, and the remedy.
        """
        if self.ext and (self.ext[0] != "." or len(self.ext) < 2 or "/" in self.ext):
            raise ValueError(f"--ext {self.ext!r}: give a suffix such as .txt")
        if self.out is not None:
            check_result_path(self.out, self.resume)
        if not self.ext:
            return
        owners: dict[Path, Path] = {}
        for picture in pictures:
            car = self.side_car(picture)
            if car == picture or owners.setdefault(car, picture) != picture:
                raise ValueError(
                    f"{picture}: its side-car {car} would be that of {owners.get(car, car)}; give "
                    "another --ext, or --out"
                )
            if car.exists() and not self.resume:
                raise ValueError(f"{car} exists; pass over such pictures by --resume, or move it")
        for folder in {picture.parent for picture in pictures}:
            check_writable(folder / f"any{self.ext}")

    def side_car(self, picture: Path) -> Path:
        """The side-car of a picture."""
        return picture.with_suffix(self.ext)


@dataclass
class Captioned:
    """What `caption_files` did.

    Attributes:
        written, there: pictures captioned, and passed over because their captions were there.
        faults: one line for each picture that could not be read.
    """

    written: int = 0
    there: int = 0
    faults: list[str] = field(default_factory=list)


def caption_files(
    model: Blip2,
    pictures: Sequence[Path],
    outputs: Outputs,
    options: GenerationOptions,
    *,
    question: str | None = None,
    num_captions: int = 1,
    prompt: str | None = None,
    batch_size: int = 8,
    workers: int = 4,
    tell: Callable[[str], None] = print,
    complain: Callable[[str], None] | None = None,
) -> Captioned:
    """Caption picture files; one that cannot be read is passed over.

    Args:
        model: the model.
        pictures: the files.
        outputs: where captions go; with neither `ext` nor `out`, they are told.
        options: of generation.
        question: to answer for each picture, instead of captions.
        num_captions: for each picture.
        prompt: as in `Blip2.caption`, or `Blip2.answer`.
        batch_size: pictures at a time.
        workers: threads that read pictures.
        tell: receives a line for each picture, `path<tab>caption`, where no output is given.
        complain: receives the fault of a picture at once.

    Raises:
        ValueError: outputs that cannot be written, no image encoder, or a question with several
            captions.
    """
    if question is not None and num_captions != 1:
        raise ValueError(f"num_captions={num_captions}: a question has one answer")
    outputs.check(pictures)
    file = None if outputs.out is None else ResultFile(outputs.out, COLUMNS, outputs.resume)
    done = Captioned()
    known = {row.get("image") for row in file.done} if file is not None else set[object]()
    wanted = [each for each in pictures if not _is_there(each, outputs, known)]
    done.there = len(pictures) - len(wanted)
    bar = tqdm(
        total=len(pictures), initial=done.there, unit="image", disable=None, dynamic_ncols=True
    )
    try:
        for batch in read_ahead(wanted, load_with(model.transform), batch_size, workers):
            whole = [(each.item, each.pixels) for each in batch if each.pixels is not None]
            for each in batch:
                if each.pixels is None:
                    done.faults.append(each.fault)
                    if complain is not None:
                        complain(each.fault)
            if whole:
                pixels = [each for _, each in whole]
                if question is None:
                    texts = model.caption(
                        pixels, prompt=prompt, num_captions=num_captions, **options
                    )
                else:
                    texts = model.answer(pixels, question, prompt=prompt, **options)
                for (path, _), found in zip(whole, texts, strict=True):
                    captions = [found] if isinstance(found, str) else list(found)
                    _write(path, [plain_text(text) for text in captions], outputs, file, tell)
                    done.written += 1
            bar.update(len(batch))
    finally:
        bar.close()
        if file is not None:
            file.close()
    return done


def _is_there(picture: Path, outputs: Outputs, known: set[object]) -> bool:
    """Whether all outputs of a picture are there."""
    asked = []
    if outputs.ext:
        asked.append(outputs.side_car(picture).exists())
    if outputs.out is not None:
        asked.append(str(picture) in known)
    return bool(asked) and all(asked)


def _write(
    path: Path,
    captions: list[str],
    outputs: Outputs,
    file: ResultFile | None,
    tell: Callable[[str], None],
) -> None:
    if file is not None and outputs.out is not None:
        if outputs.out.suffix.lower() == ".csv":
            file.add(*({"image": str(path), "caption": caption} for caption in captions))
        else:
            file.add({"image": str(path), "captions": captions})
    if outputs.ext:
        write_text(outputs.side_car(path), "".join(f"{caption}\n" for caption in captions))
    if file is None and not outputs.ext:
        for caption in captions:
            tell(f"{path}\t{caption}")
