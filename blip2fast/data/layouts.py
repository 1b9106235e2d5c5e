"""The layouts that records come in: each is read as rows of named values.

    JSON lines, JSON lists     one object a row
    CSV and TSV, Parquet       one row a row, by the names of the columns
    COCO captions              {"images": [...], "annotations": [...]}; one row an image
    Karpathy's splits          {"images": [{"sentences": [...], "split": ...}]}; one row an image
    VQAv2, OK-VQA              {"questions": [...]} with a second file of annotations
    GQA                        {number: {"imageId": ..., "question": ..., "answer": ...}}
    imagefolder                a folder with metadata.csv, .jsonl or .parquet
    datasets                   a folder of `Dataset.save_to_disk`, or of Parquet files; or
                               `hf:NAME`, which `datasets.load_dataset` finds
    webdataset                 tar shards, read where they are
    pictures and texts         a folder of images, each with a .txt of the same name

`read_rows` finds out which one a source is. JSON, CSV and TSV may be compressed (.gz). The files
are parsed by Python's `json`, `csv` and `tarfile`, by pyarrow and by `datasets`.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from blip2fast._imports import needs
from blip2fast.data.shards import shard_samples
from blip2fast.data.source_config import HUB, SourceOptions, check_source
from blip2fast.data.text_files import DEFAULT_ENCODING, read_text, text_lines, text_size

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm")
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_PARQUET_ROWS = 4096


@dataclass
class Row:
    """One row of a source.

    Attributes:
        where: file and line, for messages; empty if the fault names them.
        values: by name, as the source has them.
        fault: why there are no values.
        share: how much of the source has been read with this row, from 0 to 1; an estimate.
        about: what evaluation reads beside the record: `id`, `kinds` (names of groupings and the
            row's kind in each), `raw_answers`.
    """

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    share: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


def read_rows(source: str | Path, options: SourceOptions | None = None) -> Iterator[Row]:
    """The rows of a source, in its order; the layout is recognised by its name and content.

    Args:
        source: a file, a folder, a pattern such as `shards/*.tar`, or `hf:NAME`, `hf:NAME:SPLIT`,
            `hf:NAME:SUBSET:SPLIT` for a data set of the hub.
        options: what the source does not say about itself.

    Raises:
        ValueError: nothing there, an unknown layout, or a file that cannot be parsed at all; names
            the file, where possible the line, and the remedy. Faults of single rows are left to
            `Row.fault`.
    """
    options = options or SourceOptions()
    if str(source).startswith(HUB):
        return _hub_rows(str(source))
    path = Path(source)
    if path.is_dir():
        return _folder_rows(path, options)
    if path.is_file():
        return _file_rows(path, options)
    found = check_source(source)
    if all(each.suffix == ".tar" for each in found):
        return _shard_rows(found, path.parent, options)
    return _in_turn([read_rows(each, options) for each in found])


def _in_turn(parts: Sequence[Iterator[Row]]) -> Iterator[Row]:
    """The rows of several files, with their share of all of these.

    A file that cannot be read is a row with a fault, after which the next file comes.
    """
    for number, part in enumerate(parts):
        try:
            for row in part:
                row.share = (number + row.share) / len(parts)
                yield row
        except ValueError as error:
            yield Row("", fault=str(error), share=(number + 1) / len(parts))


def _counted(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """Rows of which there are `count`."""
    for number, row in enumerate(rows, 1):
        row.share = number / count
        yield row


def read_json(path: Path, encoding: str = DEFAULT_ENCODING) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: not JSON; names the line.
    """
    try:
        return json.loads(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "it may be cut off: fetch or write it again"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for records; write it again") from None


def _file_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    suffix = _suffix(path)
    readers: dict[str, Callable[[Path, SourceOptions], Iterator[Row]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _table_rows,
        ".tsv": _table_rows,
        ".parquet": _parquet_rows,
    }
    if suffix == ".tar":
        return _shard_rows([path], path.parent, options)
    if suffix not in readers:
        raise ValueError(
            f"{path}: {suffix or 'no suffix'} is none of the layouts of records; give "
            f"{', '.join(readers)}, these with .gz, .tar or a folder"
        )
    return readers[suffix](path, options)


def _suffix(path: Path) -> str:
    """The suffix that says the layout: that before .gz, which texts may have."""
    suffix, before = path.suffix.lower(), Path(path.stem).suffix.lower()
    return before if suffix == ".gz" and before != ".parquet" else suffix


def _folder_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    names = {each.name for each in path.iterdir()}
    if "dataset_dict.json" in names:
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        if len(splits) != 1:
            raise ValueError(f"{path}: has the splits {', '.join(splits)}; give one: {path}/NAME")
        return _folder_rows(path / splits[0], options)
    if {"dataset_info.json", "state.json"} <= names:
        return _dataset_rows(path)
    metadata = sorted(each for name in _METADATA for each in path.rglob(name))
    if metadata:
        return _in_turn([_imagefolder_rows(each, path, options) for each in metadata])
    shards = sorted(path.rglob("*.tar"))
    if shards:
        return _shard_rows(shards, path, options)
    tables = sorted(path.rglob("*.parquet"))
    if tables:
        return _in_turn([_parquet_rows(each, options) for each in tables])
    return _sidecar_rows(path, options)


def _json_lines(path: Path, options: SourceOptions) -> Iterator[Row]:
    done, size = 0, text_size(path)
    for number, line in enumerate(text_lines(path, options.encoding), 1):
        done += len(line)
        if line.strip():
            row = _parsed(line, f"{path}, line {number}")
            row.share = min(1.0, done / size)
            yield row


def _parsed(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except RecursionError:
        return Row(where, fault="nested too deeply for a record; correct or drop the line")
    except json.JSONDecodeError as error:
        fault = f"not valid JSON ({error.msg} at column {error.colno}); correct or drop the line"
        return Row(where, fault=fault)
    return _named(values, where)


def _named(values: Any, where: str) -> Row:
    if isinstance(values, dict):
        return Row(where, values)
    kind = type(values).__name__
    return Row(where, fault=f'a {kind}, where an object such as {{"image": ...}} is expected')


def _json_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    text = read_text(path, options.encoding)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # JSON lines by another name
            yield from _json_lines(path, options)
            return
        content = read_json(path, options.encoding)  # says what is wrong
    if isinstance(content, list):
        rows = (_named(each, f"{path}, entry {number}") for number, each in enumerate(content, 1))
        yield from _counted(rows, len(content))
    elif isinstance(content, dict) and "questions" in content:
        yield from _counted(_vqa_rows(path, content, options), len(content["questions"]))
    elif isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        yield from _counted(_coco_rows(path, content), len(content["images"]))
    elif isinstance(content, dict) and "images" in content:
        yield from _counted(_karpathy_rows(path, content, options), len(content["images"]))
    elif isinstance(content, dict) and _is_gqa(content):
        yield from _counted(_gqa_rows(path, content, options), len(content))
    else:
        found = f"keys {', '.join(sorted(content))}" if isinstance(content, dict) else text[:20]
        raise ValueError(
            f"{path}: {found}: neither a list of records, nor COCO captions (images and "
            "annotations), nor Karpathy's splits (images), nor VQAv2 (questions), nor GQA"
        )


def _entries(path: Path, content: dict[str, Any], name: str, *keys: str) -> list[dict[str, Any]]:
    """The list `content[name]`, each of whose entries has `keys`."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {name!r} is not a list, as it is in COCO and VQAv2")
    for number, entry in enumerate(entries, 1):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{path}, {name} entry {number}: lacks {', '.join(missing)}")
    return entries


def _coco_rows(path: Path, content: dict[str, Any]) -> Iterator[Row]:
    images = _entries(path, content, "images", "id", "file_name")
    captions: dict[Any, list[Any]] = {image["id"]: [] for image in images}
    annotations = _entries(path, content, "annotations", "image_id")
    for number, annotation in enumerate(annotations, 1):
        where = f"{path}, annotations entry {number}"
        if "caption" not in annotation:
            raise ValueError(
                f"{where}: no caption; of COCO's files, take those named captions_*.json"
            )
        if annotation["image_id"] not in captions:
            raise ValueError(f"{where}: image_id {annotation['image_id']} is not among the images")
        captions[annotation["image_id"]].append(annotation["caption"])
    for number, image in enumerate(images, 1):
        values = {"image": image["file_name"], "captions": captions[image["id"]]}
        kinds = {"domain": image["domain"]} if image.get("domain") else {}  # of NoCaps
        about = {"id": image["id"], "kinds": kinds}
        yield Row(f"{path}, images entry {number}", values, about=about)


def _karpathy_rows(path: Path, content: dict[str, Any], options: SourceOptions) -> Iterator[Row]:
    images = _entries(path, content, "images", "filename", "sentences", "split")
    there = sorted({str(image["split"]) for image in images})
    wanted = (options.split or "").split("+")
    if not set(wanted) <= set(there):
        raise ValueError(
            f"{path}: has the splits {', '.join(there)}; state which, not {options.split!r} "
            "(--split, or split: in data.records); several are joined by +"
        )
    for number, image in enumerate(images, 1):
        if image["split"] not in wanted:
            continue
        where = f"{path}, images entry {number}"
        try:
            captions = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError):
            yield Row(where, fault="sentences: each needs a 'raw' text")
            continue
        folder = image.get("filepath")  # of COCO: train2014 or val2014
        name = f"{folder}/{image['filename']}" if folder else image["filename"]
        # Karpathy's own number, where the data set has none
        about = {"id": image.get("cocoid", image.get("imgid", image["filename"]))}
        yield Row(where, {"image": name, "captions": captions}, about=about)


def _is_gqa(content: dict[str, Any]) -> bool:
    first = next(iter(content.values()), None)
    return isinstance(first, dict) and {"imageId", "question"} <= first.keys()


def _gqa_rows(path: Path, content: dict[str, Any], options: SourceOptions) -> Iterator[Row]:
    template = options.image_name or "{}.jpg"
    for number, entry in content.items():
        where = f"{path}, question {number}"
        missing = [
            name
            for name in ("imageId", "question", "answer")
            if not isinstance(entry, dict) or name not in entry
        ]
        if missing:
            yield Row(where, fault=f"lacks {', '.join(missing)}; GQA's test files have no answers")
            continue
        values = {name: entry[name] for name in ("question", "answer")}
        kinds = {f"{name}_type": str(kind) for name, kind in (entry.get("types") or {}).items()}
        values["image"] = _named_image(template, entry["imageId"])
        yield Row(where, values, about={"id": number, "kinds": kinds})


def _named_image(template: str, number: Any) -> str:
    """The file name of an image with a number.

    Raises:
        ValueError: a template that does not fit.
    """
    try:
        return template.format(number)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"image name {template!r} of image {number!r}: {error!r}") from None


def _vqa_rows(path: Path, content: dict[str, Any], options: SourceOptions) -> Iterator[Row]:
    questions = _entries(path, content, "questions", "question_id", "image_id", "question")
    if options.annotations is None:
        raise ValueError(
            f"{path}: questions without answers: give the annotations, such as "
            "v2_mscoco_train2014_annotations.json (--annotations, or annotations: in data.records)"
        )
    other = Path(options.annotations)
    if not other.is_file():
        raise ValueError(f"annotations {other}: not a file")
    answers = read_json(other, options.encoding)
    if not isinstance(answers, dict):
        raise ValueError(f"{other}: not the annotations of VQAv2")
    found = {
        entry["question_id"]: entry
        for entry in _entries(other, answers, "annotations", "question_id", "answers")
    }
    template = options.image_name or f"COCO_{content.get('data_subtype', '')}_{{:012d}}.jpg"
    for number, question in enumerate(questions, 1):
        where = f"{path}, questions entry {number}"
        entry = found.get(question["question_id"])
        if entry is None:
            message = f"question_id {question['question_id']} has no annotation in {other}"
            yield Row(where, fault=message)
            continue
        try:
            values = {
                "image": template.format(question["image_id"]),
                "question": question["question"],
                "answers": [each["answer"] for each in entry["answers"]],
                "type": entry.get("answer_type", ""),
            }
            raw = [each["raw_answer"] for each in entry["answers"] if "raw_answer" in each]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            yield Row(where, fault=f"image_id or answers: {error!r}")
            continue
        if "multiple_choice_answer" in entry:
            values["answer"] = entry["multiple_choice_answer"]
        kinds = {name: entry[name] for name in ("question_type", "answer_type") if name in entry}
        about = {"id": question["question_id"], "kinds": kinds, "raw_answers": raw}
        yield Row(where, values, about=about)


def _table_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    lines = text_lines(path, options.encoding)
    header = next(lines, None)
    if header is None or not header.strip():
        raise ValueError(f"{path}, line 1: empty, where the names of the columns are expected")
    separator = options.separator or _separator(path, header)
    if len(separator) != 1:
        raise ValueError(f"separator {separator!r}: not one character")
    done, size = 0, text_size(path)

    def counted() -> Iterator[str]:
        nonlocal done
        for line in chain([header], lines):
            done += len(line)
            yield line

    reader = csv.reader(counted(), delimiter=separator, strict=True)
    row: list[str] = []
    number = 1
    try:
        names = [name.strip() for name in next(reader)]
        twice = [name for name, times in Counter(map(str.lower, names)).items() if times > 1]
        if any(twice):
            raise ValueError(f"{path}, line 1: two columns named {max(twice)!r}; rename one")
        number = reader.line_num + 1
        for row in reader:
            where, number = f"{path}, line {number}", reader.line_num + 1
            if not row:
                continue
            if len(row) != len(names):
                fault = (
                    f"{len(row)} columns, but the header has {len(names)} ({', '.join(names)}); "
                    f"quote texts that hold {separator!r}"
                )
                yield Row(where, fault=fault, share=min(1.0, done / size))
            else:
                values = dict(zip(names, row, strict=True))
                yield Row(where, values, share=min(1.0, done / size))
    except csv.Error as error:
        remedy = "correct the quotes"
        if "new-line character" in str(error):
            remedy = r"end lines with \n or \r\n, and quote texts that hold \r"
        raise ValueError(f"{path}, line {number}: {error}; {remedy}") from None


def _separator(path: Path, header: str) -> str:
    if _suffix(path) == ".tsv" or "\t" in header:
        return "\t"
    # what spreadsheets write where the comma is in numbers
    return ";" if ";" in header and "," not in header else ","


def _parquet_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    with needs("read Parquet files", "pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    share = number / file.metadata.num_rows
                    yield Row(f"{path}, row {number}", values, share=share)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, after row {number}: not readable as Parquet ({_first_line(error)}); fetch it "
            "again"
        ) from None


def _dataset_rows(path: Path) -> Iterator[Row]:
    with needs("read a folder of datasets", "datasets"):
        import datasets
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not readable by datasets ({_first_line(error)})") from None
    yield from _rows_of(dataset, str(path))


def _hub_rows(source: str) -> Iterator[Row]:
    """Rows of `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:SUBSET:SPLIT`."""
    with needs("read a data set of the hub", "datasets"):
        import datasets
    name, *parts = source.removeprefix(HUB).split(":")
    if not name or len(parts) > 2 or not all(parts):
        raise ValueError(
            f"{source}: give {HUB}OWNER/NAME, {HUB}OWNER/NAME:SPLIT or {HUB}OWNER/NAME:SUBSET:SPLIT"
        )
    subset = parts[0] if len(parts) == 2 else None
    known = (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        found = datasets.load_dataset(name, subset, split=parts[-1] if parts else None)
    except known as error:
        raise ValueError(
            f"{source}: datasets cannot load it ({_first_line(error)}); without a connection give "
            "a local folder, or load it once where there is one"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if len(found) != 1:
            raise ValueError(
                f"{source}: has the splits {', '.join(sorted(found))}; give one: {HUB}{name}:SPLIT"
            )
        found = next(iter(found.values()))
    yield from _rows_of(found, source)


def _rows_of(dataset: Any, where: str) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, whose images stay in their files' form."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    rows = (Row(f"{where}, row {number}", values) for number, values in enumerate(dataset, 1))
    yield from _counted(rows, len(dataset))


def _imagefolder_rows(path: Path, top: Path, options: SourceOptions) -> Iterator[Row]:
    """Rows of a metadata file, with images named from `top`."""
    inside = path.parent.relative_to(top).as_posix()
    for row in _file_rows(path, options):
        name = row.values.get("file_name")
        if row.fault is None and not isinstance(name, str):
            row.fault = "no file_name, which an imagefolder names its images by"
        elif isinstance(name, str) and inside != ".":
            row.values["file_name"] = f"{inside}/{name}"
        yield row


def _shard_rows(shards: Sequence[Path], top: Path, options: SourceOptions) -> Iterator[Row]:
    """Samples of tar shards: an image with a .txt, or with a .json of named values."""
    return _in_turn([_samples(shard, top, options) for shard in shards])


def _samples(shard: Path, top: Path, options: SourceOptions) -> Iterator[Row]:
    name = shard.relative_to(top).as_posix()
    for sample in shard_samples(shard, name, IMAGE_SUFFIXES):
        where = f"{shard}, sample {sample.name}"
        if sample.image is None:
            yield Row(where, fault="no image")
            continue
        named: dict[str, Any] = {}
        try:
            if ".json" in sample.texts:
                loaded = json.loads(sample.texts[".json"].decode(options.encoding))
                named = loaded if isinstance(loaded, dict) else {}
            if ".txt" in sample.texts:
                text = sample.texts[".txt"].decode(options.encoding).removeprefix("\ufeff")
                # what the .txt says comes first: the .json of img2dataset has it again
                named = {k: v for k, v in named.items() if k not in _WEB_CAPTIONS}
                named["caption"] = text.strip("\r\n")
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            yield Row(where, fault=f"{error}; state its encoding, or write the shard again")
            continue
        kept = {k: v for k, v in named.items() if k in _WEB_NAMES or k == options.caption_key}
        yield Row(where, {**kept, "image": sample.image})


_WEB_CAPTIONS = frozenset(("caption", "captions", "text"))
_WEB_NAMES = _WEB_CAPTIONS | {"question", "answer", "answers", "type"}


def _sidecar_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    images = sorted(
        each
        for each in path.rglob("*")
        if each.suffix.lower() in IMAGE_SUFFIXES and each.is_file() and each.name[0] != "."
    )
    if not images:
        raise ValueError(
            f"{path}: no records in this folder: no metadata.csv, .jsonl or .parquet, no Parquet "
            "files, no .tar shards and no images with a .txt each"
        )
    yield from _counted((_sidecar_row(image, path, options) for image in images), len(images))


def _sidecar_row(image: Path, path: Path, options: SourceOptions) -> Row:
    text = image.with_suffix(".txt")
    if not text.is_file():
        return Row(str(image), fault=f"no caption: {text.name} is missing beside it")
    try:
        caption = read_text(text, options.encoding).strip("\n")
    except ValueError as error:
        return Row(str(text), fault=str(error).removeprefix(f"{text}, "))
    name = image.relative_to(path).as_posix()
    return Row(f"{text}, line 1", {"image": name, "text": caption})


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
