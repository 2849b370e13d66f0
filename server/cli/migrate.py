"""`sottovoce migrate`: bring a database to what this version needs."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.database import which_database
from storage.postgres import migrate as migrations
from storage.postgres.take_over import Step


def migrate(
    plan: Annotated[
        bool, typer.Option("--plan", help="Change nothing; say what would be done, and how.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if something is pending.")
    ] = False,
    wait_seconds: Annotated[
        float, typer.Option(min=0, help="How long others are waited for in all, such as a backup.")
    ] = migrations.WAIT_SECONDS,
    data_dir: Annotated[
        Path | None, typer.Option(help="The database of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Create and change tables, beside an application that goes on writing to them.

    DB_HOST, DB_USER and the like say where. What does not fit is named before anything is changed.
    Safe to repeat, and to interrupt: the next run goes on.
    """
    conninfo = which_database(data_dir)
    try:
        if plan:
            _show(migrations.plan(conninfo))
            return
        if check:
            names = migrations.pending(conninfo)
        else:
            names = migrations.migrate(conninfo, wait_seconds=wait_seconds, say=typer.echo)
    except migrations.MigrationError as error:
        for line in error.findings or (error,):
            typer.echo(f"sottovoce: {line}", err=True)
        if error.findings:
            typer.echo("sottovoce: nothing was changed", err=True)
        raise typer.Exit(1) from None
    for name in names:
        typer.echo(f"{'pending' if check else 'applied'} {name}")
    if not names:
        typer.echo("nothing to apply")
    elif check:
        raise typer.Exit(1)


def _show(steps: list[Step]) -> None:
    """Print each step: its name, the tables it touches, what it does, the lock it needs."""
    for step in steps:
        typer.echo(f"{step.name}: {step.table}")
        typer.echo(f"    {step.about}")
        typer.echo(f"    lock: {step.lock}")
    if not steps:
        typer.echo("nothing to apply")
