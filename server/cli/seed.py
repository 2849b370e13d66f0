"""`sottovoce seed`: pairs of therapist and client with their tokens, for load tests."""

import json
from pathlib import Path
from typing import Annotated

import psycopg
import typer

from server.cli.local_issuer import SigningKey
from server.cli.output import refuse
from server.cli.people import seed_pairs
from server.cli.ready import NotRunning, read_ready, write_private
from server.cli.token import sign


def seed(
    channels: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many pairs.")],
    out: Annotated[Path, typer.Option(help="One JSON object per line and pair.")],
    data_dir: Annotated[Path, typer.Option(help="Of the running dev.")] = Path(".sottovoce"),
) -> None:
    """Make new pairs, each with a channel, and write their tokens, which live for a day.

    Lines: channel_id, therapist_token, prospect_token.
    """
    try:
        ready = read_ready(data_dir)
    except NotRunning as error:
        refuse([str(error)])
    key = SigningKey(Path(ready.jwt_key_file))
    try:
        pairs = list(seed_pairs(ready.database_url, channels))
    except psycopg.Error:
        refuse(["the database does not take them: see `sottovoce doctor`"])
    lines = [
        json.dumps(
            {
                "channel_id": pair.channel_id,
                "therapist_token": sign(key, ready, pair.therapist),
                "prospect_token": sign(key, ready, pair.prospect),
            }
        )
        for pair in pairs
    ]
    write_private(out, "".join(f"{line}\n" for line in lines).encode())
    typer.echo(f"{len(lines)} channels: {out}")
