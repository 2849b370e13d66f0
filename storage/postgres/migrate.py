"""Bring a database to the tables that this version needs, however far it is.

Numbered .sql files, each applied once, in order, in a transaction of its own, under one advisory
lock. Not yoyo: its lock is a row that outlives a crash. Not alembic: it brings SQLAlchemy along.

Blocking, with psycopg's plain connection: it runs before Trio does, or in a thread.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import TupleRow

from storage.postgres.unreachable import why_unreachable

Connection = psycopg.Connection[TupleRow]

LOCK_KEY = 0x5077_0BCE  # any number that no other program uses on this database
CONNECT_SECONDS = 5
LOCK_POLL_SECONDS = 0.1

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")

# A lock that is waited for longer stops the main application behind it. A million old messages
# are numbered in well under the ten minutes. UTC is what old times without a zone are in.
_SESSION = """
SET lock_timeout = '10s';
SET statement_timeout = '10min';
SET TIME ZONE 'UTC';
"""

_BOOK = """
CREATE TABLE IF NOT EXISTS chat_migrations (
    number integer PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""


class Migration(NamedTuple):
    number: int
    name: str
    sql: str


class MigrationError(Exception):
    """A migration did not apply; the database is as the one before it left it.

    The text holds nothing of any row: PostgreSQL's own message may quote one, so it is left
    out. Only what our own files raise (SQLSTATE SV001: counts and ids) is passed on.

    Attributes:
        number: of the migration; 0 where none had begun (connecting, waiting for the lock).
        name: its file name without the ending.
        sqlstate: PostgreSQL's five characters, empty if it did not answer.
    """

    def __init__(self, number: int, name: str, error: psycopg.Error | None, reason: str) -> None:
        self.number = number
        self.name = name
        self.sqlstate = (error.sqlstate if error is not None else None) or ""
        if error is not None and error.sqlstate == "SV001":
            reason = error.diag.message_primary or reason
        state = f" (SQLSTATE {self.sqlstate})" if self.sqlstate else ""
        super().__init__(f"{name or 'migrate'}: {reason}{state}")


def migrate(conninfo: str | dict[str, Any], *, wait_seconds: float = 60) -> list[str]:
    """Apply what is missing. Any number of processes may do so at once, any number of times.

    Args:
        conninfo: libpq's string, or its keywords.
        wait_seconds: how long another process's migration is waited for.

    Returns:
        The names applied now, in order.

    Raises:
        MigrationError: nothing of the named migration remains; those before it do.
    """
    applied = []
    with _connected(conninfo) as connection:
        _lock(connection, wait_seconds)
        with _explained("chat_migrations cannot be made"):
            connection.execute(_BOOK)
        for migration in _missing(connection):
            _apply(connection, migration)
            applied.append(migration.name)
    return applied


def pending(conninfo: str | dict[str, Any]) -> list[str]:
    """The names that `migrate` would apply. Reads only, and needs no table.

    Raises:
        MigrationError: the database does not answer or refuses.
    """
    with _connected(conninfo) as connection:
        return [migration.name for migration in _missing(connection)]


def migrations() -> list[Migration]:
    """Every migration of this version, in order.

    Raises:
        ValueError: a file's name is not `0001_words.sql`, or a number is there twice.
    """
    found = []
    for file in resources.files("storage.postgres").joinpath("migrations").iterdir():
        if not file.name.endswith(".sql"):
            continue
        match = _FILE.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file.name} is not a migration's name")
        found.append(Migration(int(match[1]), file.name[:-4], file.read_text("utf-8")))
    found.sort()
    if len({migration.number for migration in found}) < len(found):
        raise ValueError("two migrations have the same number")
    return found


@contextmanager
def _connected(conninfo: str | dict[str, Any]) -> Iterator[Connection]:
    keywords: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS}
    if isinstance(conninfo, str):
        text = conninfo
    else:
        text, keywords = "", keywords | conninfo
    try:
        connection = psycopg.connect(text, autocommit=True, **keywords)
    except psycopg.Error as error:
        raise MigrationError(0, "", error, str(why_unreachable(error))) from None
    with connection:
        with _explained("the session cannot be set up"):
            connection.execute(_SESSION)
        yield connection


@contextmanager
def _explained(reason: str, migration: Migration | None = None) -> Iterator[None]:
    """Turn psycopg's errors into ours, without what they say of rows and addresses."""
    try:
        yield
    except psycopg.Error as error:
        number, name = (migration.number, migration.name) if migration else (0, "")
        raise MigrationError(number, name, error, reason) from None


def _lock(connection: Connection, wait_seconds: float) -> None:
    """Take the lock that lasts as long as the connection, whatever ends it.

    It is asked for again and again instead of waited for: a waiting statement would hold a
    snapshot and so keep vacuum from its work.
    """
    deadline = time.monotonic() + wait_seconds
    with _explained("the migration lock cannot be had"):
        while not _one(connection, "SELECT pg_try_advisory_lock(%s)", [LOCK_KEY]):
            if time.monotonic() > deadline:
                raise MigrationError(0, "", None, "another migration is still running")
            time.sleep(LOCK_POLL_SECONDS)


def _missing(connection: Connection) -> list[Migration]:
    with _explained("chat_migrations cannot be read"):
        if _one(connection, "SELECT to_regclass('chat_migrations') IS NULL"):
            return migrations()
        rows = connection.execute("SELECT number FROM chat_migrations").fetchall()
    applied = {row[0] for row in rows}
    return [migration for migration in migrations() if migration.number not in applied]


def _apply(connection: Connection, migration: Migration) -> None:
    with _explained("nothing of it was applied", migration), connection.transaction():
        # Without parameters psycopg uses the simple protocol: a file may hold many statements.
        connection.execute(migration.sql)
        connection.execute(
            "INSERT INTO chat_migrations (number, name) VALUES (%s, %s)",
            [migration.number, migration.name],
        )


def _one(connection: Connection, sql: str, parameters: list[Any] | None = None) -> Any:
    row = connection.execute(sql, parameters).fetchone()
    assert row is not None
    return row[0]
