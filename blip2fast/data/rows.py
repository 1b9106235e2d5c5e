"""Turns the rows of any layout into records: names that people use, and what a row must have."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from blip2fast.data.layouts import Row
from blip2fast.data.records import (
    AnyRecord,
    CaptionRecord,
    QuestionRecord,
    SequenceRecord,
    record_fault,
)
from blip2fast.data.source_config import SourceOptions

Task = Literal["caption", "vqa", "sequence"]
# field -> the names that it has in files, the first of them ours
ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "filepath", "file_name", "filename", "image_path", "path", "img"),
    "images": ("images",),
    "captions": ("captions", "caption", "text", "texts", "title", "sentences"),
    "question": ("question",),
    "answer": ("answer", "multiple_choice_answer"),
    "answers": ("answers",),
    "type": ("type", "answer_type", "question_type"),
    "prompt": ("prompt",),
}
_FIELDS: dict[Task, tuple[str, ...]] = {
    "caption": ("image", "captions"),
    "vqa": ("image", "question", "answer", "answers", "type"),
    "sequence": ("images", "captions", "prompt"),
}
_OPTIONAL = ("type", "prompt")


def task_of(row: Row) -> Task:
    """The task that a row is made for, by its names."""
    names = {name.strip().lower() for name in row.values}
    if "question" in names:
        return "vqa"
    return "sequence" if "images" in names else "caption"


@dataclass
class RecordMaker:
    """Makes records of rows.

    Args:
        task: kind of the records.
        options: of the source; the names of its columns, where stated.
        images: the folder from which images are named; absolute paths inside it are shortened.
        keep_image: `(content, where) -> key`, which stores an image that a row has in itself.

    Attributes:
        ignored: how often each name was passed over.
    """

    task: Task
    options: SourceOptions = field(default_factory=SourceOptions)
    images: Path | None = None
    keep_image: Callable[[bytes, str], str] | None = None
    ignored: Counter[str] = field(default_factory=Counter)

    def __call__(self, row: Row) -> AnyRecord:
        """The record of a row.

        Raises:
            ValueError: the row has a fault; names file and line, and the remedy.
        """
        if row.fault is not None:
            raise ValueError(f"{row.where}: {row.fault}" if row.where else row.fault)
        values = {name.strip().lower(): value for name, value in row.values.items()}
        if len(values) < len(row.values):
            names = Counter(name.strip().lower() for name in row.values)
            raise ValueError(
                f"{row.where}: two names {names.most_common(1)[0][0]!r} that differ in case or "
                "white space alone; rename one"
            )
        try:
            record = self._record(values, row.where)
        except _Unusable as error:
            raise ValueError(f"{row.where}: {error}") from None
        fault = record_fault(record)
        if fault is not None:
            raise ValueError(f"{row.where}: {fault}; correct or drop it")
        return record

    def _record(self, values: dict[str, Any], where: str) -> AnyRecord:
        names = {each: self._name_of(each, values) for each in _FIELDS[self.task]}
        self._pass_over(values.keys() - set(names.values()), names)
        found = {each: values[name] for each, name in names.items() if name is not None}
        if self.task == "sequence":
            return SequenceRecord(
                tuple(
                    self._image(key, where) for key in _items(_required(found, "images", values))
                ),
                _texts(_required(found, "captions", values), "captions"),
                _text(found.get("prompt") or "", "prompt"),
            )
        image = self._image(_required(found, "image", values), where)
        if self.task == "caption":
            return CaptionRecord(image, _texts(_required(found, "captions", values), "captions"))
        answer, answers = _answers(found, values)
        return QuestionRecord(
            image,
            _text(_required(found, "question", values), "question"),
            answer,
            _text(found.get("type") or "", "type"),
            answers,
        )

    def _name_of(self, wanted: str, values: Mapping[str, Any]) -> str | None:
        """The name under which a row has a field."""
        stated = {"image": self.options.image_key, "captions": self.options.caption_key}.get(wanted)
        if stated is not None:
            name = stated.strip().lower()
            if name not in values:
                raise _Unusable(f"no {stated!r}, which the source was said to have{_has(values)}")
            return name
        there = [name for name in ALIASES[wanted] if values.get(name) is not None]
        if len(there) > 1 and wanted not in _OPTIONAL:
            option = {"image": "image_key", "captions": "caption_key"}.get(wanted)
            remedy = f"state which ({option})" if option else "keep one"
            raise _Unusable(f"has both {there[0]!r} and {there[1]!r}; {remedy}")
        return there[0] if there else None

    def _pass_over(self, others: Collection[str], names: Mapping[str, str | None]) -> None:
        for other in others:
            meant = [n for n in _OPTIONAL if n in names and names[n] is None and other != n]
            near = difflib.get_close_matches(other, meant, 1, 0.8)
            if near:
                raise _Unusable(f"{other!r}: no such name; {near[0]!r} is meant?")
            self.ignored[other] += 1

    def _image(self, value: Any, where: str) -> str:
        content = None
        if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
            content, value = value.get("bytes"), value.get("path")
        elif isinstance(value, bytes):
            content, value = value, None
        if content is not None:
            if self.keep_image is None:
                raise _Unusable(
                    "the image is in the row itself; take it out once with `blip2fast data import "
                    "SOURCE --out DIR`"
                )
            return self.keep_image(content, where)
        if not isinstance(value, str) or not value.strip():
            raise _Unusable(f"image: {_show(value)}, where the name of a file is expected")
        value = _text(value, "image")
        if PurePath(value).is_absolute() and self.images is not None:
            try:
                return PurePath(value).relative_to(self.images.absolute()).as_posix()
            except ValueError:
                raise _Unusable(
                    f"image {value!r} lies outside {self.images}; give the folder that holds all"
                ) from None
        return value


class _Unusable(Exception):
    """A row that makes no record; the message says why."""


def _required(found: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> Any:
    if name in found:
        return found[name]
    wanted = " or ".join(repr(alias) for alias in ALIASES[name][:4])
    option = {"image": " (or state its name: image_key)", "captions": " (or state it: caption_key)"}
    raise _Unusable(f"no {wanted}{option.get(name, '')}{_has(values)}")


def _answers(found: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The answer, and those of several people."""
    given = found.get("answer")
    several = found.get("answers")
    if several is None and isinstance(given, list | tuple):  # LAVIS has all under `answer`
        given, several = None, given
    answers = () if several is None else _texts(several, "answers")
    if given is not None:
        return _text(given, "answer"), answers
    if not answers:
        raise _Unusable(f"no 'answer' or 'answers'{_has(values)}")
    return Counter(answers).most_common(1)[0][0], answers


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    raise _Unusable(f"images: {_show(value)}, where a list is expected")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value, name),)
    if isinstance(value, list | tuple):
        return tuple(_text(each, name) for each in value)
    raise _Unusable(f"{name}: {_show(value)}, where a text or a list of texts is expected")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{name}: {_show(value)}, where a text is expected")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Unusable(f"{name}: {value!r} holds half a character (a surrogate)") from None
    return value


def _has(values: Mapping[str, Any]) -> str:
    return f"; the row has {', '.join(sorted(values)) or 'nothing'}"


def _show(value: Any) -> str:
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 40 else shown[:37] + "..."
