"""What `blip2fast` is made of, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from blip2fast import __version__
from blip2fast._imports import needs
from blip2fast.command_line import (
    bootstrapping,
    machine,
    pictures,
    records,
    runs,
    scores,
    search,
    use,
)
from blip2fast.command_line.options import AS_GIVEN

with needs("run its commands", "typer"):
    import typer

app = typer.Typer(
    name="blip2fast",
    help="Train and run BLIP-2: the Q-Former between a frozen image encoder and a frozen LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)

app.command(rich_help_panel="Train")(runs.init)
app.command(rich_help_panel="Train", add_help_option=False, context_settings=AS_GIVEN)(runs.train)
app.command(rich_help_panel="Train")(runs.plan)
app.command("storage-loss", rich_help_panel="Train")(runs.storage_loss)
app.add_typer(records.app, name="data", rich_help_panel="Data")
app.command(rich_help_panel="Data")(records.features)
app.command(rich_help_panel="Data")(bootstrapping.capfilt)
app.command(rich_help_panel="Use")(pictures.caption)
app.command(rich_help_panel="Use")(pictures.vqa)
app.command(rich_help_panel="Use")(pictures.chat)
app.command(rich_help_panel="Use")(pictures.attention)
app.add_typer(search.app, name="index", rich_help_panel="Use")
app.command("demo-page", rich_help_panel="Use")(pictures.demo_page)
app.command(rich_help_panel="Use")(use.report)
app.command(rich_help_panel="Use")(use.convert)
app.command(rich_help_panel="Use")(use.demo)
app.add_typer(scores.app, name="eval", rich_help_panel="Use")
app.add_typer(machine.app, name="kernels", rich_help_panel="Machine")
app.command(rich_help_panel="Machine")(machine.doctor)
app.command(rich_help_panel="Machine", context_settings=AS_GIVEN)(machine.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """What comes before a command."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command: `blip2fast.command_line.main`."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="blip2fast")
    except SystemExit as end:
        if end.code:
            raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
