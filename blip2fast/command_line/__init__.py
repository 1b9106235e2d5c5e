"""The command `blip2fast`: a file for each group of commands, heavy imports inside them."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `blip2fast`; exits with a one-line message on bad input.

    Args:
        arguments: those of the command line; None: `sys.argv[1:]`.
    """
    from blip2fast.command_line.application import run

    run(arguments)
