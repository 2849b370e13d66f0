"""The `sottovoce` command: one file per command."""

import platform
from typing import Annotated

import typer

from server.cli.dev import dev
from server.cli.doctor import doctor
from server.cli.evict import evict
from server.cli.grants import grants
from server.cli.migrate import migrate
from server.cli.restored import restored
from server.cli.seed import seed
from server.cli.serve import serve
from server.cli.token import token
from server.version import VERSION

# No pretty tracebacks: they print local variables, which hold tokens and passwords.
app = typer.Typer(
    name="sottovoce",
    help="A confidential one-to-one chat server over Server-Sent Events.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sottovoce {VERSION} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


for command in (serve, dev, migrate, grants, token, seed, doctor, evict, restored):
    app.command()(command)


def main() -> None:
    app()
