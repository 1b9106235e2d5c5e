"""Pictures for the report of a run: what the model that it left says of them, where it looks.

In stage 1 the captions that a picture finds, in stage 2 what the model writes about it; and in both
the attention of each query.
"""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2fast._imports import needs
from blip2fast.checkpoints.files import MODEL
from blip2fast.checkpoints.trained import read_description
from blip2fast.data.images import read_picture
from blip2fast.data.sources import open_records
from blip2fast.inference.model import Blip2
from blip2fast.reporting.run_report import Sample
from blip2fast.search.attention import over_picture
from blip2fast.search.retriever import Blip2Retriever
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import load_config
from blip2fast.training.memory_plan import GIB, USED, Memory, machine_memory, plan_memory
from blip2fast.training.precision import DTYPE_OF

with needs("read images", "PIL"):
    from PIL import Image

COUNT, MOST = 6, 24
# captions among which a picture finds its own, and how many of them are shown
_CANDIDATES, _NEAREST = 256, 3
# sizes in the page, in pixels, and letters
_DECODED, _OVERLAY, _TEXT = 768, 96, 240
_QUERIES = 32
# of what a run holds on its device, what is loaded to use its model
_LOADED = ("language model", "image encoder", "trained")


@dataclass
class Drawn:
    """What `draw_samples` made.

    Attributes:
        samples: the pictures.
        notes: why there are none, or what is missing, a line each.
    """

    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw_samples(
    folder: str | Path,
    count: int = COUNT,
    *,
    images: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Drawn:
    """Show the model of a run some pictures of its held-out data, or of its training data.

    Nothing that fails here is raised: it is noted. The pictures are evenly spaced over the records.

    Args:
        folder: output folder of a run.
        count: pictures, at most 24.
        images: folder of the pictures, of a run that read a feature cache.
        device: compute device; by default CUDA if available.
    """
    if count < 1:
        return Drawn()
    try:
        return _draw(Path(folder), min(count, MOST), images, device)
    except _NoneToShow as reason:
        return Drawn(notes=[f"No sample pictures: {reason}"])
    # the model is written and the rest of the report is wanted, whatever is wrong with a sample
    except Exception as error:
        return Drawn(notes=[f"No sample pictures: drawing them failed: {_one_line(error)}"])
    finally:
        _free_memory()


class _NoneToShow(Exception):
    """There are no pictures to show; says why."""


@dataclass(frozen=True)
class _Chosen:
    """A picture with its record, a `CaptionRecord` or a `QuestionRecord`."""

    image: Image.Image
    record: Any


def _draw(
    folder: Path,
    count: int,
    images: str | Path | None,
    device: torch.device | str | None,
) -> Drawn:
    if not (folder / MODEL).is_file():
        raise _NoneToShow("the run has not ended.")
    config = load_config(folder / "config.yaml")
    data = config.data
    if data.task == "sequence":
        raise _NoneToShow("samples of several pictures (data.task: sequence) are not drawn.")
    given, place = data.records, data.images
    if data.eval_records is not None and (images is not None or data.eval_images is not None):
        given, place = data.eval_records, data.eval_images
    if images is None and place is None:
        raise _NoneToShow(
            "the run read a feature cache (data.features), which holds none. If you have them: "
            f"blip2fast report {folder} --images DIR"
        )
    where = Path(images or place or "")
    drawn = Drawn()
    table = open_records(given, data.task, where, left_out=[])
    chosen = _choose(table, count, where, data.max_pixels, drawn.notes)
    if not chosen:
        raise _NoneToShow(" ".join(drawn.notes) or f"none of the records is in {where}.")
    _free_memory()  # what training held
    _check_memory(folder, config, device)
    if config.stage == 1:
        drawn.samples = _retrieved(folder, config, chosen, table, device, drawn.notes)
    else:
        drawn.samples = _written(folder, config, chosen, device, drawn.notes)
    return drawn


def _streams(folder: Path, config: RunConfig, device: torch.device | str | None) -> bool:
    """Whether the language model stays on the host, as where it did not fit the device."""
    large = config.offload != "none" or config.zero_stage == 3
    return _is_cuda(device) and large and read_description(folder).adapter is None


def _check_memory(folder: Path, config: RunConfig, device: torch.device | str | None) -> None:
    """Refuse a model that does not fit beside what this process and others hold.

    The run is over; it should not be killed for a few pictures.
    """
    memory = machine_memory()
    if not _is_cuda(device):
        memory = Memory(memory.host, memory.host, device_is_host=True)
        config = replace(config, precision="fp32")
    # sizes of the trained part are those of the run itself
    try:
        plan = plan_memory(replace(config, init_from=str(folder)), memory=memory)
    except (ValueError, OSError):
        return  # loading tells what has moved, or finds it
    if any("is quantised" in note for note in plan.notes):
        return  # it is counted at several times its size
    offload = "stream" if config.stage == 2 and _streams(folder, config, device) else "none"
    option = next(each for each in plan.options if each.offload == offload)
    loaded = [size for name, size in option.device.items() if name in _LOADED]
    needed = {"this device": (sum(loaded), memory.device)}
    if not memory.device_is_host:
        needed["the host"] = (option.host_bytes, memory.host)
    for place, (size, free) in needed.items():
        if size > USED * free:
            raise _NoneToShow(
                f"to load the model takes {size / GIB:.1f} GiB of {place}, where {free / GIB:.1f} "
                f"are free. Where there is more: blip2fast report {folder}"
            )


def _choose(
    table: Sequence[Any], count: int, folder: Path, max_pixels: int, notes: list[str]
) -> list[_Chosen]:
    """Pictures evenly spaced over the records, each once; those that cannot be read are noted."""
    rows = sorted({number * len(table) // count for number in range(count)})
    records = {table[row].image: table[row] for row in reversed(rows)}
    chosen = []
    for key, record in reversed(records.items()):
        try:
            image = read_picture(folder, key, _DECODED, max_pixels)
        except (ValueError, OSError) as error:
            notes.append(f"Passed over: {_one_line(error)}")
            continue
        chosen.append(_Chosen(image, record))
    return chosen


def _retrieved(
    folder: Path,
    config: RunConfig,
    chosen: Sequence[_Chosen],
    table: Sequence[Any],
    device: torch.device | str | None,
    notes: list[str],
) -> list[Sample]:
    """Stage 1: the nearest captions by ITC, and attention beside the picture's own caption."""
    model = Blip2Retriever.from_pretrained(folder, dtype=_dtype(config, device), device=device)
    step = max(1, len(table) // _CANDIDATES)
    others = [table[row].captions[0] for row in range(0, len(table), step)][:_CANDIDATES]
    own = [each.record.captions for each in chosen]
    texts = list(dict.fromkeys([*(captions[0] for captions in own), *others]))
    similarity = model.similarity([each.image for each in chosen], texts)
    samples = []
    for each, captions, scores in zip(chosen, own, similarity, strict=True):
        best = scores.topk(min(_NEAREST, len(texts)))
        nearest = [
            f"{score:.2f} {_short(texts[number])}{' ✓' if texts[number] in captions else ''}"
            for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        lines = {
            "its captions": "\n".join(map(_short, captions[:_NEAREST])),
            f"nearest of {len(texts)} captions (✓ its own)": "\n".join(nearest),
        }
        looks = _looks(partial(model.attention, each.image, captions[0]), each, notes)
        samples.append(Sample(each.image, each.record.image, lines, looks))
    return samples


def _written(
    folder: Path,
    config: RunConfig,
    chosen: Sequence[_Chosen],
    device: torch.device | str | None,
    notes: list[str],
) -> list[Sample]:
    """Stage 2: the caption or the answer, and attention of the queries."""
    streams = _streams(folder, config, device)
    model = Blip2.from_pretrained(
        folder,
        dtype=_dtype(config, device),
        device=device,
        offload="stream" if streams else "none",
    )
    pictures = [each.image for each in chosen]
    asks = config.data.task == "vqa"
    if asks:
        texts = model.answer(pictures, [each.record.question for each in chosen])
    else:
        texts = model.caption(pictures)
    samples = []
    for each, text in zip(chosen, texts, strict=True):
        record, said = each.record, _short(str(text)) or "(nothing)"
        if asks:
            lines = {"question": _short(record.question), "the model's answer": said}
            lines["right answer"] = _short(record.answer)
            read = model.prompts.question.replace("{}", record.question)
        else:
            lines = {"the model's caption": said}
            lines["its captions"] = "\n".join(map(_short, record.captions[:_NEAREST]))
            read = model.prompts.caption
        looks = _looks(partial(model.attention, each.image, read), each, notes)
        samples.append(Sample(each.image, record.image, lines, looks))
    return samples


def _looks(
    attention: Callable[[], Tensor], chosen: _Chosen, notes: list[str]
) -> dict[str, Image.Image]:
    """The attention of each query over the picture; a note where it cannot be drawn."""
    try:
        weights = attention()
    except ValueError as error:
        note = f"No attention: {_one_line(error)}"
        if note not in notes:
            notes.append(note)
        return {}
    side = (_OVERLAY, _OVERLAY)
    square = chosen.image.convert("RGB").resize(side, Image.Resampling.BICUBIC)
    drawn = {"mean": over_picture(square, weights.mean(0))}
    for number, each in enumerate(weights[:_QUERIES], 1):
        drawn[f"query {number}"] = over_picture(square, each)
    return drawn


def _short(text: str) -> str:
    return textwrap.shorten(text, _TEXT, placeholder=" ...")


def _one_line(error: Exception) -> str:
    said = _short(" ".join(str(error).split()))
    return said if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {said}"


def _dtype(config: RunConfig, device: torch.device | str | None) -> torch.dtype:
    """That of the run; fp32 on a CPU."""
    return DTYPE_OF[config.precision] if _is_cuda(device) else torch.float32


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_cuda(device: torch.device | str | None) -> bool:
    return torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
