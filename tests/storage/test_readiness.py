"""A store is ready where a request could succeed, and says by name why it could not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import structlog.testing
import trio

from storage.store import Store
from tests.storage.stores import opened_store
from tests.support.services import Database


async def until(store: Store, condition: Callable[[Sequence[str]], Any]) -> None:
    with trio.fail_after(30):
        while not condition(store.unready):
            await trio.sleep(0.02)


DAMAGES = {
    "not migrated": ("DELETE FROM chat_migrations WHERE number = 4", None, "sottovoce migrate"),
    "migrated by a newer version": (
        "INSERT INTO chat_migrations (number, name) VALUES (9000, '9000_future')",
        "DELETE FROM chat_migrations WHERE number = 9000",
        "migrated by a newer version (migration 9000)",
    ),
    "a column is missing": (
        "ALTER TABLE users RENAME is_active TO was_active",
        "ALTER TABLE users RENAME was_active TO is_active",
        "users.is_active",
    ),
    "the epoch is gone": (
        "CREATE TABLE kept AS TABLE chat_epoch; DELETE FROM chat_epoch",
        "INSERT INTO chat_epoch SELECT * FROM kept",
        "chat_epoch has no row",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_keeps_requests_from_succeeding_is_named_and_its_repair_is_noticed(
    database: Database, damage: str
):
    broken, repair, name = DAMAGES[damage]
    database.execute(broken)
    with structlog.testing.capture_logs() as logs:
        async with opened_store(database) as (store, _):
            assert store.unready, "until PostgreSQL was asked nobody knows"
            await until(store, lambda unready: any(name in reason for reason in unready))
            assert store.postgres.up, "it answers; something else is wrong"
            if repair is not None:
                database.execute(repair)
                await until(store, lambda unready: unready == ())
    said = [line for line in logs if line["event"] == "requirements_unmet"]
    assert len(said) == 1 and name in str(said)
    assert not [line for line in logs if line["event"] == "statement_failed"]


async def test_a_database_that_was_never_migrated_is_named_and_answers(empty_database: Database):
    async with opened_store(empty_database) as (store, _):
        await until(store, lambda unready: "sottovoce migrate" in str(unready))
        assert store.postgres.up


async def test_why_the_database_cannot_be_reached_is_the_reason(database: Database):
    conninfo = database.conninfo | {"password": "canary"}
    async with opened_store(database, conninfo=conninfo) as (store, _):
        await until(store, lambda unready: "the password is refused" in str(unready))
        assert "canary" not in str(store.unready)


async def test_a_role_without_rights_is_not_ready_and_is_once_it_has_them(database: Database):
    role = f"role_{database.conninfo['dbname']}"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    try:
        conninfo = database.conninfo | {"user": role, "password": "x"}
        async with opened_store(database, conninfo=conninfo) as (store, _):
            await until(store, lambda unready: store.unmet)
            assert store.postgres.up
            database.execute(f"ALTER ROLE {role} SUPERUSER")
            await until(store, lambda unready: unready == ())
    finally:
        database.execute(f"DROP ROLE {role}")
