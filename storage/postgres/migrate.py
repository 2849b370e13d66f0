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

Connection = psycopg.Connection[TupleRow]

LOCK_KEY = 0x5077_0BCE  # any number that no other program uses on this database
CONNECT_SECONDS = 5
TABLE_LOCK_SECONDS = 10  # a lock that waits longer stops the main application behind it
STATEMENT_SECONDS = 600  # numbering 10,000 old messages takes under one
LOCK_POLL_SECONDS = 0.1

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")

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
        try:
            connection.execute(_BOOK)
        except psycopg.Error as error:
            raise MigrationError(0, "", error, "chat_migrations cannot be made") from None
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
        raise MigrationError(0, "", error, "the database cannot be reached") from None
    with connection:
        yield connection


def _lock(connection: Connection, wait_seconds: float) -> None:
    """Take the lock that lasts as long as the connection, whatever ends it.

    It is asked for again and again instead of waited for: a waiting statement would hold a
    snapshot and so keep vacuum from its work.
    """
    deadline = time.monotonic() + wait_seconds
    try:
        while not _one(connection, "SELECT pg_try_advisory_lock(%s)", [LOCK_KEY]):
            if time.monotonic() > deadline:
                raise MigrationError(0, "", None, "another migration is still running")
            time.sleep(LOCK_POLL_SECONDS)
    except psycopg.Error as error:
        raise MigrationError(0, "", error, "the migration lock cannot be had") from None


def _missing(connection: Connection) -> list[Migration]:
    try:
        if _one(connection, "SELECT to_regclass('chat_migrations') IS NULL"):
            return migrations()
        rows = connection.execute("SELECT number FROM chat_migrations").fetchall()
    except psycopg.Error as error:
        raise MigrationError(0, "", error, "chat_migrations cannot be read") from None
    applied = {row[0] for row in rows}
    return [migration for migration in migrations() if migration.number not in applied]


def _apply(connection: Connection, migration: Migration) -> None:
    try:
        with connection.transaction():
            connection.execute("SET LOCAL TIME ZONE 'UTC'")  # what old times without one are in
            connection.execute(f"SET LOCAL lock_timeout = '{TABLE_LOCK_SECONDS}s'")
            connection.execute(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'")
            # Without parameters psycopg uses the simple protocol: a file may hold many statements.
            connection.execute(migration.sql)
            connection.execute(
                "INSERT INTO chat_migrations (number, name) VALUES (%s, %s)",
                [migration.number, migration.name],
            )
    except psycopg.Error as error:
        raise MigrationError(*migration[:2], error, "nothing of it was applied") from None


def _one(connection: Connection, sql: str, parameters: list[Any] | None = None) -> Any:
    row = connection.execute(sql, parameters).fetchone()
    assert row is not None
    return row[0]
