"""Brings a database to what this version needs, however far it is, while others use it.

There are three kinds of migrations. Numbered files make tables that are ours; each is applied once,
in order, in a transaction of its own, and is never edited after it has landed. `take_over` brings
the main application's two tables to what we need, step by step beside its running transactions.
`functions` are made again whenever their text changes.

The first two numbered files make the demo's tables from nothing. Where the main application has
tables of its own, `take_over` does their part, and they count as applied.

Not yoyo: its lock is a row that outlives a crash. Not alembic: it brings SQLAlchemy along.

Blocking, with psycopg's plain connection: it runs before Trio does, or in a thread.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, NamedTuple

import psycopg

from storage.postgres.catalog import Catalog, decode_catalog
from storage.postgres.queries import QUERIES
from storage.postgres.requirements import is_own, unmet_by_server, unmet_by_tables
from storage.postgres.take_over import (
    MOMENT,
    Blocked,
    Connection,
    Session,
    Step,
    function_steps,
    steps,
)
from storage.postgres.unreachable import why_unreachable

LOCK_KEY = 0x5077_0BCE
"""The advisory lock's number: any one that no other program uses on this database."""
CONNECT_SECONDS = 5
LOCK_POLL_SECONDS = 0.1
WAIT_SECONDS = 600.0
"""How long others are waited for in all: another migration, a backup that reads the tables."""

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_FROM_NOTHING = (1, 2)
"""The numbered files that make the main application's tables for the demo."""
_TAKEN_OVER = 2
"""The number under which it is written down that `take_over` has begun."""

_BOOK = """
CREATE TABLE IF NOT EXISTS chat_migrations (
    number integer PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""

_TWINS = """
SELECT count(*), (array_agg(ids ORDER BY ids[1]))[1:5] FROM (
    SELECT (array_agg(id::bigint ORDER BY id))[1:2] AS ids FROM chat_channels
    GROUP BY therapist_id, prospect_user_id HAVING count(*) > 1
) AS twins
"""
_SHARED_CLERK_IDS = """
SELECT count(*) FROM (
    SELECT FROM users WHERE clerk_id IS NOT NULL GROUP BY clerk_id HAVING count(*) > 1
) AS shared
"""


class Migration(NamedTuple):
    number: int
    name: str
    sql: str


class MigrationError(Exception):
    """A migration did not apply; the database is as the step before it left it.

    The text holds nothing of any row: PostgreSQL's own message may quote one, so it is left out.

    Attributes:
        name: the step's name; empty where none had begun.
        sqlstate: PostgreSQL's five characters, empty if it did not answer.
        findings: what does not fit, a sentence each, where that is why nothing was begun.
    """

    def __init__(
        self,
        name: str,
        error: psycopg.Error | None,
        reason: str,
        *,
        findings: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.sqlstate = (error.sqlstate if error is not None else None) or ""
        self.findings = findings
        state = f" (SQLSTATE {self.sqlstate})" if self.sqlstate else ""
        super().__init__(f"{name or 'migrate'}: {reason}{state}")


def migrate(
    conninfo: str | dict[str, Any],
    *,
    wait_seconds: float = WAIT_SECONDS,
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Do what is missing. Any number of processes may do so at once, any number of times, and the
    main application may go on writing.

    Args:
        conninfo: libpq's string, or its keywords.
        wait_seconds: how long others are waited for in all.
        say: called with a line for a person whenever it has to wait.

    Returns:
        The names of what was done now, in order.

    Raises:
        MigrationError: what does not fit is named before anything is changed; of a step that
            fails later nothing remains, those before it do, and the next run goes on there.
    """
    deadline = time.monotonic() + wait_seconds
    with connected(conninfo) as connection, _locked(conninfo, deadline):
        catalog = read_catalog(connection)
        if findings := unmet(connection, catalog):
            raise MigrationError(
                "", None, "nothing was changed: " + "; ".join(findings), findings=tuple(findings)
            )
        session = Session(connection, deadline=deadline, say=say)
        done: list[str] = []
        with explained("chat_migrations cannot be made"):
            connection.execute(_BOOK)
        done += [_run(session, step) for step in _files(connection, catalog)]
        for following in (steps, function_steps):
            done += [_run(session, step) for step in following(read_catalog(connection))]
        return done


def plan(conninfo: str | dict[str, Any]) -> list[Step]:
    """What `migrate` would do, in order. Reads only.

    Raises:
        MigrationError: the database does not answer or refuses; or what does not fit, as `migrate`
            says it.
    """
    with connected(conninfo) as connection:
        catalog = read_catalog(connection)
        if findings := unmet(connection, catalog):
            raise MigrationError("", None, "; ".join(findings), findings=tuple(findings))
        return _plan(connection, catalog)


def pending(conninfo: str | dict[str, Any]) -> list[str]:
    """The names of what `migrate` would do. Reads only, and needs no table.

    Raises:
        MigrationError: the database does not answer or refuses.
    """
    with connected(conninfo) as connection:
        return [step.name for step in _plan(connection, read_catalog(connection))]


def unmet_for_serving(conninfo: str | dict[str, Any]) -> list[str]:
    """Why a request of this role could not succeed, a sentence each; and twins of Clerk ids, which
    only rows can tell. Reads only.

    Raises:
        MigrationError: the database does not answer or refuses.
    """
    with connected(conninfo) as connection:
        catalog = read_catalog(connection)
        known = [migration.number for migration in migrations()]
        findings = unmet_by_server(catalog, applied=applied(connection, catalog), known=known)
        return findings or list(_unmet_by_rows(connection, catalog))


def read_catalog(connection: Connection) -> Catalog:
    """What the database says of itself.

    Raises:
        MigrationError
    """
    with explained("the tables cannot be looked at"):
        return decode_catalog(_one(connection, QUERIES["catalog"].decode()))


def applied(connection: Connection, catalog: Catalog) -> set[int]:
    """The numbers of the migrations that the database has.

    Raises:
        MigrationError
    """
    if "chat_migrations" not in catalog.tables:
        return set()
    with explained("chat_migrations cannot be read"):
        return {row[0] for row in connection.execute(QUERIES["applied"].decode())}


def unmet(connection: Connection, catalog: Catalog) -> list[str]:
    """What keeps `migrate` from taking the tables over, a sentence each: what `requirements` says
    of the tables, and what only their rows can tell.

    Raises:
        MigrationError
    """
    findings = unmet_by_tables(
        catalog,
        fresh=_is_fresh(catalog),
        adopted=_TAKEN_OVER in applied(connection, catalog),
        own_people=is_own(catalog, "chat_people"),
    )
    return findings or list(_unmet_by_rows(connection, catalog))


def _unmet_by_rows(connection: Connection, catalog: Catalog) -> Iterator[str]:
    with explained("the tables cannot be read"):
        channels = catalog.tables.get("chat_channels")
        if channels and not channels.has_index("therapist_id", "prospect_user_id", unique=True):
            row = connection.execute(_TWINS).fetchone()
            if row is not None and row[0]:
                ids = ", ".join(str(channel) for pair in row[1] for channel in pair)
                yield (
                    f"pairs of therapist and prospect with more than one channel: {row[0]} "
                    f"(chat_channels.id of five at most: {ids}); merge each pair's channels"
                )
        users = catalog.tables.get("users")
        if (
            users
            and not is_own(catalog, "chat_people")
            and not users.has_index("clerk_id", unique=True)
        ):
            shared = _one(connection, _SHARED_CLERK_IDS)
            if shared:
                yield (
                    f"users.clerk_id: {shared} Clerk ids have more than one row; one must remain"
                )


def migrations() -> list[Migration]:
    """Every numbered migration of this version, in order.

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


def _is_fresh(catalog: Catalog) -> bool:
    """Whether nothing of the main application is there, as for the demo."""
    return not {"users", "therapists", "chat_channels", "chat_messages"} & set(catalog.tables)


def _plan(connection: Connection, catalog: Catalog) -> list[Step]:
    files = _files(connection, catalog)
    if _is_fresh(catalog):  # what follows depends on the tables that the files make
        return files
    return [*files, *steps(catalog), *function_steps(catalog)]


def _files(connection: Connection, catalog: Catalog) -> list[Step]:
    """A step for each numbered migration that is missing."""
    there = applied(connection, catalog)
    fresh = _is_fresh(catalog)
    found = []
    for migration in migrations():
        if migration.number in there:
            continue
        runs = fresh or migration.number not in _FROM_NOTHING
        found.append(
            Step(
                migration.name,
                "tables of ours",
                "make them" if runs else "note that the main application has its own",
                MOMENT if runs else "none",
                lambda session, m=migration, r=runs: _apply(session, m, runs=r),  # type: ignore[misc]
            )
        )
    return found


def _apply(session: Session, migration: Migration, *, runs: bool) -> None:
    with session.connection.transaction():
        session.connection.execute("SET LOCAL TIME ZONE 'UTC'")
        if runs:
            # Without parameters psycopg uses the simple protocol: a file may hold many statements.
            session.connection.execute(migration.sql)
        session.connection.execute(
            "INSERT INTO chat_migrations (number, name) VALUES (%s, %s)",
            [migration.number, migration.name],
        )


def _run(session: Session, step: Step) -> str:
    """Run a step; its name."""
    try:
        with explained("it failed; the next run goes on here", step.name):
            step.run(session)
        return step.name
    except Blocked as blocked:
        holders = ", ".join(blocked.holders) or "others"
        raise MigrationError(
            step.name,
            None,
            f"{blocked.table} was held by {holders} for all of the time; "
            "run it again when they have ended",
        ) from None


@contextmanager
def connected(conninfo: str | dict[str, Any]) -> Iterator[Connection]:
    keywords: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS}
    if isinstance(conninfo, str):
        text = conninfo
    else:
        text, keywords = "", keywords | conninfo
    try:
        connection = psycopg.connect(text, autocommit=True, prepare_threshold=None, **keywords)
    except psycopg.Error as error:
        raise MigrationError("", error, str(why_unreachable(error))) from None
    with connection:
        yield connection


@contextmanager
def explained(reason: str, name: str = "") -> Iterator[None]:
    """Turn psycopg's errors into ours, without what they say of rows and addresses."""
    try:
        yield
    except psycopg.Error as error:
        raise MigrationError(name, error, reason) from None


@contextmanager
def _locked(conninfo: str | dict[str, Any], deadline: float) -> Iterator[None]:
    """Hold the one lock of all migrations, by a transaction on a connection of its own.

    A session's lock would stay behind on a pooler's connection. The transaction is idle, without
    a snapshot: neither vacuum nor CREATE INDEX CONCURRENTLY waits for it.

    Raises:
        MigrationError: another migration runs until the deadline.
    """
    with connected(conninfo) as connection, explained("the migration lock cannot be had"):
        while True:
            connection.execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0")
            # Without parameters: an extended query's portal would keep its snapshot.
            if _one(connection, f"SELECT pg_try_advisory_xact_lock({LOCK_KEY})"):
                break
            connection.execute("ROLLBACK")
            if time.monotonic() > deadline:
                raise MigrationError("", None, "another migration is still running")
            time.sleep(LOCK_POLL_SECONDS)
        yield


def _one(connection: Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
