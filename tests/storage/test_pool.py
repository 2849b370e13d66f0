"""The pool's connections: what becomes of one that is outdated, and of one that is old."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import trio

from bench.faults.proxy import open_proxy
from storage.contract import StoreUnavailable
from storage.postgres import pool
from storage.postgres.pool import StatementFailed
from storage.postgres.queries import QUERIES
from storage.store import Store
from tests.storage.stores import draft, make_rooms, opened_store, stored
from tests.support.services import Database

SETTINGS = (
    "timezone",
    "lock_timeout",
    "statement_timeout",
    "enable_seqscan",
    "enable_hashjoin",
    "enable_mergejoin",
    "jit",
)

DEALLOCATE = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
"""psycopg does not see that the statements that it has prepared are gone."""


@pytest.fixture(autouse=True)
async def time_limit():
    with trio.fail_after(90):
        yield


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Teach the pool another statement, under a name."""

    def add(name: str, sql: str) -> None:
        monkeypatch.setitem(QUERIES, name, sql.encode())

    return add


async def fetch_together(store: Store, name: str, count: int, params: Any = ()) -> list[Any]:
    """Run a statement so often at once; the rows or the error of each."""
    results: list[Any] = []

    async def fetch() -> None:
        try:
            results.append(await store._pool.fetch(name, params))
        except Exception as error:
            results.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(fetch)
    return results


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.02)


async def pids(store: Store) -> set[int]:
    """The sessions that a burst of statements runs in."""
    return {rows[0][0] for rows in await fetch_together(store, "pid", 30)}


# Outdated sessions


async def test_an_alter_table_of_somebody_else_fails_no_statement(
    database: Database, statements: Callable[[str, str], None]
):
    """PostgreSQL refuses a prepared statement whose result has another type than it had."""
    make_rooms(database, 3)
    statements("emails", "SELECT email, id FROM users ORDER BY id")
    async with opened_store(database, connections=4) as (store, _):
        for kind in ("varchar(320)", "text", "varchar(255)"):
            for _ in range(10):  # psycopg prepares what it has run five times
                await fetch_together(store, "emails", 8)
            database.execute(f"ALTER TABLE users ALTER email TYPE {kind}")
            results = await fetch_together(store, "emails", 40)
            assert all(isinstance(rows, list) and len(rows) == 4 for rows in results), results
        assert store.postgres.up


async def test_alter_tables_under_load_fail_no_send_and_no_look_up(database: Database):
    rooms = make_rooms(database, 5)
    changes = (
        "ALTER TABLE users ALTER email TYPE varchar(320)",
        "ALTER TABLE users ALTER first_name TYPE varchar(100)",
        "ALTER TABLE therapists ALTER name TYPE varchar(255)",
        "ALTER TABLE therapists ALTER title TYPE varchar(255)",
        "ALTER TABLE chat_channels ALTER status TYPE varchar(20)",
        "ALTER TABLE chat_channels ALTER channel_identifier TYPE varchar(500)",
        "ALTER TABLE chat_messages ALTER author_name TYPE varchar(255)",
        "ALTER TABLE users ALTER employer_id TYPE integer",
        "ALTER TABLE users ALTER employer_id TYPE bigint",
    )
    sent = 0
    done = False
    async with opened_store(database, connections=4, seconds=10.0) as (store, _):

        async def send(number: int) -> None:
            nonlocal sent
            while not done:
                await store.append(draft(rooms[number], "a"))
                sent += 1

        async def look_up(number: int) -> None:
            while not done:
                room = rooms[number]
                access = await store.access(room.prospect.clerk_id, room.channel_id)
                assert access.channel is not None
                await store.channels_of(room.prospect.id, as_prospect=True)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(send, number)
                nursery.start_soon(look_up, number)
            for change in changes:
                before = sent
                await until(lambda before=before: sent > before + 40)  # type: ignore[misc]
                await trio.to_thread.run_sync(database.execute, change)
            before = sent
            await until(lambda: sent > before + 40)
            done = True
    assert sum(len(stored(database, room.channel_id)) for room in rooms) == sent


async def test_statements_that_were_deallocated_are_prepared_again(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("deallocate", DEALLOCATE)
    async with opened_store(database, connections=2) as (store, _):
        for number in range(3):
            for _ in range(8):
                await store.append(draft(room, "a"))
            with pytest.raises(StatementFailed):  # it has run, and has no rows
                await store._pool.fetch("deallocate")
            assert (await store.append(draft(room, "b"))).seq == (number + 1) * 9


async def test_a_statement_that_another_has_prepared_is_run_all_the_same(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("prepare", "DO $$ BEGIN EXECUTE 'PREPARE _pg3_0 AS SELECT 1'; END $$")
    async with opened_store(database, connections=2) as (store, _):
        with pytest.raises(StatementFailed):  # it has run, and has no rows
            await store._pool.fetch("prepare")
        for number in range(1, 20):
            assert (await store.append(draft(room, "a"))).seq == number


async def test_a_connection_to_a_demoted_primary_is_left(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("demote", "SELECT set_config('default_transaction_read_only', 'on', false)")
    statements("pid", "SELECT pg_backend_pid()")
    async with opened_store(database, connections=3) as (store, _):
        for number in range(1, 4):
            old = await pids(store)
            for _ in range(3 * len(old)):
                await fetch_together(store, "demote", 3)
            assert (await store.append(draft(room, "a"))).seq == number
            assert store.postgres.up


async def test_a_server_that_is_read_only_is_unavailable_until_it_is_not(database: Database):
    (room,) = make_rooms(database)
    conninfo = {**database.conninfo, "target_session_attrs": "read-write"}
    name = database.conninfo["dbname"]
    writable = {**database.conninfo, "options": "-c default_transaction_read_only=off"}
    async with opened_store(database, conninfo=conninfo, connections=2) as (store, _):
        await store.append(draft(room, "a"))
        database.execute(
            f"ALTER DATABASE {name} SET default_transaction_read_only = on;"
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises(StoreUnavailable):
            await store.append(draft(room, "b"))
        with psycopg.connect(**writable, autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await until(lambda: store.postgres.up)
        assert (await store.append(draft(room, "c"))).seq == 2


async def test_a_parameter_that_cannot_be_sent_costs_no_connection(
    database: Database, statements: Callable[[str, str], None]
):
    statements("echo", "SELECT %s::text, pg_backend_pid()")
    async with opened_store(database, connections=1) as (store, _):
        ((_, before),) = await store._pool.fetch("echo", ("a",))
        with pytest.raises(StatementFailed):
            await store._pool.fetch("echo", ("a\x00b",))
        ((_, after),) = await store._pool.fetch("echo", ("a",))
    assert after == before


async def test_a_statement_that_fails_alike_on_a_new_connection_is_at_fault_itself(
    database: Database, statements: Callable[[str, str], None]
):
    statements("refused", "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '0A000'; END $$")
    async with opened_store(database, connections=2) as (store, _):
        with pytest.raises(StatementFailed) as failed:
            await store._pool.fetch("refused")
        assert failed.value.sqlstate == "0A000"
        assert store.postgres.up


async def test_a_session_that_is_left_in_a_transaction_is_not_used_again(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("begin", "BEGIN")
    async with opened_store(database, connections=2) as (store, _):
        with pytest.raises(StatementFailed):  # it has run, and has no rows
            await store._pool.fetch("begin")
        await store.append(draft(room, "a"))
    assert stored(database, room.channel_id) == [(1, "a")]


async def test_a_refused_connection_stops_nobody_while_others_serve(database: Database):
    """As where a role's connections are used up: those that are there go on serving."""
    rooms = make_rooms(database, 6)
    async with opened_store(database, connections=6) as (store, _):
        await store.append(draft(rooms[0], "a"))
        admin = {**database.conninfo, "dbname": "postgres"}
        allow = f"ALTER DATABASE {database.conninfo['dbname']} ALLOW_CONNECTIONS"
        with psycopg.connect(**admin, autocommit=True) as connection:
            connection.execute(f"{allow} false")
            try:
                await fetch_together(store, "ping", 30)
                assert store.postgres.up
                assert (await store.append(draft(rooms[0], "b"))).seq == 2
            finally:
                connection.execute(f"{allow} true")


# Age


async def test_a_connection_is_replaced_at_its_age_and_no_statement_notices(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("pid", "SELECT pg_backend_pid()")
    async with opened_store(database, connections=3, connection_seconds=0.5) as (store, _):
        first = await pids(store)
        while await pids(store) & first:
            await store.append(draft(room, "a"))
            assert 1 <= store._pool.connections <= 4
        assert store.postgres.up


async def test_connections_that_are_not_needed_any_more_are_closed_at_their_age(
    database: Database, statements: Callable[[str, str], None]
):
    statements("slow", "SELECT pg_sleep(0.3)")
    async with opened_store(database, connections=6, connection_seconds=0.5) as (store, _):
        await fetch_together(store, "slow", 6)
        assert store._pool.connections == 6
        await until(lambda: store._pool.connections == 1)
        await store._pool.fetch("ping")


async def test_an_old_connection_serves_until_its_successor_is_there(
    database: Database, statements: Callable[[str, str], None]
):
    statements("pid", "SELECT pg_backend_pid()")
    (room,) = make_rooms(database)
    async with open_proxy(database.conninfo["host"], database.conninfo["port"]) as proxy:
        conninfo = {**database.conninfo, "port": proxy.port}
        async with opened_store(
            database, conninfo=conninfo, connections=1, connection_seconds=0.2
        ) as (store, _):
            ((pid,),) = await store._pool.fetch("pid")
            store._pool._conninfo = {**conninfo, "port": 1}  # nobody listens there
            with trio.move_on_after(5):
                while True:
                    assert await store._pool.fetch("pid") == [(pid,)]
                    assert await store._pool.probe()
                    await trio.sleep(0.05)
            (connection,) = store._pool._current
            assert connection.renew_at > trio.current_time(), "the next try comes later"
            await store.append(draft(room, "a"))


# Behind a pooler


async def test_behind_a_pooler_settings_come_with_each_statement_and_none_stays(
    database: Database,
    statements: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
):
    """A pooler's own process ids are not PostgreSQL's. See tests/deployment for a real one."""
    monkeypatch.setattr(pool, "_SESSION", pool._SESSION.replace("{pid}", "-1 * {pid}"))
    shown = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    statements("settings", f"SELECT {shown}")
    statements("session", f"SET LOCAL work_mem = '1MB'; SELECT {shown}")
    statements("prepared", "SELECT count(*) FROM pg_prepared_statements")
    (room,) = make_rooms(database)
    untouched = database.execute(f"SELECT {shown}")
    async with opened_store(database, connections=1, seconds=2.0) as (store, _):
        for number in range(1, 12):
            assert (await store.append(draft(room, "a"))).seq == number
        (within,) = await store._pool.fetch("settings")
        assert within == ("UTC", "1s", "2s", "off", "off", "off", "off")
        (connection,) = store._pool._current
        connection.preamble = None
        outside = await connection.fetch(QUERIES["settings"], (), deadline=trio.current_time() + 5)
        assert outside == untouched
        assert await store._pool.fetch("prepared") == [(0,)]


async def test_behind_a_pooler_a_slow_statement_ends_in_its_time_and_a_refused_one_alone(
    database: Database,
    statements: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(pool, "_SESSION", pool._SESSION.replace("{pid}", "-1 * {pid}"))
    statements("slow", "SELECT pg_sleep(20)")
    statements("refused", "SELECT 1 / %s")
    statements("pid", "SELECT pg_backend_pid()")
    async with opened_store(database, connections=2, seconds=1.0) as (store, _):
        ((pid,),) = await store._pool.fetch("pid")
        with pytest.raises(StatementFailed) as failed:
            await store._pool.fetch("refused", (0,))
        assert failed.value.sqlstate == "22012"
        assert await store._pool.fetch("refused", (1,)) == [(1,)]
        assert await store._pool.fetch("pid") == [(pid,)]
        started = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await store._pool.fetch("slow")
        assert trio.current_time() - started < 10
        assert await store._pool.fetch("refused", (1,)) == [(1,)]


async def test_a_pooler_that_shows_itself_late_is_known_from_then_on(
    database: Database, statements: Callable[[str, str], None]
):
    (room,) = make_rooms(database)
    statements("deallocate", DEALLOCATE)
    async with opened_store(database, connections=2) as (store, _):
        for _ in range(8):
            await store.append(draft(room, "a"))
        with pytest.raises(StatementFailed):  # it has run, and has no rows
            await store._pool.fetch("deallocate")
        await store.append(draft(room, "a"))
        (connection,) = store._pool._current
        assert connection.preamble is not None
