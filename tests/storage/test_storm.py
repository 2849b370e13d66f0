"""Thousands of clients that come back at once are few round trips, with Redis and without.

What is counted is what the server itself counts for its operators (`storage.metrics`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import trio
from prometheus_client import REGISTRY

from server.auth.access import Gate
from storage.redis.feed import Feed
from storage.store import Store
from tests.storage.stores import NOWHERE, make_channels, opened_store
from tests.support.services import Database

CLIENTS = 10_000
MESSAGES = 3
"""In each channel."""

BACKGROUND = {("postgres", "ping"), ("redis", "ping"), ("redis", "probe")}
"""What is asked every second or two, whoever comes."""


COUNTERS = {
    "sottovoce_postgres_statements_total": "postgres",
    "sottovoce_redis_round_trips_total": "redis",
}


class Client(NamedTuple):
    subject: str
    channel_id: int
    cursor: int | None


class RoundTrips:
    """Counts by (dependency, what), since the last look."""

    def __init__(self) -> None:
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], float]:
        return {
            (COUNTERS[sample.name], next(iter(sample.labels.values()))): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name in COUNTERS
        }

    def __call__(self) -> dict[tuple[str, str], int]:
        now = self._now()
        changed = {kind: int(now[kind] - self._before.get(kind, 0)) for kind in now}
        self._before = now
        return {kind: count for kind, count in changed.items() if count and kind not in BACKGROUND}


async def come_back(store: Store, clients: Sequence[Client]) -> dict[tuple[str, str], int]:
    """All at once, each as a stream does: access and subscription, listen, history.

    The worker was just started: it has nothing cached. Tokens are verified without a round trip.

    Returns:
        The round trips that it took.
    """
    gate = Gate(store, cache=5.0, trials=False)

    async def reconnect(client: Client) -> None:
        permit = gate.permit(await gate.look(client.subject, client.channel_id))
        store.feed.want(client.channel_id)
        await store.feed.listening(client.channel_id, seconds=10)
        page = await store.history(client.channel_id, client.cursor, head=permit.channel.head)
        expected = range((client.cursor or 0) + 1, MESSAGES + 1)
        assert [record.seq for record in page.records] == list(expected)

    trips = RoundTrips()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(reconnect, client)
    counted = trips()
    for client in clients:  # and they leave again
        store.feed.drop(client.channel_id)
    assert isinstance(store.feed, Feed)
    with trio.fail_after(10):
        while store._writes or store.feed._dropped:
            await trio.sleep(0.05)
    return counted


async def test_ten_thousand_clients_that_come_back_at_once_are_few_round_trips(
    database: Database, redis_url: str
):
    clients = [
        Client(subject, channel_id, (None, 1)[number % 2])
        for number, (subject, channel_id) in enumerate(
            make_channels(database, CLIENTS, messages=MESSAGES)
        )
    ]
    few = CLIENTS / 50
    # Much time for each: nobody is refused here for having waited on a busy machine.
    async with opened_store(database, redis_url, connections=8, seconds=30.0) as (store, _):
        with trio.fail_after(5):
            while not store.feed.connected:
                await trio.sleep(0.01)
        empty = await come_back(store, clients)
        filled = await come_back(store, clients)
        tenth = await come_back(store, clients[: CLIENTS // 10])
    async with opened_store(database, NOWHERE, connections=8, seconds=30.0) as (store, _):
        with trio.fail_after(5):
            while store.redis.up:
                await trio.sleep(0.01)
        gone = await come_back(store, clients)

    access, pages = ("postgres", "access"), ("postgres", "pages")
    read, write, subscribe = ("redis", "read"), ("redis", "write"), ("redis", "subscribe")
    leave = ("redis", "unsubscribe")
    # On a busy machine Redis' time may be over for some, which PostgreSQL then answers.
    checks = {("postgres", name) for name in ("catalog", "applied", "append")}
    assert set(empty) | set(filled) <= {access, pages, read, write, subscribe, leave, *checks}
    assert set(gone) <= {access, pages, *checks}
    for counted in (empty, filled, gone):
        assert max(counted.values()) <= few, counted
    for kind, count in tenth.items():
        assert count <= max(filled.get(kind, 0) / 4, 10), (tenth, filled)
