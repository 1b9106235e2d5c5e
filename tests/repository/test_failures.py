"""docs/failures.md against the source: what it quotes is there, and what is raised is quoted."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "blip2fast"
PAGE = ROOT / "docs" / "failures.md"
VALUE = "\0"  # stands for an expression within a message


@dataclass(frozen=True)
class Section:
    """A section of the page: the files it is about, and the messages it quotes."""

    title: str
    files: tuple[str, ...]
    quotes: tuple[str, ...]


@cache
def sections() -> list[Section]:
    found = []
    for part in PAGE.read_text().split("\n## ")[1:]:
        about = re.search(r"<!-- messages of: (.+) -->", part)
        if about is not None:
            rows = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| `")]
            quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
            title = part.splitlines()[0]
            found.append(Section(title, tuple(about[1].split()), tuple(quotes)))
    return found


def _text(node: ast.expr) -> str:
    """A message as it is written, each expression in it a `VALUE`."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    return VALUE


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def texts(file: str) -> list[str]:
    """All strings in a file."""
    nodes = (n for n in ast.walk(_tree(file)) if isinstance(n, ast.Constant | ast.JoinedStr))
    return [_text(node) for node in nodes]


def raised(file: str) -> Iterator[tuple[int, str]]:
    """Line and message of every `raise` that has words of its own."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            message = " ".join(_text(argument) for argument in node.exc.args)
            if words(message) >= 1:
                yield node.lineno, message


def words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


def quotes_it(quote: str, message: str) -> bool:
    """Whether a quotation is of a message.

    Each `…` is some of its text, but in a quotation of one word: that must be all of its words.
    """
    short = words(quote) < 2
    skipped = r"[^A-Za-z]*" if short else ".*"
    pattern = skipped.join(re.escape(piece.strip()) for piece in quote.split("…"))
    find = re.fullmatch if short else re.search
    return words(quote) > 0 and find(pattern, message, re.DOTALL) is not None


def error_classes() -> dict[str, str]:
    """Our public exceptions, and the file of each."""
    bases, files = {}, {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base) for base in node.bases]
                files[node.name] = str(path.relative_to(PACKAGE))
    known = {"Exception", "BaseException", "SystemExit", "KeyboardInterrupt", "Warning"}

    def fails(name: str) -> bool:
        of_python = name in known or (name.endswith(("Error", "Warning")) and name not in bases)
        return of_python or any(fails(base) for base in bases.get(name, ()))

    return {name: files[name] for name in bases if fails(name) and not name.startswith("_")}


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.title)
def test_what_is_quoted_is_in_the_source(section: Section) -> None:
    known = [text for file in section.files for text in texts(file)]
    gone = [quote for quote in section.quotes if not any(quotes_it(quote, t) for t in known)]
    assert gone == []


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.title)
def test_what_is_raised_is_quoted(section: Section) -> None:
    missing = [
        f"{file}:{line}: {message.replace(VALUE, '…')}"
        for file in section.files
        for line, message in raised(file)
        if not any(quotes_it(quote, message) for quote in section.quotes)
    ]
    assert missing == []


def test_every_error_class_is_explained() -> None:
    part = PAGE.read_text().split("\n## ")[1]
    assert part.startswith("Kinds of errors")
    explained = set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE))
    ours = error_classes()
    assert {"UnusableImageError", "RunStopped", "SharedFault"} <= ours.keys()
    assert ours.keys() <= explained
    of_python = [getattr(builtins, name) for name in explained - ours.keys()]
    assert all(issubclass(found, Exception) for found in of_python)


def test_rooms_that_users_meet_are_covered() -> None:
    """Every file with a `raise` in these rooms is in a section, but those named here."""
    about = {file for section in sections() for file in section.files}
    rooms = ("command_line", "training", "checkpoints", "data", "published", "scoring", "search")
    rooms += ("capfilt", "demo_page", "reporting")
    # they pass on what was raised elsewhere, or check what our own code calls them with
    left_out = {
        *("capfilt/sampling.py", "search/coding.py", "training/engine_state.py"),
        *("training/measuring.py", "training/trainer.py"),
    }
    files = {
        f"{room}/{path.name}"
        for room in rooms
        for path in (PACKAGE / room).glob("*.py")
        if any(raised(f"{room}/{path.name}"))
    }
    assert files - about <= left_out
    assert len(about) > 80


@pytest.mark.parametrize(
    ("quote", "message", "expected"),
    [
        ("no index at …", f"no index at {VALUE}: {VALUE} is missing", True),
        ("… holds … words", f"{VALUE} holds {VALUE} words", True),
        ("… words holds …", f"{VALUE} holds {VALUE} words", False),
        ("image …: …", f"image {VALUE}: {VALUE}", True),
        ("image …: …", f"image {VALUE}: no {VALUE}", False),
        ("… (…). …", f"{VALUE} ({VALUE}). {VALUE}", False),
    ],
)
def test_a_quotation_is_of_a_message(quote: str, message: str, expected: bool) -> None:
    assert quotes_it(quote, message) is expected
