"""psycopg, waiting on Trio's terms: whole answers of any size, in their time or not at all."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import trio

from bench.faults.proxy import open_proxy
from storage.embedded import EmbeddedPostgres
from storage.postgres.connection import connect
from tests.support.services import Database, temporary_folder


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


@contextmanager
def standby_of(database: Database) -> Iterator[EmbeddedPostgres]:
    """A server that lets everybody in as the database's own does, and refuses every write, as a
    standby or a demoted primary."""
    name, password = database.conninfo["dbname"], database.conninfo["password"]
    with temporary_folder() as folder, EmbeddedPostgres(folder / "pg", durable=False) as server:
        with psycopg.connect(**server.conninfo, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}")
            admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            admin.execute(f"ALTER ROLE {server.user} PASSWORD '{password}'")
        yield server


@contextmanager
def hung_server() -> Iterator[int]:
    """A port that takes connections and never says anything, as behind a dead machine."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


async def test_a_host_that_hangs_takes_no_time_from_the_next(database: Database):
    with hung_server() as hung:
        for ports in (f"{hung},{database.conninfo['port']}", f"{database.conninfo['port']},{hung}"):
            several = {**database.conninfo, "host": "127.0.0.1,127.0.0.1", "port": ports}
            with trio.fail_after(10):
                connection = await connect(several)
            assert connection.pgconn.port == str(database.conninfo["port"]).encode()
            connection.pgconn.finish()


async def test_an_address_of_a_name_that_hangs_takes_no_time_from_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    """The name leads to two machines of one port; nothing listens at the first, nor refuses."""
    port = database.conninfo["port"]
    found = [(*_, (at, port)) for at in ("127.0.0.2", "127.0.0.1") for _ in [(2, 1, 6, "")]]

    async def look_up(*_: object, **__: object) -> Any:
        return found

    monkeypatch.setattr(trio.socket, "getaddrinfo", look_up)
    with socket.create_server(("127.0.0.2", port)), trio.fail_after(10):
        connection = await connect({**database.conninfo, "host": "db.example.com"})
    assert connection.pgconn.hostaddr == b"127.0.0.1"
    connection.pgconn.finish()


async def test_a_host_that_refuses_or_is_unknown_is_passed_over(database: Database):
    hosts = "127.0.0.1,no-such-host.invalid,/nowhere,127.0.0.1"
    ports = f"1,5432,5432,{database.conninfo['port']}"
    with trio.fail_after(30):
        connection = await connect({**database.conninfo, "host": hosts, "port": ports})
    connection.pgconn.finish()


@pytest.mark.parametrize("first", [True, False])
async def test_of_a_standby_and_a_primary_the_primary_is_used(database: Database, first: bool):
    with standby_of(database) as standby:
        ports = [standby.port, database.conninfo["port"]]
        several = {
            **database.conninfo,
            "host": "127.0.0.1,127.0.0.1",
            "port": ",".join(map(str, ports if first else reversed(ports))),
            "target_session_attrs": "read-write",
        }
        for _ in range(3):
            with trio.fail_after(10):
                connection = await connect(several)
            assert connection.pgconn.port == str(database.conninfo["port"]).encode()
            connection.pgconn.finish()
        with pytest.raises(psycopg.OperationalError):
            await connect({**several, "host": "127.0.0.1", "port": standby.port})
        with psycopg.connect(**several, connect_timeout=5) as blocking:  # as the commands do
            assert blocking.info.port == database.conninfo["port"]


async def test_connecting_to_who_says_nothing_can_be_given_up(database: Database):
    host, port = database.conninfo["host"], database.conninfo["port"]
    async with open_proxy(host, port) as proxy:
        proxy.stall()
        with trio.move_on_after(0.2) as scope:
            await connect({**database.conninfo, "port": proxy.port})
        assert scope.cancelled_caught
