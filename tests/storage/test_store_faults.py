"""The store with a dependency that is gone, hangs, is cut, or comes back."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import redis.asyncio
import trio

from bench.faults.proxy import TcpProxy, open_proxy
from storage.contract import Record, StoreUnavailable
from storage.embedded import EmbeddedValkey
from storage.postgres import connection, pool
from storage.postgres.connection import Connection
from storage.postgres.queries import QUERIES
from storage.redis import Keys
from tests.storage.stores import (
    Opened,
    draft,
    insert_messages,
    make_rooms,
    opened_store,
    stored,
)
from tests.support.services import Database

SECONDS = 1.0
"""For one request's storage work, in these tests."""


@pytest.fixture(autouse=True)
async def time_limit():
    with trio.fail_after(60):
        yield


@asynccontextmanager
async def behind_postgres_proxy(
    database: Database, redis_url: str | None = None, **options: Any
) -> AsyncIterator[tuple[TcpProxy, Opened]]:
    async with open_proxy(database.conninfo["host"], database.conninfo["port"]) as proxy:
        conninfo = {**database.conninfo, "port": proxy.port}
        extra = {} if redis_url is None else {"redis_url": redis_url}
        options = {"seconds": SECONDS} | options
        async with opened_store(database, conninfo=conninfo, **extra, **options) as opened:
            yield proxy, opened


@asynccontextmanager
async def behind_redis_proxy(
    database: Database, redis_url: str, **options: Any
) -> AsyncIterator[tuple[TcpProxy, Opened]]:
    parts = urlsplit(redis_url)
    assert parts.hostname and parts.port
    async with open_proxy(parts.hostname, parts.port) as proxy:
        url = redis_url.replace(f":{parts.port}/", f":{proxy.port}/")
        async with opened_store(database, url, **options) as opened:
            yield proxy, opened


async def until(condition: Any, seconds: float = 8) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.02)


async def time_of(call: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    started = trio.current_time()
    try:
        result = await call(*args, **kwargs)
    except Exception as error:
        result = error
    return trio.current_time() - started, result


# PostgreSQL


@pytest.mark.parametrize("warm", [True, False], ids=["open connections", "no connection yet"])
async def test_a_hung_postgresql_costs_a_request_its_time_and_no_more(
    database: Database, warm: bool
):
    (room,) = make_rooms(database)
    async with behind_postgres_proxy(database) as (proxy, (store, delivered)):
        if warm:
            await store.append(draft(room, "first"))
        proxy.stall()
        took, result = await time_of(store.append, draft(room, "a"))
        assert isinstance(result, StoreUnavailable)
        assert took < SECONDS + 0.5
        took, result = await time_of(store.history, room.channel_id, None, head=0)
        assert isinstance(result, StoreUnavailable)
        assert took < SECONDS + 0.5
        assert len(delivered) == warm


async def test_a_postgresql_that_hangs_right_after_connecting_costs_no_more(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    (room,) = make_rooms(database)
    connect = connection.connect
    async with behind_postgres_proxy(database) as (proxy, (store, _)):

        async def connect_and_hang(*args: Any, **kwargs: Any) -> Any:
            connection = await connect(*args, **kwargs)
            proxy.stall()
            return connection

        monkeypatch.setattr(pool, "connect", connect_and_hang)
        started = trio.current_time()
        took, result = await time_of(store.append, draft(room, "a"))
        assert isinstance(result, StoreUnavailable)
        assert took < SECONDS + 0.5
    assert trio.current_time() - started < 2 * SECONDS + 1, "nothing holds up the end either"


async def test_a_login_that_takes_longer_than_a_request_is_waited_for_by_the_next_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    """As when all workers come to a new primary at once."""
    login = connection.connect

    async def log_in_slowly(*args: Any) -> Connection:
        await trio.sleep(1.6 * SECONDS)
        return await login(*args)

    monkeypatch.setattr(pool, "connect", log_in_slowly)
    (room,) = make_rooms(database)
    async with opened_store(database, seconds=SECONDS, connections=3) as (store, _):
        took, result = await time_of(store.append, draft(room, "too early"))
        assert isinstance(result, StoreUnavailable)
        assert took < SECONDS + 0.5
        await until(lambda: store.postgres.up and store._pool.connections)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(store.append, draft(room, str(number)))
        assert store.postgres.up
    assert sorted(text for _, text in stored(database, room.channel_id)) == sorted(
        map(str, range(20))
    )


async def test_who_waits_for_a_login_takes_a_connection_that_another_has_done_with(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    (room,) = make_rooms(database)
    async with opened_store(database, seconds=SECONDS, connections=3) as (store, _):
        await store.append(draft(room, "a"))
        await until(lambda: store.unmet == ())
        had = store._pool.connections

        async def never(*_: Any) -> Connection:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(pool, "connect", never)
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for n in range(30):
                nursery.start_soon(store.pair, n, n)
        assert trio.current_time() - started < SECONDS
        assert store.postgres.up
        assert store._pool.connections == had


async def test_logins_that_come_late_are_no_more_than_allowed(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    """Those that hang, and those that the probes begin meanwhile, are all let go at once."""
    login, go = connection.connect, trio.Event()
    begun = 0

    async def log_in_when_told(*args: Any) -> Connection:
        nonlocal begun
        begun += 1
        await go.wait()
        return await login(*args)

    monkeypatch.setattr(pool, "connect", log_in_when_told)
    async with opened_store(database, seconds=0.3, connections=2) as (store, _):
        await until(lambda: begun > 3)
        go.set()
        await until(lambda: store.postgres.up and store._pool.connections)
        for n in range(20):
            await store.pair(n, n)
            assert 1 <= store._pool.connections <= 2
        count = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'sottovoce' AND datname = current_database()"
        )
        await until(lambda: 1 <= database.execute(count)[0][0] <= 2)


async def test_a_hung_postgresql_opens_its_breaker_and_comes_back(database: Database):
    (room,) = make_rooms(database)
    async with behind_postgres_proxy(database) as (proxy, (store, _)):
        await store.append(draft(room, "a"))
        proxy.stall()
        await until(lambda: not store.postgres.up)
        took, result = await time_of(store.append, draft(room, "b"))
        assert isinstance(result, StoreUnavailable)
        assert took < 0.1, "known to be down: told at once"
        proxy.resume()
        await until(lambda: store.postgres.up)
        record = await store.append(draft(room, "c"))
        assert stored(database, room.channel_id)[-1] == (record.seq, "c")


async def test_a_locked_channel_holds_up_no_other(database: Database):
    rooms = make_rooms(database, 4)
    locked, *others = rooms
    async with opened_store(database, seconds=SECONDS) as (store, _):
        with psycopg.connect(**database.conninfo) as holder:
            holder.execute(
                "SELECT FROM chat_channels WHERE id = %s FOR UPDATE", (locked.channel_id,)
            )
            refused: list[float] = []

            async def wait_for_the_lock(number: int) -> None:
                took, result = await time_of(store.append, draft(locked, f"refused {number}"))
                assert isinstance(result, StoreUnavailable)
                refused.append(took)

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(wait_for_the_lock, number)
                for number in range(8):
                    for room in others:
                        took, result = await time_of(store.append, draft(room, str(number)))
                        assert isinstance(result, Record)
                        assert took < 0.5
            assert all(SECONDS - 0.05 < took < SECONDS + 0.5 for took in refused)
            assert store.postgres.up, "a lock says nothing about the server"
            patient: list[Any] = []

            async def outlast_the_lock() -> None:
                patient.append((await time_of(store.append, draft(locked, "patient")))[1])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(outlast_the_lock)
                await trio.sleep(0.3)
                holder.rollback()
        assert isinstance(patient[0], Record)
        await store.append(draft(locked, "after"))
        await trio.sleep(0.3)
    assert stored(database, locked.channel_id) == [(1, "patient"), (2, "after")]
    for room in others:
        assert [text for _, text in stored(database, room.channel_id)] == [str(n) for n in range(8)]


async def test_what_is_acknowledged_while_connections_are_cut_is_stored_once(database: Database):
    rooms = make_rooms(database, 5)
    acknowledged: dict[str, Record] = {}
    failed = 0
    async with behind_postgres_proxy(database) as (proxy, (store, _)):
        stop = False

        async def send_until_acknowledged(worker: int) -> None:
            nonlocal failed
            number = 0
            while not stop:
                number += 1
                client_id = str(uuid.uuid4())
                while True:
                    try:
                        acknowledged[client_id] = await store.append(
                            draft(rooms[worker % 5], client_id, client_id=client_id)
                        )
                        break
                    except StoreUnavailable:
                        failed += 1
                        await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            for worker in range(15):
                nursery.start_soon(send_until_acknowledged, worker)
            for _ in range(8):
                await trio.sleep(0.12)
                proxy.cut()
                proxy.resume()
            await trio.sleep(0.1)
            proxy.cut()
            await trio.sleep(0.1)  # long enough to be refused
            proxy.resume()
            await until(lambda: store.postgres.up)
            stop = True
    assert failed, "the cuts were felt"
    assert len(acknowledged) > 50
    rows = database.execute("SELECT channel_id, seq, client_message_id::text FROM chat_messages")
    assert {client_id: record.seq for client_id, record in acknowledged.items()} == {
        client_id: seq for _, seq, client_id in rows
    }
    assert len(rows) == len(acknowledged), "none twice"
    for room in rooms:
        seqs = sorted(seq for channel_id, seq, _ in rows if channel_id == room.channel_id)
        assert seqs == list(range(1, len(seqs) + 1))


async def test_after_its_connections_were_ended_the_next_append_works(database: Database):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, _):
        for number in range(1, 4):
            async with trio.open_nursery() as nursery:
                for n in range(5):  # all connections are in use once
                    nursery.start_soon(store.pair, n, n)
            ended = database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            assert ended
            assert (await store.append(draft(room, str(number)))).seq == number
            assert store.postgres.up


async def test_every_connection_ended_at_once_refuses_nobody(database: Database, redis_url: str):
    """As after a restart of PostgreSQL: the idle ones are all dead, and the server is well."""
    rooms = make_rooms(database, 10)
    async with opened_store(database, redis_url, connections=6) as (store, _):
        for number in range(3):
            async with trio.open_nursery() as nursery:
                for n in range(12):  # all connections are in use
                    nursery.start_soon(store.pair, n, n)
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            async with trio.open_nursery() as nursery:
                for n, room in enumerate(rooms):
                    nursery.start_soon(store.pair, n, n)
                    nursery.start_soon(store.append, draft(room, str(number)))
            assert store.postgres.up
    for room in rooms:
        assert stored(database, room.channel_id) == [(1, "0"), (2, "1"), (3, "2")]


async def test_a_connection_that_said_goodbye_is_not_used_again(
    database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    """The driver may not know yet that the server has left: it still calls the connection open."""
    fetch = Connection.fetch
    dead: list[Any] = []

    async def fetch_on_the_living(
        connection: Any, query: bytes, params: Any, *, deadline: float
    ) -> Any:
        if query == QUERIES["append"] and not dead:
            dead.append(connection)
        if connection in dead:
            raise psycopg.errors.AdminShutdown
        return await fetch(connection, query, params, deadline=deadline)

    (room,) = make_rooms(database)
    async with opened_store(database, redis_url, connections=1) as (store, _):
        monkeypatch.setattr(Connection, "fetch", fetch_on_the_living)
        assert (await store.append(draft(room, "x"))).seq == 1
        assert dead
        assert store.postgres.up


async def test_no_more_connections_than_allowed_and_none_left_at_the_end(
    database: Database, redis_url: str
):
    rooms = make_rooms(database, 10)
    count = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'sottovoce' AND datname = current_database()"
    )
    seen: list[int] = []
    async with opened_store(database, redis_url, connections=2) as (store, _):
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(store.pair, number, number)
                nursery.start_soon(store.access, "clerk_tess", rooms[number % 10].channel_id)
                nursery.start_soon(store.append, draft(rooms[number % 10], "x"))
            for _ in range(5):
                seen.append(database.execute(count)[0][0])
                await trio.sleep(0.005)
        seen.append(database.execute(count)[0][0])
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: b"sottovoce" in _client_names(client))
    assert 1 <= max(seen) <= 2
    await until(lambda: database.execute(count) == [(0,)])
    with redis.Redis.from_url(redis_url) as client:
        await until(lambda: b"sottovoce" not in _client_names(client))


def _client_names(client: Any) -> set[bytes]:
    return {each["lib-name"].encode() for each in client.client_list()}


async def test_with_postgresql_gone_proved_history_is_still_read(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    insert_messages(database, room, 20)
    async with behind_postgres_proxy(database, redis_url) as (proxy, (store, _)):
        await store.history(room.channel_id, None, head=20)
        keys = Keys({**database.conninfo, "port": proxy.port})
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: client.zcard(keys.recent(room.channel_id)) == 20)
        proxy.cut()
        page = await store.history(room.channel_id, 5, head=20)
        assert [record.seq for record in page.records] == list(range(6, 21))
        for call in (
            store.history(room.channel_id, 25, head=20),
            store.append(draft(room, "a")),
            store.access("clerk_tess", None),
            store.heads({room.channel_id: 1}),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert caught.value.retry_after > 0
        await until(lambda: not store.postgres.up)


# Redis


async def test_with_redis_absent_from_the_start_everything_works(database: Database):
    (room,) = make_rooms(database)
    async with opened_store(database) as (store, delivered):
        await until(lambda: not store.redis.up)
        started = trio.current_time()
        for number in range(10):
            await store.append(draft(room, str(number)))
        page = await store.history(room.channel_id, None, head=10)
        assert len(page.records) == 10
        assert await store.feed.listening(room.channel_id, seconds=5) is False
        assert trio.current_time() - started < 1
        assert len(delivered) == 10
        assert not store.feed.connected


async def test_a_hung_redis_costs_a_reader_a_second_and_the_next_ones_nothing(
    database: Database, redis_url: str
):
    rooms = make_rooms(database, 4)
    for room in rooms:
        insert_messages(database, room, 5)
    async with behind_redis_proxy(database, redis_url) as (proxy, (store, _)):
        for room in rooms:
            await store.history(room.channel_id, None, head=5)
        await until(lambda: store.feed.connected)
        proxy.stall()
        took, record = await time_of(store.append, draft(rooms[0], "a"))
        assert isinstance(record, Record)
        assert took < 0.3, "a reply never waits for Redis"
        slow = 0
        for room in rooms[1:] * 3:
            took, page = await time_of(store.history, room.channel_id, None, head=5)
            assert [r.seq for r in page.records] == [1, 2, 3, 4, 5]
            assert took < 1.2
            slow += took > 0.3
        assert slow <= 2
        assert not store.redis.up
        proxy.resume()
        await until(lambda: store.redis.up and store.feed.connected)
        for room in rooms:  # and nobody gets an answer that was meant for another
            page = await store.history(room.channel_id, None, head=5)
            assert {r.reply().seq for r in page.records} >= {1, 2, 3, 4, 5}
            assert {r.event.count(b'"channelId":%d,' % room.channel_id) for r in page.records} == {
                1
            }


async def test_a_redis_that_may_only_be_read_is_down(database: Database, folder: Any):
    """Reads go on, so failures never come in a row; writes are what other workers need."""
    (room,) = make_rooms(database)
    with EmbeddedValkey(folder / "valkey", durable=False) as server:
        async with opened_store(database, server.url) as (store, _):
            await store.append(draft(room, "a"))
            with redis.Redis.from_url(server.url) as client:
                key = Keys(database.conninfo).recent(room.channel_id)
                await until(lambda: client.zcard(key) == 1)
                client.config_set("min-replicas-to-write", 1)
                await store.append(draft(room, "b"))
                with trio.fail_after(4):
                    while store.redis.up:
                        await store.history(room.channel_id, None, head=0)
                        await trio.sleep(0.02)
                page = await store.history(room.channel_id, None, head=0)
                assert page.head == 2, "what Redis has is old by now"
                client.config_set("min-replicas-to-write", 0)
                await until(lambda: store.redis.up)


async def test_the_feed_keeps_its_connection_while_nothing_is_said(
    database: Database, redis_url: str
):
    async with behind_redis_proxy(database, redis_url) as (proxy, (store, _)):
        await until(lambda: store.feed.connected)
        store.feed.want(1)
        assert await store.feed.listening(1, seconds=2)
        missed: list[int] = []
        store.on_missed = lambda: missed.append(1)
        await trio.sleep(3.5)
        assert store.feed.connected
        assert missed == []
        assert proxy.accepted <= 3


async def test_the_feed_brings_what_another_worker_stored(database: Database, redis_url: str):
    rooms = make_rooms(database, 2)
    here, elsewhere = rooms
    async with (
        opened_store(database, redis_url) as (one, delivered),
        opened_store(database, redis_url) as (two, _),
    ):
        await until(lambda: one.feed.connected)
        one.feed.want(here.channel_id)
        assert await one.feed.listening(here.channel_id, seconds=2)
        assert not await one.feed.listening(elsewhere.channel_id, seconds=2), "never asked for"
        await two.append(draft(elsewhere, "not for one"))
        records = [await two.append(draft(here, str(n))) for n in range(5)]
        await until(lambda: len(delivered) == 5)
        assert delivered == [(here.channel_id, record) for record in records]
        one.feed.drop(here.channel_id)
        assert not await one.feed.listening(here.channel_id, seconds=0.1)
        await trio.sleep(0.1)
        await two.append(draft(here, "dropped"))
        one.feed.want(here.channel_id)
        assert await one.feed.listening(here.channel_id, seconds=2)
        last = await two.append(draft(here, "again"))
        await until(lambda: len(delivered) >= 6)
        assert delivered[5:] == [(here.channel_id, last)]


async def test_after_a_cut_the_feed_says_that_it_missed_something_and_delivers_again(
    database: Database, redis_url: str
):
    (room,) = make_rooms(database)
    async with (
        behind_redis_proxy(database, redis_url) as (proxy, (one, delivered)),
        opened_store(database, redis_url) as (two, _),
    ):
        connected_at: list[int] = []
        one.on_missed = lambda: connected_at.append(len(delivered))
        one.feed.want(room.channel_id)
        await until(lambda: one.feed.connected)
        assert await one.feed.listening(room.channel_id, seconds=2)
        for round_number in range(1, 3):
            proxy.cut()
            await until(lambda: not one.feed.connected)
            before = len(connected_at)
            await two.append(draft(room, "unheard"))
            proxy.resume()
            await until(lambda: one.feed.connected)
            assert len(connected_at) > before, "whoever listens is told to look"
            assert await one.feed.listening(room.channel_id, seconds=2)
            record = await two.append(draft(room, "heard"))
            await until(lambda n=round_number: len(delivered) == n)
            assert delivered[-1] == (room.channel_id, record)
        await until(lambda: one.redis.up)
        page = await one.history(room.channel_id, None, head=4)
        assert len(page.records) == 4


async def test_a_stalled_feed_is_taken_for_dead(database: Database, redis_url: str):
    async with behind_redis_proxy(database, redis_url) as (proxy, (store, _)):
        await until(lambda: store.feed.connected)
        proxy.stall()
        await until(lambda: not store.feed.connected, 5)
        proxy.resume()
        await until(lambda: store.feed.connected)


async def test_channels_that_nobody_wants_any_more_are_forgotten(
    database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    """A worker lives for weeks: subscriptions and the driver's lists must not grow with it."""
    made: list[Any] = []
    pubsub = redis.asyncio.Redis.pubsub

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(pubsub(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(redis.asyncio.Redis, "pubsub", remember)
    async with opened_store(database, redis_url) as (store, _):
        await until(lambda: store.feed.connected)
        for channel_id in range(1, 301):
            store.feed.want(channel_id)
        assert await store.feed.listening(300, seconds=2)
        for channel_id in range(1, 300):
            store.feed.drop(channel_id)
        assert len(store.feed._wanted) == 1
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: len(client.pubsub_channels()) == 2, 2)  # the control's, and one
        (driver,) = made
        assert not driver.channels
        assert not driver.pending_unsubscribe_channels
