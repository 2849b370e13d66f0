"""Redis Cluster, a real one of three nodes: who is asked, and what a lost node or slot does."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import redis
import trio
from redis.crc import key_slot
from structlog.testing import capture_logs

from protocol.confidential import Secret
from storage.contract import Eviction, Record
from storage.metrics import HISTORY_READS
from storage.redis import Keys
from storage.redis.evictions import publish_eviction
from storage.redis.url import connected
from storage.store import REDIS_SECONDS
from tests.storage.clusters import SECONDS, Cluster, running_cluster
from tests.storage.stores import Opened, Room, draft, make_rooms, opened_store
from tests.support.chat import eventually
from tests.support.services import Database, temporary_folder

CANDIDATES = 30
"""Channels, of which each node has some."""


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with temporary_folder() as folder, running_cluster(folder) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """Well, before and after."""
    yield running
    for node in running.nodes:
        if node.running:
            os.kill(node.pid, signal.SIGCONT)
        else:
            node.stop()
            node.start()
    eventually(running.is_well, seconds=SECONDS)


@pytest.fixture
def rooms(cluster: Cluster, database: Database) -> list[Room]:
    """One on each node."""
    made = {room.channel_id: room for room in make_rooms(database, CANDIDATES)}
    return [made[channel_id] for channel_id in cluster.channels(database, list(made))]


async def until(look: Callable[[], Any], seconds: float = SECONDS) -> None:
    with trio.fail_after(seconds):
        while not look():
            await trio.sleep(0.02)


@asynccontextmanager
async def two_stores(
    database: Database, cluster: Cluster, rooms: list[Room]
) -> AsyncIterator[tuple[Opened, Opened]]:
    """Of which the second one listens to all rooms."""
    async with (
        opened_store(database, cluster.url) as one,
        opened_store(database, cluster.url) as two,
    ):
        for each in (one, two):
            await until(lambda: each.store.feed.connected)  # noqa: B023
        for room in rooms:
            two.store.feed.want(room.channel_id)
            assert await two.store.feed.listening(room.channel_id, seconds=5)
        yield one, two


async def said(one: Opened, two: Opened, room: Room, text: str) -> Record:
    """Say it at one, and wait until the other one has heard it."""
    record = await one.store.append(draft(room, text))
    await until(lambda: (room.channel_id, record) in two.delivered, 2)
    return record


def from_redis() -> float:
    return float(HISTORY_READS.labels("redis")._value.get())


async def test_messages_are_kept_on_the_nodes_of_their_channels(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    keys = Keys(database.conninfo)
    async with opened_store(database, cluster.url) as (store, _):
        await until(lambda: store.feed.connected)
        records = [await store.append(draft(room, "kept")) for room in rooms]
        for number, room in enumerate(rooms):
            key = keys.recent(room.channel_id).decode()
            await until(lambda: cluster.ask(number, "EXISTS", key))  # noqa: B023
        before = from_redis()
        pages: list[Any] = []

        async def read(room: Room, record: Record) -> None:
            page = await store.history(room.channel_id, None, head=record.seq)
            assert page.records == [record]
            pages.append(page)

        async with trio.open_nursery() as nursery:  # in one batch
            for room, record in zip(rooms, records, strict=True):
                nursery.start_soon(read, room, record)
        assert (len(pages), from_redis() - before) == (3, 3)


async def test_two_stores_hear_each_other_on_every_node(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    async with two_stores(database, cluster, rooms) as (one, two):
        for room in rooms:
            await said(one, two, room, "live")
            two.store.feed.drop(room.channel_id)
            two.store.feed.want(room.channel_id)
            assert await two.store.feed.listening(room.channel_id, seconds=5)
            await said(one, two, room, "again")


async def test_every_store_hears_of_an_eviction(cluster: Cluster, database: Database):
    heard: list[Any] = []
    async with two_stores(database, cluster, []) as (one, two):
        for each in (one, two):
            each.store.on_evicted = heard.extend
        keys = Keys(database.conninfo)
        sent = Eviction(user_id=7)
        count = await trio.to_thread.run_sync(publish_eviction, Secret(cluster.url), keys, sent)
        assert count == 2
        await until(lambda: heard == [sent, sent], 5)


async def test_a_node_that_was_killed_takes_its_channels_along_and_no_other(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    lost, *others = rooms
    async with two_stores(database, cluster, rooms) as (one, two):
        first = await said(one, two, lost, "before")
        missed: list[bool] = []
        two.store.on_missed = lambda: missed.append(two.store.feed.connected)
        os.kill(cluster.nodes[0].pid, signal.SIGKILL)
        await until(lambda: not two.store.feed.connected and missed)
        assert two.store.redis.suspect, "messages are looked for often"
        during = await one.store.append(draft(lost, "meanwhile"))
        await until(lambda: not (one.store.redis.up or two.store.redis.up))
        for number in range(5):
            for room in others:
                await said(one, two, room, f"on {number}")
            await trio.sleep(0.1)
        page = await two.store.history(lost.channel_id, first.seq, head=during.seq)
        assert page.records == [during]
        assert await two.store.heads({lost.channel_id: first.seq}) == {lost.channel_id: during.seq}
        assert not await two.store.feed.listening(lost.channel_id, seconds=5)

        missed.clear()
        cluster.nodes[0].stop()
        await trio.to_thread.run_sync(cluster.nodes[0].start)
        await until(lambda: one.store.redis.up and two.store.redis.up)
        await until(lambda: two.store.feed.connected and True in missed)
        assert await two.store.feed.listening(lost.channel_id, seconds=5)
        await said(one, two, lost, "after")


async def test_a_node_that_hangs_holds_nobody_up(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    lost, *others = rooms
    async with two_stores(database, cluster, rooms) as (one, two):
        os.kill(cluster.nodes[0].pid, signal.SIGSTOP)
        slowest = 0.0
        for number in range(20):
            with trio.fail_after(1):  # not for Redis
                await one.store.append(draft(lost, f"hangs {number}"))
            started = trio.current_time()
            await said(one, two, others[number % 2], f"goes on {number}")
            slowest = max(slowest, trio.current_time() - started)
        assert slowest < 3 * REDIS_SECONDS, "two calls that failed, and then no more"
        started = trio.current_time()
        await said(one, two, others[0], "goes on")
        assert trio.current_time() - started < REDIS_SECONDS / 2
        os.kill(cluster.nodes[0].pid, signal.SIGCONT)
        await until(lambda: one.store.redis.up and two.store.feed.connected)
        assert await two.store.feed.listening(lost.channel_id, seconds=5)
        await said(one, two, lost, "after")


async def test_a_subscription_follows_its_slot(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    moved, *others = rooms
    slot = key_slot(Keys(database.conninfo).live(moved.channel_id))
    async with two_stores(database, cluster, rooms) as (one, two):
        await said(one, two, moved, "before")
        missed: list[bool] = []
        two.store.on_missed = lambda: missed.append(two.store.feed.connected)
        try:
            await trio.to_thread.run_sync(lambda: cluster.move(slot, source=0, target=2))
            await until(lambda: True in missed)
            await said(one, two, moved, "after")
            await said(one, two, others[0], "as ever")
            live = Keys(database.conninfo).live(moved.channel_id).decode()
            for number, heard_by in ((0, 0), (2, 1)):
                assert cluster.ask(number, "PUBSUB SHARDNUMSUB", live) == [
                    (live.encode(), heard_by)
                ]
        finally:
            await trio.to_thread.run_sync(lambda: cluster.move(slot, source=2, target=0))
        await until(lambda: two.store.feed.connected)
        await said(one, two, moved, "back")


async def test_a_cluster_that_comes_later_is_used(
    cluster: Cluster, database: Database, rooms: list[Room]
):
    for node in cluster.nodes:
        os.kill(node.pid, signal.SIGSTOP)
    async with opened_store(database, cluster.url) as (store, _):
        store.feed.want(rooms[0].channel_id)
        with trio.fail_after(3):
            await store.append(draft(rooms[0], "without"))
        assert not await store.feed.listening(rooms[0].channel_id, seconds=0.2)
        await until(lambda: not store.redis.up)
        assert not store.feed.connected
        for node in cluster.nodes:
            os.kill(node.pid, signal.SIGCONT)
        await until(lambda: store.feed.connected and store.redis.up)
        assert await store.feed.listening(rooms[0].channel_id, seconds=5)


async def test_a_wrong_password_is_named_and_not_shown(cluster: Cluster, database: Database):
    url = cluster.url.replace(f":{cluster.nodes[0].password}@", ":not-the-secret@")
    with capture_logs() as logs:
        async with opened_store(database, url) as (store, _):
            await until(lambda: not store.redis.up)
    failed = [line for line in logs if line["event"] == "redis_failed"]
    assert failed[0]["error"] == "AuthenticationError"
    assert "not-the-secret" not in repr(logs)
    with pytest.raises(redis.AuthenticationError) as raised, connected(Secret(url)):
        pass
    assert "not-the-secret" not in str(raised.value)


async def test_nothing_is_left_of_a_store_that_ended(cluster: Cluster, database: Database):
    def ours() -> list[str]:
        return [
            str(client)
            for number in range(3)
            for client in cluster.ask(number, "CLIENT LIST")
            if client.get("lib-name") == "sottovoce"
        ]

    async with opened_store(database, cluster.url) as (store, _):
        await until(lambda: store.feed.connected)
        assert ours()
    with suppress(trio.TooSlowError):
        await until(lambda: not ours(), 2)
    assert ours() == []
