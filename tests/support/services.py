"""Databases for tests: each test has its own, copied from one that is migrated."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from storage.embedded import EmbeddedPostgres
from storage.postgres.migrate import migrate

TEMPLATE = "sottovoce_template"

_numbers = itertools.count(1)


class Database(NamedTuple):
    """One test's own database."""

    conninfo: dict[str, Any]
    """libpq's keywords, as `Settings.database_conninfo` has them."""
    url: str

    def execute(self, query: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own, on a connection of its own.

        Returns:
            The rows; none for a statement that has none.
        """
        # Without parameters a % is a %, and the text may hold several statements.
        arguments = parameters or None
        with psycopg.connect(**self.conninfo, autocommit=True) as connection:
            cursor = connection.execute(query, arguments)
            return cursor.fetchall() if cursor.description else []

    def __repr__(self) -> str:
        return f"<Database {self.conninfo['dbname']}>"


def database_named(postgres: EmbeddedPostgres, name: str) -> Database:
    url = postgres.url.replace(f"/{postgres.database}?", f"/{name}?")
    return Database({**postgres.conninfo, "dbname": name}, url)


@contextmanager
def fresh_database(postgres: EmbeddedPostgres, template: str = "template0") -> Iterator[Database]:
    """A copy of `template`, dropped at the end whoever is still connected to it."""
    name = f"test_{next(_numbers)}"
    admin = database_named(postgres, "postgres")
    admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield database_named(postgres, name)
    finally:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def make_template(postgres: EmbeddedPostgres) -> str:
    """A migrated database to copy from; its name."""
    database_named(postgres, "postgres").execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
    migrate(database_named(postgres, TEMPLATE).conninfo)
    return TEMPLATE


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Not pytest's: it sets that one's mode back, and PostgreSQL's system user must pass."""
    folder = Path(tempfile.mkdtemp(prefix="sottovoce-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
