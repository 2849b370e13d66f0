"""The feed's own connection, with a driver that breaks in its own ways."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import trio
from redis.exceptions import ConnectionError as RedisConnectionError

from protocol.confidential import Secret
from storage.breaker import Breaker
from storage.bridge import open_bridge
from storage.contract import Eviction, Record
from storage.metrics import EVICTIONS
from storage.redis import Keys
from storage.redis.client import MAX_CONNECTIONS, open_client
from storage.redis.feed import PING_SECONDS, READY, RECONNECT_SECONDS, SILENCE_SECONDS, Feed

KEYS = Keys({"host": "h", "port": 1, "dbname": "d"})
Batch = Sequence[tuple[int, Record]]


class BreakingPubSub:
    """Is lost while one task reads and another one writes: both are told, each in its way."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.has_answered = False
        self.lost = trio.Event()
        self.connection = self
        self.channels: dict[bytes, None] = {}
        self.pending_unsubscribe_channels: set[bytes] = set()

    async def subscribe(self, *_: bytes) -> None: ...
    async def aclose(self) -> None: ...

    async def read_response(self, **_: Any) -> Any:
        if not self.has_answered:
            await self.answered.wait()
            self.has_answered = True
            return [b"pong", READY]
        await trio.sleep(PING_SECONDS * 1.1)
        self.lost.set()
        raise RedisConnectionError

    async def ping(self, message: bytes = b"") -> None:
        if message == READY:
            self.answered.set()
            return
        await self.lost.wait()
        raise AttributeError


class BreakingClient:
    def __init__(self) -> None:
        self.connections = 0

    def pubsub(self) -> BreakingPubSub:
        self.connections += 1
        return BreakingPubSub()


class DirectBridge:
    async def run(self, function: Any, *args: Any) -> Any:
        return await function(*args)


DIRECT: Any = DirectBridge()


async def test_a_connection_lost_in_two_ways_at_once_is_replaced(autojump_clock: Any):
    client: Any = BreakingClient()
    missed: list[float] = []
    feed = Feed(
        DIRECT,
        client,
        KEYS,
        breaker=Breaker("redis", tolerance=10, on_change=lambda _: None),
        on_records=lambda _: None,
        on_evicted=lambda _: None,
        on_missed=lambda: missed.append(trio.current_time()),
    )
    with trio.move_on_after(2.5 * PING_SECONDS):
        await feed.serve()  # which must not raise
    assert client.connections == 2
    assert len(missed) >= 3, "connected, lost, connected again"


class SilentPubSub(BreakingPubSub):
    """Neither connects nor says that it cannot."""

    async def subscribe(self, *_: bytes) -> None:
        await trio.sleep_forever()


class SilentClient:
    def __init__(self) -> None:
        self.tried_at: list[float] = []

    def pubsub(self) -> SilentPubSub:
        self.tried_at.append(trio.current_time())
        return SilentPubSub()


async def test_a_redis_that_does_not_let_the_feed_in_is_asked_again(autojump_clock: Any):
    client: Any = SilentClient()
    feed = Feed(
        DIRECT,
        client,
        KEYS,
        breaker=Breaker("redis", tolerance=10, on_change=lambda _: None),
        on_records=lambda _: None,
        on_evicted=lambda _: None,
        on_missed=lambda: None,
    )
    with trio.move_on_after(2 * (SILENCE_SECONDS + RECONNECT_SECONDS)):
        await feed.serve()
    assert len(client.tried_at) >= 2
    assert not feed.connected


async def test_who_listens_waits_for_redis_no_longer_than_told(autojump_clock: Any):
    client: Any = SilentClient()
    feed = Feed(
        DIRECT,
        client,
        KEYS,
        breaker=Breaker("redis", tolerance=10, on_change=lambda _: None),
        on_records=lambda _: None,
        on_evicted=lambda _: None,
        on_missed=lambda: None,
    )
    took: dict[float, float] = {}

    async def listen(seconds: float) -> None:
        started = trio.current_time()
        assert await feed.listening(7, seconds=seconds) is False
        took[seconds] = trio.current_time() - started

    feed.want(7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.serve)
        async with trio.open_nursery() as listeners:
            for seconds in (0.5, 0.2, 1.0):
                listeners.start_soon(listen, seconds)
        nursery.cancel_scope.cancel()
    assert took == pytest.approx({0.5: 0.5, 0.2: 0.2, 1.0: 1.0})


@asynccontextmanager
async def listening_feed(
    redis_url: str,
    channel_ids: Sequence[int],
    on_records: Callable[[Batch], None],
    on_missed: Callable[[], None] = lambda: None,
    on_evicted: Callable[[Sequence[Eviction]], None] = lambda _: None,
) -> AsyncIterator[Feed]:
    with trio.fail_after(10):
        async with open_bridge() as bridge, trio.open_nursery() as nursery:
            client = open_client(Secret(redis_url))
            feed = Feed(
                bridge,
                client,
                KEYS,
                breaker=Breaker("redis", tolerance=1000, on_change=lambda _: None),
                on_records=on_records,
                on_evicted=on_evicted,
                on_missed=on_missed,
            )
            for channel_id in channel_ids:
                feed.want(channel_id)
            nursery.start_soon(feed.serve)
            for channel_id in channel_ids:
                assert await feed.listening(channel_id, seconds=5)
            yield feed
            nursery.cancel_scope.cancel()
            with trio.move_on_after(2, shield=True):
                await bridge.run(client.aclose)


def publish(redis_url: str, *messages: tuple[int, Record]) -> None:
    tell(redis_url, *((KEYS.live(channel_id), record.encode()) for channel_id, record in messages))


def tell(redis_url: str, *words: tuple[bytes, bytes]) -> None:
    """All in one write to Redis."""
    with redis.Redis.from_url(redis_url) as client, client.pipeline(transaction=False) as pipeline:
        for name, raw in words:
            pipeline.publish(name, raw)
        pipeline.execute()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.005)


async def test_messages_that_arrive_together_are_handed_over_together(redis_url: str):
    batches: list[Batch] = []
    sent = [(n % 2 + 1, Record(n // 2 + 1, 0, b"{}", b"{}")) for n in range(200)]
    async with listening_feed(redis_url, [1, 2], batches.append):
        await trio.to_thread.run_sync(publish, redis_url, *sent)
        await until(lambda: sum(map(len, batches)) == len(sent))
    assert [item for batch in batches for item in batch] == sent, "in order, each once"
    assert len(batches) <= 20, "one call for each read of the socket, not for each message"


async def test_a_defect_in_who_takes_messages_costs_a_look_and_not_the_feed(redis_url: str):
    taken: list[int] = []
    missed: list[float] = []

    def take(batch: Batch) -> None:
        taken.extend(record.seq for _, record in batch)
        if taken == [1]:
            raise RuntimeError("a defect")

    async with listening_feed(redis_url, [1], take, lambda: missed.append(0)) as feed:
        before = len(missed)
        await trio.to_thread.run_sync(publish, redis_url, (1, Record(1, 0, b"{}", b"{}")))
        await until(lambda: len(missed) > before)
        await trio.to_thread.run_sync(publish, redis_url, (1, Record(2, 0, b"{}", b"{}")))
        await until(lambda: taken == [1, 2])
        assert feed.connected


async def test_evictions_are_handed_over_and_what_is_none_is_counted_and_ignored(redis_url: str):
    garbage = [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"userId":"7"}',
        b'{"userId":null}',
        b'{"user_id":7}',
        b'{"clerkId":7}',
        b'{"all":1}',
        b'{"all":false}',
        b"[" * 100_000,
    ]
    good = [
        (b'{"userId":7}', Eviction(user_id=7)),
        (b'{"clerkId":"user_x"}', Eviction(clerk_id="user_x")),
        (b'{"channelId":12,"why":"not ours to know"}', Eviction(channel_id=12)),
        (b'{"all":true}', Eviction(all=True)),
    ]
    taken: list[Eviction] = []

    def counted(outcome: str) -> float:
        return float(EVICTIONS.labels(outcome)._value.get())

    before = counted("ignored"), counted("taken")
    async with listening_feed(redis_url, [1], lambda _: None, on_evicted=taken.extend) as feed:
        words = garbage + [raw for raw, _ in good]
        await trio.to_thread.run_sync(tell, redis_url, *((KEYS.control, raw) for raw in words))
        await until(lambda: len(taken) >= len(good))
        assert feed.connected
    assert taken == [eviction for _, eviction in good]
    assert counted("ignored") - before[0] == len(garbage)
    assert counted("taken") - before[1] == len(good)


def test_an_eviction_is_written_as_it_is_read_and_shows_nobody():
    for eviction in (Eviction(user_id=7, channel_id=1), Eviction(clerk_id="x"), Eviction(all=True)):
        assert Eviction.decode(eviction.encode()) == eviction
    assert Eviction(clerk_id="user_x").encode() == b'{"clerkId":"user_x"}'
    assert "user_x" not in repr(Eviction(clerk_id="user_x"))


async def test_a_feed_that_is_cut_again_and_again_comes_back_each_time(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    """More often than there may be connections: each lost one is given back."""
    monkeypatch.setattr("storage.redis.feed.RECONNECT_SECONDS", 0.01)
    heard: list[Batch] = []
    with redis.Redis.from_url(redis_url) as admin:
        async with listening_feed(redis_url, [1], heard.append) as feed:
            for number in range(1, MAX_CONNECTIONS + 3):
                assert admin.client_kill_filter(_type="pubsub") == 1
                await until(lambda: not feed.connected)
                await until(lambda: feed.connected)
                assert await feed.listening(1, seconds=5)
                publish(redis_url, (1, Record(number, 0, b"{}", b"{}")))
                await until(lambda: bool(heard))
                heard.clear()
