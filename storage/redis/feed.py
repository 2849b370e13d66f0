"""Word of new messages and of evictions: one pub/sub connection per worker, for the channels
with streams here.

Pub/sub forgets whoever is not listening. So after every new connection the feed says that it
may have missed something, and whoever uses it looks at PostgreSQL.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import redis.asyncio
import structlog
import trio
from redis.exceptions import RedisError

from storage.breaker import Breaker, Event
from storage.bridge import Bridge
from storage.contract import Eviction, Record
from storage.failures import describe
from storage.metrics import EVICTIONS, REDIS_ROUND_TRIPS
from storage.redis import Keys

log = structlog.get_logger("storage")

PING_SECONDS = 1.0
SILENCE_SECONDS = 2.5
"""Without an answer to a ping, the connection is taken for dead: Redis may hang, not only die."""
RECONNECT_SECONDS = 0.5
"""Between tries, jittered by half."""
MAX_SUBSCRIBE = 1000
"""Channels in one SUBSCRIBE."""


class Feed:
    """Keeps the subscriptions that are wanted, over any number of connections.

    Args:
        on_records: called with (channel id, record) of each message, in Redis' order: all that
            one read of the socket brought, at once. Plain.
        on_evicted: called with the evictions that came, likewise. Plain.
        on_missed: called when the connection is lost, and after each new one once all is
            subscribed: both times something may have passed unheard. Plain.
    """

    def __init__(
        self,
        bridge: Bridge,
        client: "redis.asyncio.Redis",
        keys: Keys,
        *,
        breaker: Breaker,
        on_records: Callable[[Sequence[tuple[int, Record]]], None],
        on_evicted: Callable[[Sequence[Eviction]], None],
        on_missed: Callable[[], None],
    ) -> None:
        self._bridge = bridge
        self._client = client
        self._keys = keys
        self._breaker = breaker
        self._on_records = on_records
        self._on_evicted = on_evicted
        self._records: list[tuple[int, Record]] = []
        self._evictions: list[Eviction] = []
        self._handing_over = False
        self._on_missed = on_missed
        self._wanted: dict[int, trio.Event] = {}
        """Channel → set while Redis has confirmed the subscription."""
        self._pending: set[int] = set()
        self._dropped: set[int] = set()
        self._changed = trio.Event()
        self._heard = 0.0
        self.connected = False

    def want(self, channel_id: int) -> None:
        """Listen to a channel from now on."""
        self._dropped.discard(channel_id)
        if channel_id not in self._wanted:
            self._wanted[channel_id] = trio.Event()
            self._pending.add(channel_id)
            self._changed.set()

    def drop(self, channel_id: int) -> None:
        """Listen to it no more."""
        if self._wanted.pop(channel_id, None) is not None:
            self._pending.discard(channel_id)
            self._dropped.add(channel_id)
            self._changed.set()

    async def listening(self, channel_id: int, *, seconds: float) -> bool:
        """Wait until a wanted channel is subscribed, at most `seconds`; not at all if Redis is
        known to be down."""
        confirmed = self._wanted.get(channel_id)
        if confirmed is None or not self._breaker.up:
            return False
        if not confirmed.is_set():
            with trio.move_on_after(seconds):
                await confirmed.wait()
        return confirmed.is_set()

    async def serve(self) -> None:
        """Keep a connection until cancelled."""
        while True:
            if self._breaker.up:
                try:
                    await self._serve_connection()
                except (RedisError, OSError, trio.TooSlowError) as error:
                    log.warning("feed_lost", **describe(error))
                    self._breaker.record(Event.FAILED)
                finally:
                    if self.connected:
                        self.connected = False
                        self._on_missed()
                    self._pending = set(self._wanted)
                    self._dropped.clear()
                    for channel_id, event in self._wanted.items():
                        if event.is_set():
                            self._wanted[channel_id] = trio.Event()
            await trio.sleep(RECONNECT_SECONDS * random.uniform(0.5, 1.0))

    async def _serve_connection(self) -> None:
        pubsub = self._client.pubsub()
        try:
            with trio.fail_after(SILENCE_SECONDS):
                # Always: a connection without subscriptions may not be read.
                await self._tell(pubsub.subscribe, self._keys.control)
            self._heard = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bridge.run, self._read, pubsub)
                nursery.start_soon(self._keep_subscribed, pubsub)
                nursery.start_soon(self._watch, pubsub)
        except BaseExceptionGroup as group:
            # Where one task finds the connection lost, redis-py may give another one an
            # AttributeError for it.
            if group.subgroup((RedisError, OSError, trio.TooSlowError)) is None:
                raise
            raise trio.TooSlowError from group
        finally:
            with trio.move_on_after(1, shield=True), suppress(RedisError, OSError):
                await self._bridge.run(pubsub.aclose)

    async def _read(self, pubsub: "redis.asyncio.client.PubSub") -> None:
        """Asyncio-flavoured: one task reads for as long as the connection lives."""
        while True:
            kind, name, *rest = await pubsub.parse_response(block=True)
            self._heard = trio.current_time()
            if kind == b"message":
                with suppress(ValueError):  # not ours
                    self._take(name, rest[0])
            elif kind == b"subscribe" and name != self._keys.control:
                confirmed = self._wanted.get(self._keys.channel_of(name))
                if confirmed is not None:
                    confirmed.set()
            elif kind == b"unsubscribe":  # the driver's own list; it would only grow
                pubsub.channels.pop(name, None)
                pubsub.pending_unsubscribe_channels.discard(name)

    def _take(self, name: bytes, raw: bytes) -> None:
        """Gather what one read of the socket brought: the reader goes on without a pause while
        there is more of it, and what is scheduled here runs at its next pause.

        Raises:
            ValueError: neither a message nor an eviction.
        """
        if name != self._keys.control:
            self._records.append((self._keys.channel_of(name), Record.decode(raw)))
        else:
            try:
                self._evictions.append(Eviction.decode(raw))
            except ValueError:
                EVICTIONS.labels("ignored").inc()
                raise
        if not self._handing_over:
            self._handing_over = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._handing_over = False
        records, self._records = self._records, []
        evictions, self._evictions = self._evictions, []
        try:
            if evictions:  # first: they may end streams that the messages are not for any more
                EVICTIONS.labels("taken").inc(len(evictions))
                self._on_evicted(evictions)
            if records:
                self._on_records(records)
        except Exception as error:  # a defect of ours; here it would end the loop
            log.error("delivery_failed", messages=len(records), **describe(error))
            self._on_missed()

    async def _keep_subscribed(self, pubsub: "redis.asyncio.client.PubSub") -> None:
        """Tell Redis what changed; while one command is sent, the next changes gather."""
        first = True
        while True:
            self._changed = trio.Event()
            pending, self._pending = list(self._pending), set()
            dropped, self._dropped = list(self._dropped), set()
            with trio.fail_after(SILENCE_SECONDS):
                for start in range(0, len(pending), MAX_SUBSCRIBE):
                    part = map(self._keys.live, pending[start : start + MAX_SUBSCRIBE])
                    await self._tell(pubsub.subscribe, *part)
                for start in range(0, len(dropped), MAX_SUBSCRIBE):
                    part = map(self._keys.live, dropped[start : start + MAX_SUBSCRIBE])
                    await self._tell(pubsub.unsubscribe, *part)
            if first:
                first = False
                self.connected = True
                log.info("feed_connected", channels=len(self._wanted))
                self._on_missed()
            await self._changed.wait()

    async def _watch(self, pubsub: "redis.asyncio.client.PubSub") -> None:
        while True:
            await trio.sleep(PING_SECONDS)
            if trio.current_time() - self._heard > SILENCE_SECONDS:
                raise trio.TooSlowError
            with trio.fail_after(PING_SECONDS):
                await self._tell(pubsub.ping)

    async def _tell(self, command: Callable[..., Awaitable[object]], *names: bytes) -> None:
        REDIS_ROUND_TRIPS.labels(command.__name__).inc()
        await self._bridge.run(command, *names)
