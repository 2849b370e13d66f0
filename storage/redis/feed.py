"""Word of new messages and of evictions: one pub/sub connection per worker, for the channels
with streams here.

Pub/sub forgets whoever is not listening. So after every new connection the feed says that it
may have missed something, and whoever uses it looks at PostgreSQL.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import outcome
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
from storage.redis.refusal import describe_refusal, refusal_of
from storage.waiting import Deadlines, Waiter

log = structlog.get_logger("storage")

PING_SECONDS = 1.0
SILENCE_SECONDS = 2.5
"""Without an answer to a ping, the connection is taken for dead: Redis may hang, not only die."""
RECONNECT_SECONDS = 0.5
"""Between tries, jittered by half."""
DENIED_SECONDS = 5.0
"""How long Redis is left alone once it has refused us, jittered by half: only somebody's
hand ends that."""
READY = b"subscribed"
"""What the ping says that follows the first subscriptions of a connection."""
TRIAL_CHANNEL = 0
"""No channel has this number: it is subscribed to where that is tried out. (A node's feed has the
channel of evictions by it.)"""
MAX_SUBSCRIBE = 1000
"""Channels in one SUBSCRIBE."""
CLOSE_SECONDS = 1.0

PubSub = redis.asyncio.client.PubSub


class _Subscription:
    """A channel that is wanted."""

    __slots__ = ("confirmed", "waiters")

    def __init__(self) -> None:
        self.confirmed = False
        """By Redis, on the connection that there is."""
        self.waiters: list[Waiter[bool]] | None = None

    def confirm(self) -> None:
        self.confirmed = True
        self._answer(True)

    def give_up(self) -> None:
        """Nobody needs to wait: it is denied."""
        self._answer(False)

    def _answer(self, confirmed: bool) -> None:
        for waiter in self.waiters or ():
            waiter.answer(outcome.Value(confirmed))
        self.waiters = None


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
        self._on_missed = on_missed
        self._records: list[tuple[int, Record]] = []
        self._evictions: list[Eviction] = []
        self._handing_over = False
        self._wanted: dict[int, _Subscription] = {}
        self._deadlines: Deadlines[bool] = Deadlines(lambda: outcome.Value(False))
        self._pending: set[int] = set()
        self._dropped: set[int] = set()
        self._changed = trio.Event()
        self._heard = 0.0
        self._answered = trio.Event()
        """Set when Redis has answered all that was asked first on this connection."""
        self.connected = False

    def want(self, channel_id: int) -> None:
        """Listen to a channel from now on."""
        self._dropped.discard(channel_id)
        if channel_id not in self._wanted:
            self._wanted[channel_id] = _Subscription()
            self._pending.add(channel_id)
            self._changed.set()

    def drop(self, channel_id: int) -> None:
        """Listen to it no more."""
        if self._wanted.pop(channel_id, None) is not None:
            self._pending.discard(channel_id)
            self._dropped.add(channel_id)
            self._changed.set()

    def hears(self, channel_id: int) -> bool:
        """Whether Redis has confirmed that this process listens to the channel. Plain."""
        wanted = self._wanted.get(channel_id)
        return wanted is not None and wanted.confirmed

    async def listening(self, channel_id: int, *, seconds: float) -> bool:
        """Wait until a wanted channel is subscribed, at most `seconds`; not at all if Redis is
        known to be down."""
        wanted = self._wanted.get(channel_id)
        if wanted is None or not self._breaker.up:
            return False
        if wanted.confirmed:
            return True
        waiter: Waiter[bool] = Waiter()
        wanted.waiters = wanted.waiters or []
        wanted.waiters.append(waiter)
        self._deadlines.add(waiter, trio.current_time() + seconds)
        return await waiter.wait()

    async def serve(self) -> None:
        """Keep a connection until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deadlines.serve)
            await self._keep_connected()

    async def try_out(self) -> None:
        """Subscribe and unsubscribe, once, on a connection of its own; instead of `serve`.

        Raises:
            RedisError, OSError, trio.TooSlowError
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_connection)
                self.want(TRIAL_CHANNEL)
                await self._until(lambda: self.connected)
                self.drop(TRIAL_CHANNEL)
                await self._until(lambda: not self._dropped)
                self.want(TRIAL_CHANNEL)  # its answer comes after that to what went before
                await self._until(self._has_tried)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _first_of(group) from None

    def _has_tried(self) -> bool:
        return self.hears(TRIAL_CHANNEL)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():  # noqa: ASYNC110 - once in a run of the doctor
            await trio.sleep(0.01)

    async def _keep_connected(self) -> None:
        while True:
            seconds = RECONNECT_SECONDS
            if self._breaker.up or self._breaker.held:
                try:
                    await self._serve_connection()
                except (RedisError, OSError, trio.TooSlowError) as error:
                    if self._lose(error):
                        seconds = DENIED_SECONDS
                finally:
                    if self.connected:
                        self.connected = False
                        self._on_missed()
                    self._pending = set(self._wanted)
                    self._dropped.clear()
                    for wanted in self._wanted.values():
                        wanted.confirmed = False
            else:
                self._dropped.clear()  # nobody has it
            await trio.sleep(seconds * random.uniform(0.5, 1.0))

    def _lose(self, error: Exception) -> bool:
        """Say why the connection is lost, and tell the breaker; whether it is denied to us."""
        refusal = refusal_of(error)
        held, self._breaker.held = self._breaker.held, refusal is not None
        if refusal is None:
            log.warning("feed_lost", **describe(error))
            self._breaker.record(Event.FAILED)
        else:
            # Of a login that is refused a probe has told, too.
            if self._breaker.up or (not held and refusal.what != "login"):
                log.warning(
                    "redis_failed",
                    operation="subscribe",
                    dependency=self._breaker.name,
                    **describe_refusal(refusal),
                    **describe(error),
                )
            self._breaker.record(Event.DENIED)
            for wanted in self._wanted.values():
                wanted.give_up()
        return refusal is not None

    async def _serve_connection(self) -> None:
        pubsub = self._client.pubsub()
        try:
            self._answered = trio.Event()
            await self._connect(pubsub)
            self._heard = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._bridge.run, self._read, pubsub)
                nursery.start_soon(self._keep_subscribed, pubsub)
                nursery.start_soon(self._watch, pubsub)
        except BaseExceptionGroup as group:
            # Where one task finds the connection lost, redis-py may give another one an
            # AttributeError for it.
            ours = group.subgroup((RedisError, OSError, trio.TooSlowError))
            if ours is None:
                raise
            raise _first_of(ours) from None
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True), suppress(RedisError, OSError):
                await self._bridge.run(pubsub.aclose)

    async def _connect(self, pubsub: PubSub) -> None:
        """First of all: the driver connects when it subscribes."""
        await self._tell(pubsub, pubsub.subscribe, [self._keys.control])

    async def _subscribe(self, pubsub: PubSub, channel_ids: list[int]) -> None:
        await self._tell(pubsub, pubsub.subscribe, map(self._keys.live, channel_ids))

    async def _unsubscribe(self, pubsub: PubSub, channel_ids: list[int]) -> None:
        await self._tell(pubsub, pubsub.unsubscribe, map(self._keys.live, channel_ids))

    async def _read(self, pubsub: PubSub) -> None:
        """Asyncio-flavoured: one task reads for as long as the connection lives.

        From the connection: `PubSub.parse_response` would open a new one where this one is lost,
        and nobody would know what passed unheard.
        """
        connection: Any = pubsub.connection
        while True:
            kind, name, *rest = await connection.read_response(timeout=math.inf, push_request=True)
            self._heard = trio.current_time()
            if kind == b"message":
                self._take(name, rest[0])
            elif kind == b"pong":
                self._take_pong(name)
            elif kind == b"subscribe" and name != self._keys.control:
                wanted = self._wanted.get(self._keys.channel_of(name))
                if wanted is not None:
                    wanted.confirm()

    def _take_pong(self, said: bytes) -> None:
        if said == READY:
            self._answered.set()

    def _take(self, name: bytes, raw: bytes) -> None:
        """Gather what one read of the socket brought: the reader goes on without a pause while
        there is more of it, and what is scheduled here runs at its next pause."""
        if name == self._keys.control:
            try:
                self._evictions.append(Eviction.decode(raw))
            except ValueError:
                EVICTIONS.labels("ignored").inc()
        else:
            with suppress(ValueError):  # not ours
                self._records.append((self._keys.channel_of(name), Record.decode(raw)))
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

    async def _keep_subscribed(self, pubsub: PubSub) -> None:
        """Tell Redis what changed; while one command is sent, the next changes gather."""
        first = True
        while True:
            self._changed = trio.Event()
            pending, self._pending = list(self._pending), set()
            dropped, self._dropped = list(self._dropped), set()
            for start in range(0, len(pending), MAX_SUBSCRIBE):
                await self._subscribe(pubsub, pending[start : start + MAX_SUBSCRIBE])
            for start in range(0, len(dropped), MAX_SUBSCRIBE):
                await self._unsubscribe(pubsub, dropped[start : start + MAX_SUBSCRIBE])
            if first:
                first = False
                await self._tell(pubsub, pubsub.ping, [READY])
                await self._answered.wait()  # `_watch` ends it if that does not come
                self.connected = True
                self._breaker.held = False
                log.info("feed_connected", channels=len(self._wanted))
                self._on_missed()
            await self._changed.wait()

    async def _watch(self, pubsub: PubSub) -> None:
        while True:
            await trio.sleep_until((trio.current_time() // PING_SECONDS + 1) * PING_SECONDS)
            if trio.current_time() - self._heard > SILENCE_SECONDS:
                raise trio.TooSlowError
            await self._tell(pubsub, pubsub.ping)

    async def _tell(
        self, pubsub: PubSub, command: Callable[..., Any], names: Iterable[bytes] = ()
    ) -> None:
        REDIS_ROUND_TRIPS.labels(command.__name__).inc()
        with trio.fail_after(SILENCE_SECONDS):
            await self._bridge.run(command, *names)
        # The driver's own lists, which are for connecting again, and would only grow.
        pubsub.channels.clear()
        pubsub.pending_unsubscribe_channels.clear()


def _first_of(group: BaseExceptionGroup[Any]) -> Any:
    """What was refused, where something was; else any of what went wrong."""
    errors = list(_flat(group))
    return next((error for error in errors if refusal_of(error)), errors[0])


def _flat(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error
