"""The feed's own connection, with a driver that breaks in its own ways."""

from typing import Any

import trio
from redis.exceptions import ConnectionError as RedisConnectionError

from storage.breaker import Breaker
from storage.redis import Keys
from storage.redis.feed import PING_SECONDS, Feed


class BreakingPubSub:
    """A connection that is lost during the first ping: one task is told so, and redis-py gives
    the other one an AttributeError for the connection that is gone."""

    def __init__(self) -> None:
        self.lost = False

    async def subscribe(self, *_: Any) -> None: ...
    async def aclose(self) -> None: ...

    async def parse_response(self, *, block: bool) -> Any:
        await trio.sleep(PING_SECONDS * 1.1)
        self.lost = True
        raise RedisConnectionError

    async def ping(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self.lost:
                raise AttributeError


class Client:
    def __init__(self) -> None:
        self.connections = 0

    def pubsub(self) -> BreakingPubSub:
        self.connections += 1
        return BreakingPubSub()


class DirectBridge:
    async def run(self, function: Any, *args: Any) -> Any:
        return await function(*args)


async def test_a_connection_lost_in_two_ways_at_once_is_replaced(autojump_clock: Any):
    client: Any = Client()
    bridge: Any = DirectBridge()
    missed: list[float] = []
    feed = Feed(
        bridge,
        client,
        Keys({"host": "h", "port": 1, "dbname": "d"}),
        breaker=Breaker("redis", tolerance=10, on_change=lambda _: None),
        on_record=lambda *_: None,
        on_missed=lambda: missed.append(trio.current_time()),
    )
    with trio.move_on_after(2.5 * PING_SECONDS):
        await feed.serve()  # which must not raise
    assert client.connections == 2
    assert len(missed) >= 3, "connected, lost, connected again"
