"""How a run's configuration declares its sources of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from blip2fast.data.text_files import DEFAULT_ENCODING


@dataclass
class SourceOptions:
    """What a source does not say about itself.

    Attributes:
        encoding: of its text files.
        separator: of the columns of a CSV file; None: a tab in .tsv files and where the header
            has tabs, a semicolon where it has these and no comma, else a comma.
        image_key, caption_key: names of the columns of images and captions; None: the usual ones.
        annotations: of VQAv2, the file with the answers.
        image_name: of VQAv2, a file name with `{}` for the number of the image, such as
            `{:012d}.jpg`; None: as in COCO's 2014 release. Of GQA likewise, None: `{}.jpg`.
        split: of Karpathy's files, which hold several: `train`, `val`, `test`, or of COCO also
            `train+restval`.
    """

    encoding: str = DEFAULT_ENCODING
    separator: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    annotations: str | None = None
    image_name: str | None = None
    split: str | None = None


@dataclass(kw_only=True)
class RecordSource(SourceOptions):
    """One source of a run's records.

    Attributes:
        source: a file, a folder, a pattern of files, a table of `blip2fast data import`, or
            `hf:NAME`, a data set of the hub.
        weight: the share of the samples that come from it, over the sum of all weights; None for
            all sources: each record is as likely as any other.
    """

    # for pydantic, which may not be installed
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str
    weight: float | None = None


Given = str | Path | RecordSource


def as_sources(given: Given | Sequence[Given]) -> list[RecordSource]:
    """One or several sources as a list.

    Raises:
        ValueError: none, or weights for some of them only, or weights that are not positive.
    """
    several = [given] if isinstance(given, str | Path | RecordSource) else list(given)
    sources = [
        each if isinstance(each, RecordSource) else RecordSource(source=str(each))
        for each in several
    ]
    if not sources:
        raise ValueError("records: the list of sources is empty")
    weights = [each.weight for each in sources if each.weight is not None]
    if weights and len(weights) < len(sources):
        missing = next(each.source for each in sources if each.weight is None)
        raise ValueError(f"records: {missing} has no weight, others have; give all or none")
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"records: weights {weights} must be positive; leave a source out instead")
    return sources


# Before the name of a data set that `datasets.load_dataset` finds.
HUB = "hf:"


def source_files(source: str | Path) -> list[Path]:
    """The file or folder that `source` is, or the sorted ones that it is a pattern of.

    None where it is a data set of the hub.
    """
    path = Path(source)
    if path.exists():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def check_source(source: str | Path) -> list[Path]:
    """Like `source_files`, but refuses a source that is not there.

    Raises:
        ValueError: names it.
    """
    found = source_files(source)
    if not found:
        raise ValueError(
            f"no records at {source}: not a file, a folder or a pattern of files "
            f"(a data set of the hub: {HUB}OWNER/NAME)"
        )
    return found
