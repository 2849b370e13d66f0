"""The ready file: what scripts need to know of a running `sottovoce dev`."""

import os
import secrets
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]

from protocol.confidential import Confidential

FILE = "ready.json"
"""In the data folder, whatever `--ready-file` says."""


class Person(Confidential, frozen=True, kw_only=True, omit_defaults=True):
    user_id: int
    email: str
    token: str
    channel_id: int | None = None
    """Of `lapsed` only: their channel with the therapist."""


class Pids(msgspec.Struct, frozen=True, kw_only=True):
    supervisor: int
    workers: list[int]
    postgres: int
    redis: int


class Ready(Confidential, frozen=True, kw_only=True, omit_defaults=True):
    base_url: str
    channel_id: int
    """Of the therapist and the prospect."""
    therapist: Person
    prospect: Person
    outsider: Person
    """A subscriber who is in no channel."""
    lapsed: Person
    """Has a channel, and no subscription any more."""
    database_url: str
    redis_url: str
    issuer: str
    jwt_key_file: str
    """The private key's PEM: whoever has it can be anybody here."""
    pids: Pids
    authorized_party: str | None = None
    """`azp` of the tokens, where the server asks for one."""


class NotRunning(Exception):
    def __init__(self, data_dir: Path) -> None:
        super().__init__(f"no sottovoce dev is running in {data_dir}: start one, or --data-dir")


def read_ready(data_dir: Path) -> Ready:
    """What the dev server of this folder says of itself.

    Raises:
        NotRunning: there is none.
    """
    try:
        ready = msgspec.json.decode((data_dir / FILE).read_bytes(), type=Ready)
    except (OSError, msgspec.MsgspecError):
        raise NotRunning(data_dir) from None
    if not _lives(ready.pids.supervisor):  # killed, it could not clean up
        raise NotRunning(data_dir)
    return ready


def _lives(pid: int) -> bool:
    """In a container often nobody reaps the dead."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def write_ready(ready: Ready, *paths: Path) -> None:
    for path in paths:
        write_private(path, msgspec.json.format(msgspec.json.encode(ready), indent=2) + b"\n")


def write_private(path: Path, content: bytes) -> None:
    """All of it or nothing, for the owner's eyes only: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
