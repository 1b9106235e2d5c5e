"""Questions about a picture from a command line: a list of them, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip2fast._imports import needs
from blip2fast.frozen.pictures import load_image

with needs("read images", "PIL"):
    from PIL import Image

if TYPE_CHECKING:
    from blip2fast.inference.chat import Chat


def one_picture(path: str) -> Image.Image:
    """Read the picture of a command.

    Raises:
        ValueError: it cannot be read.
    """
    return load_image(path)


def asked() -> Iterator[str]:
    """Lines from the terminal, with a prompt there, until its end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def read_lines(questions: Sequence[str], file: Path | None) -> list[str]:
    """The questions of a command: those given, then those of a file, one a line.

    Raises:
        ValueError: none at all, a missing file, or one that is not UTF-8.
    """
    found = list(questions)
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--questions {file}: no such file")
        try:
            found += file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--questions {file}: not UTF-8 ({error.reason})") from None
    found = [question.strip() for question in found if question.strip()]
    if not found:
        raise ValueError("no question: give some after the image, or --questions FILE")
    return found


def converse(chat: Chat, lines: Iterable[str], say: Callable[[str], None]) -> int:
    """Answer line by line until an empty one; a question that is refused does not end it.

    Returns:
        Number of questions that were refused.
    """
    refused = 0
    for line in lines:
        if not line.strip():
            break
        try:
            say(chat(line.strip()))
        except ValueError as error:
            refused += 1
            say(f"({error})")
    return refused
