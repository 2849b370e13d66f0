"""`sottovoce grants`: the SQL that gives the database's two roles what they need, and no more."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.database import which_database
from storage.postgres import grants as privileges
from storage.postgres.migrate import MigrationError


def grants(
    owner: Annotated[
        str, typer.Option(help="The role that migrates and owns.")
    ] = "sottovoce_owner",
    server: Annotated[str, typer.Option(help="The role that serves.")] = "sottovoce_server",
    data_dir: Annotated[
        Path | None, typer.Option(help="The database of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Print the SQL for a role that migrates and a role that serves. Changes nothing.

    DB_HOST, DB_USER and the like say where; any role that may connect will do. Before the first
    `sottovoce migrate` it prints what the migrating role needs, afterwards both.
    """
    try:
        lines = privileges.grants(which_database(data_dir), owner=owner, server=server)
    except MigrationError as error:
        typer.echo(f"sottovoce: {error}", err=True)
        raise typer.Exit(1) from None
    for line in lines:
        typer.echo(line)
