"""The newest messages of each channel in Redis: read, written and rebuilt by scripts.

A script is one command with one answer, whatever its batch: redis-py takes as much time for an
answer of one number as for one of a hundred channels, which hiredis parses in C.

In a Redis Cluster the keys of one script must be of one slot: see `cluster`.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import redis.asyncio
import structlog
import trio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from storage.breaker import Breaker, Event
from storage.bridge import Bridge
from storage.contract import Record, StoreUnavailable
from storage.failures import describe
from storage.metrics import REDIS_ROUND_TRIPS, REDIS_SECONDS
from storage.redis import Keys
from storage.redis.client import Script, run_script
from storage.redis.refusal import describe_refusal, refusal_of

log = structlog.get_logger("storage")

WRITE_BYTES = 512 * 1024
"""The most bytes of records in one script, which holds up everybody in Redis: a millisecond or
two. Hosted servers limit a request's size (Upstash 10 MB, and 1 MB before: "ERR max request size
exceeded")."""
TRIAL_SECONDS = 60
"""How long the trial's key is kept after the last server has gone."""

Write = tuple[int, list[Record], bool]
"""(channel id, records in order, whether they are new and to be published)"""


class RecentMessages:
    """Scripts over the sorted sets.

    Args:
        size: messages kept of a channel.
        ttl: seconds that a quiet channel is kept.
        seconds: for one script, connecting included.
        hears: whether this process listens to a channel: then it is published to others alone.
    """

    def __init__(
        self,
        bridge: Bridge,
        client: "redis.asyncio.Redis",
        keys: Keys,
        *,
        breaker: Breaker,
        size: int,
        ttl: int,
        seconds: float,
        hears: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._bridge = bridge
        self._hears = hears
        self._client = client
        self._read = Script("read_recent")
        self._write = Script("write_recent")
        self._keys = keys
        self._breaker = breaker
        self._size = size
        self._ttl = ttl
        self._seconds = seconds

    def serves(self, channel_id: int) -> bool:  # noqa: ARG002
        """Whether it is worth asking for a channel. Plain."""
        return self._breaker.up

    async def read(self, channel_ids: Sequence[int]) -> list[list[Record]]:
        """What Redis has of each channel, by sequence number; proves nothing.

        Raises:
            StoreUnavailable: Redis is down or hangs.
        """
        self._breaker.check()
        keys = [self._keys.recent(channel_id) for channel_id in channel_ids]
        answers = await self._execute("read", run_script, self._client, self._read, keys)
        return [decode_records(raw) for raw in answers]

    async def write(self, writes: Sequence[Write]) -> None:
        """Add messages to their sets, trim, and publish: in order, one script.

        A rebuild takes the place of what the set had in its range. Nothing else is taken away
        but the oldest, so a late write and a rebuild may cross.

        Raises:
            StoreUnavailable: Redis is down, hangs or refuses; some of it may have been done.
        """
        for some in in_pieces(writes, WRITE_BYTES):
            self._breaker.check()
            keys, args = write_arguments(
                some,
                keys=self._keys,
                size=self._size,
                ttl=self._ttl,
                publish=b"PUBLISH",
                hears=self._hears,
            )
            await self._execute("write", run_script, self._client, self._write, keys, args)

    async def probe(self) -> bool:
        """Whether Redis answers and lets us do what we do there. Never raises.

        While it is up, whether it can be read is seen by those who read."""
        try:
            await self._execute("probe", self.try_out, not self._breaker.up)
        except StoreUnavailable:
            return False
        return True

    async def try_out(self, read: bool = True) -> None:
        """Run the scripts, with all that they do, on a key that is for this alone.
        Asyncio-flavoured.

        Raises:
            RedisError, OSError
        """
        key = self._keys.trial
        new, rebuild = trial_arguments(key, b"PUBLISH")
        args = [*new, *rebuild[3:]]
        await run_script(self._client, self._write, [key, key], args)
        if read:
            await run_script(self._client, self._read, [key])

    async def _execute(
        self, operation: str, call: Callable[..., Awaitable[Any]], *args: Any
    ) -> Any:
        return await attempt(operation, self._breaker, self._seconds, self._bridge.run, call, *args)


def in_pieces(writes: Sequence[Write], size: int) -> Iterator[list[Write]]:
    """Divides writes into pieces of `size` bytes of records, or of one larger record, in order."""
    piece: list[Write] = []
    room = size
    for channel_id, records, new in writes:
        first = 0
        for at, record in enumerate(records):
            room -= len(record.event) + len(record.details)
            if room < 0 and (piece or at > first):
                if at > first:
                    piece.append((channel_id, records[first:at], new))
                yield piece
                piece, first = [], at
                room = size - len(record.event) - len(record.details)
        piece.append((channel_id, records[first:] if first else records, new))
    yield piece


def trial_arguments(key: bytes, publish: bytes) -> Iterator[list[bytes | int]]:
    """The arguments of `write_recent.lua` for two writes: a record that is published, whether
    anybody listens or not; then a rebuild. (A script that has removed something may go on where
    the memory is full: so not the other way round.)"""
    for live, besides in ((key + b":live", -1), (b"", 0)):
        yield [1, TRIAL_SECONDS, publish, live, besides, 1, 1, b"trial"]


def write_arguments(
    writes: Sequence[Write],
    *,
    keys: Keys,
    size: int,
    ttl: int,
    publish: bytes,
    hears: Callable[[int], bool] = lambda _: False,
) -> tuple[list[bytes], list[bytes | int]]:
    """The keys and the arguments of `write_recent.lua`, which says what they are."""
    args: list[bytes | int] = [size, ttl, publish]
    for channel_id, records, new in writes:
        live = keys.live(channel_id) if new else b""
        args += (live, int(new and hears(channel_id)), len(records))
        for record in records:
            args += (record.seq, record.encode())
    return [keys.recent(channel_id) for channel_id, _, _ in writes], args


async def attempt(
    operation: str,
    breaker: Breaker,
    seconds: float,
    call: Callable[..., Awaitable[Any]],
    *args: Any,
) -> Any:
    """Ask Redis once, within `seconds`, and tell the breaker how it went.

    Raises:
        StoreUnavailable
    """
    REDIS_ROUND_TRIPS.labels(operation).inc()
    try:
        with REDIS_SECONDS.labels(operation).time(), trio.fail_after(seconds):
            answer: Any = await call(*args)
    except (RedisError, RedisClusterException, OSError, trio.TooSlowError) as error:
        refusal = refusal_of(error)
        # It may be read and not written: between failed writes a read always succeeds.
        if refusal is not None and (refusal.lasting or operation == "probe"):
            event = Event.DENIED
        elif isinstance(error, (RedisConnectionError, OSError)) or (
            operation == "probe" and isinstance(error, ResponseError)
        ):
            event = Event.REFUSED
        else:
            event = Event.FAILED
        if breaker.up:  # while it is down, that was said once
            log.warning(
                "redis_failed",
                operation=operation,
                dependency=breaker.name,
                **describe_refusal(refusal),
                **describe(error),
            )
        breaker.record(event)
        raise StoreUnavailable from None
    breaker.record(Event.SUCCEEDED)
    return answer


def decode_records(members: list[bytes]) -> list[Record]:
    records: list[Record] = []
    newest = 0
    for raw in members:
        try:
            record = Record.decode(raw)
        except ValueError:  # not ours: the proof will miss its number
            continue
        if record.seq > newest:
            records.append(record)
            newest = record.seq
    return records
