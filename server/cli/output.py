"""How commands speak: results on standard output, what went wrong on standard error."""

import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

import typer

REFUSED = 2
"""Exit status: what was asked cannot be done as things are; nothing was changed."""


def say(text: str) -> None:
    """On standard error. A disk that is full or a pipe that nobody reads ends nothing."""
    with suppress(OSError):
        typer.echo(text, err=True)


def refuse(lines: Iterable[str]) -> NoReturn:
    """Say why, a line each, and end with status 2."""
    for line in lines:
        say(f"sottovoce: {line}")
    raise typer.Exit(REFUSED)


def let_sigterm_interrupt() -> None:
    """SIGTERM as Ctrl-C, where no Trio runs: what was started gets stopped on the way out."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
