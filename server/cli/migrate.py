"""`sottovoce migrate`: bring a database to the tables that this version needs."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.database import which_database
from storage.postgres import migrate as migrations


def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if something is pending.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="The database of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Create and change tables. DB_HOST, DB_USER and the like say where; safe to repeat."""
    conninfo = which_database(data_dir)
    try:
        names = migrations.pending(conninfo) if check else migrations.migrate(conninfo)
    except migrations.MigrationError as error:
        typer.echo(f"sottovoce: {error}", err=True)
        raise typer.Exit(1) from None
    for name in names:
        typer.echo(f"{'pending' if check else 'applied'} {name}")
    if not names:
        typer.echo("nothing to apply")
    elif check:
        raise typer.Exit(1)
