"""psycopg, waiting on Trio's terms: whole answers of any size, in their time or not at all."""

from typing import Any

import psycopg
import pytest
import trio

from bench.faults.proxy import open_proxy
from storage.postgres.connection import connect
from tests.support.services import Database


def soon(seconds: float = 10) -> float:
    return trio.current_time() + seconds


async def test_a_statement_and_an_answer_of_megabytes_are_whole(database: Database):
    """More than any socket's buffer, so both directions have to wait."""
    text = "ü-0123456789" * 1_000_000
    connection = await connect(database.conninfo)
    try:
        for _ in range(2):
            rows = await connection.fetch(b"SELECT %s::text, %s", (text, 7), deadline=soon(20))
            assert rows == [(text, 7)]
    finally:
        connection.pgconn.finish()


async def test_others_go_on_while_a_statement_runs(database: Database):
    connection = await connect(database.conninfo)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.sleep(0.01)
            turns += 1

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            await connection.fetch(b"SELECT pg_sleep(0.3)", (), deadline=soon())
            nursery.cancel_scope.cancel()
    finally:
        connection.pgconn.finish()
    assert turns > 10


async def test_a_statement_ends_at_its_deadline_though_the_server_goes_on(database: Database):
    connection = await connect(database.conninfo)
    try:
        started = trio.current_time()
        with pytest.raises(psycopg.OperationalError):
            await connection.fetch(b"SELECT pg_sleep(20)", (), deadline=started + 0.2)
        assert trio.current_time() - started < 1
        assert connection.closed
    finally:
        connection.pgconn.finish()


async def test_a_refused_statement_leaves_the_connection_good(database: Database):
    connection = await connect(database.conninfo)
    try:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.fetch(b"SELECT 1 / %s", (0,), deadline=soon())
        assert await connection.fetch(b"SELECT 1 / %(x)s", {"x": 1}, deadline=soon()) == [(1,)]
    finally:
        connection.pgconn.finish()


async def test_a_name_is_looked_up(database: Database):
    connection = await connect({**database.conninfo, "host": "localhost"})
    connection.pgconn.finish()


@pytest.mark.parametrize(
    "change",
    [{"host": "no-such-host.invalid"}, {"port": 1}, {"password": "wrong"}, {"dbname": "nowhere"}],
)
async def test_who_is_not_let_in_is_told(database: Database, change: dict[str, Any]):
    with trio.fail_after(10), pytest.raises(psycopg.Error):
        await connect({**database.conninfo, **change})


async def test_connecting_to_who_says_nothing_can_be_given_up(database: Database):
    host, port = database.conninfo["host"], database.conninfo["port"]
    async with open_proxy(host, port) as proxy:
        proxy.stall()
        with trio.move_on_after(0.2) as scope:
            await connect({**database.conninfo, "port": proxy.port})
        assert scope.cancelled_caught
