"""What is needed of the database is named by table and column, before and while it is used."""

from collections.abc import Callable

import psycopg
import pytest
import trio

from storage.contract import StoreUnavailable
from storage.postgres.catalog import Catalog
from storage.postgres.functions import outdated
from storage.postgres.migrate import (
    MigrationError,
    applied,
    migrate,
    migrations,
    plan,
    read_catalog,
)
from storage.postgres.pool import StatementFailed
from storage.postgres.requirements import unmet_by_server
from tests.storage.stores import draft, make_rooms, opened_store
from tests.storage.test_migrations import BIGINT, old_deployment
from tests.support.services import Database

KNOWN = [migration.number for migration in migrations()]


def catalog_of(database: Database, **role: str) -> Catalog:
    with psycopg.connect(**{**database.conninfo, **role}, autocommit=True) as connection:
        return read_catalog(connection)


def unmet(database: Database, **role: str) -> list[str]:
    with psycopg.connect(**{**database.conninfo, **role}, autocommit=True) as connection:
        catalog = read_catalog(connection)
        return unmet_by_server(catalog, applied=applied(connection, catalog), known=KNOWN)


NO_DEFAULT = "is not null and has no default: give it a default, or the chat cannot insert a row"
TIMES = "timestamp without time zone or timestamp with time zone"
UNFIT = {
    "ALTER TABLE users DROP is_active": ["users.is_active is missing"],
    "ALTER TABLE users DROP clerk_id, DROP email": [
        "users.clerk_id is missing",
        "users.email is missing",
    ],
    "ALTER TABLE users ALTER is_active DROP DEFAULT, ALTER is_active TYPE text": [
        "users.is_active is text: it must be boolean"
    ],
    "DROP TABLE therapists CASCADE": ["table therapists is missing"],
    "ALTER TABLE chat_messages DROP created_at": ["chat_messages.created_at is missing"],
    "ALTER TABLE chat_messages ALTER created_at TYPE text": [
        f"chat_messages.created_at is text: it must be {TIMES}"
    ],
    "ALTER TABLE chat_messages ADD tenant_id integer NOT NULL": [
        f"chat_messages.tenant_id {NO_DEFAULT}"
    ],
    "ALTER TABLE chat_channels RENAME channel_identifier TO name": [
        "chat_channels has no channel_identifier and no chime_channel_arn",
        f"chat_channels.name {NO_DEFAULT}",
    ],
    "ALTER TABLE chat_messages ALTER content TYPE varchar(500)": [
        "chat_messages.content holds 500 characters: it must hold 8000"
    ],
    "CREATE TYPE mood AS ENUM ('good'); ALTER TABLE chat_messages ADD status mood": [
        "chat_messages.status is an enum without sent: add the label"
    ],
}


@pytest.mark.parametrize(("change", "findings"), UNFIT.items(), ids=UNFIT)
def test_what_does_not_fit_is_named_by_table_and_column_before_anything_is_changed(
    empty_database: Database, change: str, findings: list[str]
):
    old_deployment(empty_database, BIGINT)
    empty_database.execute(change)
    with pytest.raises(MigrationError) as caught:
        migrate(empty_database.conninfo)
    assert list(caught.value.findings) == findings
    assert empty_database.execute("SELECT to_regclass('chat_migrations')") == [(None,)]


def test_a_database_of_another_encoding_is_refused(postgres, empty_database: Database):
    empty_database.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        latin = {**empty_database.conninfo, "dbname": "latin"}
        with pytest.raises(MigrationError, match="encoded in LATIN1: it must be UTF8"):
            migrate(latin)
    finally:
        empty_database.execute("DROP DATABASE latin WITH (FORCE)")


LOST = {
    "DELETE FROM chat_migrations WHERE number = 5": "1 migrations are missing",
    "INSERT INTO chat_migrations VALUES (99, 'later')": "migrated by a newer version",
    "DROP FUNCTION chat_history": "function chat_history is missing",
    "DROP FUNCTION chat_append": "function chat_append is missing",
    "ALTER TABLE chat_messages DROP is_adopted CASCADE": "chat_messages.is_adopted is missing",
    "ALTER TABLE chat_channels DROP last_seq CASCADE": "chat_channels.last_seq is missing",
    "ALTER TABLE users DROP subscription_status": "users.subscription_status is missing",
    "ALTER TABLE chat_messages ADD theirs text NOT NULL": "chat_messages.theirs is not null",
    "DROP TABLE chat_tickets": "chat_tickets is missing",
}


@pytest.mark.parametrize(("change", "finding"), LOST.items(), ids=LOST)
def test_what_was_lost_since_the_migration_is_named(database: Database, change: str, finding: str):
    assert unmet(database) == []
    database.execute(change)
    assert any(finding in line for line in unmet(database)), unmet(database)


def test_a_role_that_lacks_rights_is_told_which(database: Database):
    database.execute("CREATE ROLE weak LOGIN PASSWORD 'only-a-test'")
    try:
        database.execute("""
            GRANT SELECT ON ALL TABLES IN SCHEMA public TO weak;
            REVOKE SELECT ON users FROM weak;
            GRANT SELECT (id, clerk_id, email, first_name, last_name, is_active) ON users TO weak;
            GRANT INSERT ON chat_audit, chat_tickets, chat_messages TO weak;
        """)
        found = unmet(database, user="weak", password="only-a-test")
        assert "no right to read users.subscription_status: run sottovoce grants" in found
        assert "no right to update, delete in chat_tickets: run sottovoce grants" in found
        assert "no right to update chat_channels.last_seq: run sottovoce grants" in found
        assert not any("chat_audit" in line for line in found)
    finally:
        database.execute("DROP OWNED BY weak; DROP ROLE weak")


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.02)


async def test_a_worker_knows_when_requests_cannot_succeed_and_when_they_can_again(
    database: Database,
):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, _):
        assert store.unmet is None
        await until(lambda: store.unmet == ())
        # Nothing that a catalog tells: only a real statement meets it.
        database.execute("ALTER FUNCTION chat_people RENAME TO kept")
        database.execute("""
            CREATE FUNCTION chat_people(a text, b bigint) RETURNS TABLE (user_id bigint)
            LANGUAGE sql STABLE AS 'SELECT 1::bigint'
        """)
        with pytest.raises(StatementFailed, match="access"):
            await store.access("clerk_tess", room.channel_id)
        await until(lambda: store.unmet)
        assert store.unmet is not None
        assert store.unmet[0].startswith("statement access is refused (SQLSTATE 42703)")
        database.execute("DROP FUNCTION chat_people; ALTER FUNCTION kept RENAME TO chat_people")
        await until(lambda: store.unmet == ())
        assert (await store.append(draft(room, "a"))).seq == 1


async def test_a_database_that_was_never_migrated_is_named_and_recovers(empty_database: Database):
    async with opened_store(empty_database) as (store, _):
        with pytest.raises(StoreUnavailable):
            await store.access("clerk_tess", None)
        migrate(empty_database.conninfo)
        await until(lambda: store.unmet == ())


def test_a_deployments_own_chat_people_is_kept_and_its_tables_are_its_own_matter(
    empty_database: Database,
):
    old_deployment(empty_database)
    migrate(empty_database.conninfo)
    # One name column, and a subscription that lives in another table.
    empty_database.execute("""
        ALTER TABLE users DROP first_name, DROP last_name, DROP subscription_status, ADD name text;
        CREATE TABLE subscriptions (user_id integer, state text);
    """)
    assert "users.first_name is missing" in unmet(empty_database)
    empty_database.execute("""
        CREATE OR REPLACE FUNCTION chat_people(of_clerk_id text, of_user_id bigint)
        RETURNS TABLE (
            user_id bigint, clerk_id text, email text, first_name text, last_name text,
            is_active boolean, therapist_ids bigint[], therapist_name text, therapist_title text,
            subscription_status text, sponsored boolean
        )
        LANGUAGE sql STABLE ROWS 1 AS $$
            SELECT u.id::bigint, u.clerk_id::text, u.email::text, u.name::text, ''::text,
                   u.is_active, ARRAY(SELECT t.id::bigint FROM therapists t WHERE t.user_id = u.id),
                   u.name::text, NULL::text,
                   coalesce((SELECT s.state FROM subscriptions s WHERE s.user_id = u.id), ''),
                   false
            FROM users u WHERE u.clerk_id = of_clerk_id OR u.id = of_user_id
        $$;
    """)
    assert unmet(empty_database) == []
    assert migrate(empty_database.conninfo) == []
    assert [function.name for function in outdated(catalog_of(empty_database))] == []


def test_a_database_of_the_first_version_is_brought_to_this_one(empty_database: Database):
    """Its functions too: one that had been edited in place would have stayed for ever."""
    for migration in migrations()[:5]:
        empty_database.execute(migration.sql)
    empty_database.execute("""
        CREATE TABLE chat_migrations (number integer PRIMARY KEY, name text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT clock_timestamp());
        INSERT INTO chat_migrations (number, name) SELECT n, '' FROM generate_series(1, 5) AS n;
    """)
    rooms = make_rooms(empty_database)
    empty_database.execute(
        "INSERT INTO chat_messages (channel_id, seq, message_id, author_name, author_email,"
        " content) VALUES (%s, 1, gen_random_uuid(), 'Pat Smith', 'p@example.com', 'old')",
        (rooms[0].channel_id,),
    )
    names = [step.name for step in plan(empty_database.conninfo)]
    assert migrate(empty_database.conninfo) == names
    assert {"chat_columns", "function_chat_append", "function_chat_history"} <= set(names)
    assert "old_messages" not in names
    assert unmet(empty_database) == []
    assert migrate(empty_database.conninfo) == []
