"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import typer

Config = Annotated[
    str,
    typer.Option("--config", metavar="FILE", help="A yaml file, such as those in configs/."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, such as optim.batch_size=8; repeatable.",
    ),
]
Device = Annotated[str | None, typer.Option(help="By default CUDA where there is one.")]
LanguageModel = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Folder or hub name of the LLM, if it has moved."),
]
ImageEncoder = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Folder or hub name of the image encoder, if it has moved."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
Readers = Annotated[int, typer.Option(min=1, help="Threads that read pictures.")]

# for commands that have a parser of their own
AS_GIVEN = {"ignore_unknown_options": True, "allow_extra_args": True}


def settle_process() -> None:
    """Before models are loaded: the process's heap, and none of transformers' notes and bars."""
    import torch
    import transformers

    from blip2fast._heap import keep_freed_memory

    if not torch.cuda.is_available():
        keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def say(line: str) -> None:
    """Print a result at once, above a bar that is shown."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def note(line: str) -> None:
    """Print to stderr what is no result, above a bar that is shown."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def show_table(
    table: Sequence[Sequence[str]], left: Collection[int] = (0,), chosen: int | None = None
) -> None:
    """Print a table to the terminal.

    Args:
        table: rows; the first is the header.
        left: columns of words; others hold numbers.
        chosen: row to print in bold, counted without the header.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(table[0]):
        side: Literal["left", "right"] = "left" if number in left else "right"
        drawn.add_column(escape(name), justify=side, overflow="fold")
    for number, row in enumerate(table[1:]):
        drawn.add_row(*map(escape, row), style="bold" if number == chosen else None)
    Console(highlight=False).print(drawn)


def on_terminal() -> bool:
    """Whether results go to a terminal; a file or a pipe gets plain lines."""
    return sys.stdout.isatty()


def complain(fault: str) -> None:
    """Name a picture that could not be read."""
    note(f"passed over: {fault}")
