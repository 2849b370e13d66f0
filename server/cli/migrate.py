"""`sottovoce migrate`: bring a database to the tables that this version needs."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.output import refuse
from server.cli.ready import NotRunning, read_ready
from server.settings import SettingsError, load_settings
from storage.postgres import migrate as migrations

# A database is migrated before there is anything else to configure.
_NOT_NEEDED = {
    "UPSTASH_REDIS_URL": "redis://unused",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_dW51c2VkJA==",  # unused$
}


def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if something is pending.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="The database of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Create and change tables. DB_HOST, DB_USER and the like say where; safe to repeat."""
    conninfo = _where(data_dir)
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


def _where(data_dir: Path | None) -> str | dict[str, Any]:
    try:
        if data_dir is not None:
            return read_ready(data_dir).database_url
        names = ("DB_", "SOTTOVOCE_DB_")
        chosen = {name: value for name, value in os.environ.items() if name.startswith(names)}
        return load_settings(chosen | _NOT_NEEDED).database_conninfo
    except SettingsError as error:
        refuse(error.findings)
    except NotRunning as error:
        refuse([str(error)])
