"""`sottovoce token`: a session token for somebody of a running `sottovoce dev`."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.local_issuer import DAY_SECONDS, SigningKey
from server.cli.output import refuse
from server.cli.people import clerk_id_of
from server.cli.ready import NotRunning, Ready, read_ready


def token(
    who: Annotated[
        str, typer.Argument(help="therapist, prospect, outsider, lapsed, or any Clerk id.")
    ],
    data_dir: Annotated[Path, typer.Option(help="Of the running dev.")] = Path(".sottovoce"),
    lifetime: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Until it expires.")
    ] = DAY_SECONDS,
) -> None:
    """Print a token for the server that `sottovoce dev` runs. Production's are Clerk's."""
    try:
        ready = read_ready(data_dir)
    except NotRunning as error:
        refuse([str(error)])
    typer.echo(sign(SigningKey(Path(ready.jwt_key_file)), ready, who, seconds=lifetime))


def sign(key: SigningKey, ready: Ready, who: str, *, seconds: float = DAY_SECONDS) -> str:
    """A token as the running dev's issuer would give it."""
    return key.sign(
        clerk_id_of(who),
        issuer=ready.issuer,
        authorized_party=ready.authorized_party,
        seconds=seconds,
    )
