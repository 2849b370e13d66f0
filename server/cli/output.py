"""How commands speak: results on standard output, what went wrong on standard error."""

import signal
from collections.abc import Iterable
from typing import NoReturn

import typer

REFUSED = 2
"""Exit status: what was asked cannot be done as things are; nothing was changed."""


def refuse(lines: Iterable[str]) -> NoReturn:
    """Say why, a line each, and end with status 2."""
    for line in lines:
        typer.echo(f"sottovoce: {line}", err=True)
    raise typer.Exit(REFUSED)


def let_sigterm_interrupt() -> None:
    """SIGTERM as Ctrl-C, where no Trio runs: what was started gets stopped on the way out."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
