"""`sottovoce restored`: the database was restored to an earlier point; begin a new epoch."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.database import which_database
from server.cli.output import say
from storage.postgres.epoch import EpochError, begin_epoch


def restored(
    data_dir: Annotated[
        Path | None, typer.Option(help="The database of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Say that the database was restored to an earlier point, where numbers are given again.

    In this order: stop the servers, restore, `sottovoce restored`, start the servers. DB_HOST,
    DB_USER and the like say where. Ids carry the new epoch from then on; whoever comes with an
    older one is told to start afresh; nothing is believed that Redis has kept. Servers that run
    notice it within two seconds. Once too often only makes everybody start afresh once more.
    """
    conninfo = which_database(data_dir)
    try:
        old, new = begin_epoch(conninfo)
    except EpochError as error:
        say(f"sottovoce: {error}")
        say("sottovoce: the epoch is as it was: do not start the servers before this succeeds")
        raise typer.Exit(1) from None
    typer.echo(f"epoch {old} -> {new}")
    say("now start the servers; those that run notice it within two seconds")
