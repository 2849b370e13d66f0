"""`sottovoce evict`: have every worker look again at what somebody may do."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from psycopg.conninfo import conninfo_to_dict

from protocol.confidential import Secret
from server.cli.output import refuse
from server.cli.ready import NotRunning, read_ready
from server.settings import SettingsError, load_settings
from storage.contract import Eviction, StoreUnavailable
from storage.redis import Keys
from storage.redis.evictions import command, publish_eviction

# Only the names of the database and of Redis are used.
_NOT_NEEDED = {
    "DB_USER": "unused",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_dW51c2VkJA==",  # unused$
}


def evict(
    user: Annotated[int | None, typer.Option(min=1, help="users.id")] = None,
    clerk_id: Annotated[str | None, typer.Option(help="users.clerk_id")] = None,
    channel: Annotated[int | None, typer.Option(min=1, help="chat_channels.id")] = None,
    everybody: Annotated[bool, typer.Option("--all", help="Everybody and everything.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Of the `sottovoce dev` that runs here.")
    ] = None,
) -> None:
    """Have access and subscription looked at again now, also of open streams.

    For after a change in the database: an account that was turned off, a subscription that
    ended. It changes nothing itself. Redis' settings (UPSTASH_REDIS_URL, or Upstash's pair for
    REST), DB_HOST, DB_PORT and DB_DATABASE say where, as they do for the server. Prints the Redis
    command that does the same.
    """
    eviction = Eviction(user_id=user, clerk_id=clerk_id, channel_id=channel, all=everybody)
    if eviction == Eviction():
        refuse(["say whom: --user, --clerk-id, --channel or --all"])
    keys, redis_url = _where(data_dir)
    try:
        heard = publish_eviction(redis_url, keys, eviction)
    except StoreUnavailable:
        typer.echo("sottovoce: Redis cannot be reached: nobody was told", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{command(redis_url)} {keys.control.decode()} {eviction.encode().decode()}")
    typer.echo(f"heard by {heard} workers", err=True)


def _where(data_dir: Path | None) -> tuple[Keys, Secret]:
    try:
        if data_dir is not None:
            ready = read_ready(data_dir)
            conninfo: dict[str, Any] = conninfo_to_dict(ready.database_url)
            return Keys(conninfo), Secret(ready.redis_url)
        names = ("DB_", "SOTTOVOCE_DB_", "UPSTASH_REDIS_")
        chosen = {name: value for name, value in os.environ.items() if name.startswith(names)}
        settings = load_settings(_NOT_NEEDED | chosen)
        return Keys(settings.database_conninfo), settings.redis_url
    except SettingsError as error:
        refuse(error.findings)
    except NotRunning as error:
        refuse([str(error)])
