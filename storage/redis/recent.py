"""The newest messages of each channel in Redis: read, written and rebuilt in pipelines."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog
import trio

from storage.breaker import Breaker, Event
from storage.contract import Record, StoreUnavailable
from storage.failures import describe
from storage.metrics import REDIS_ROUND_TRIPS, REDIS_SECONDS
from storage.redis import Keys
from storage.redis.client import Client, Command, RedisFailed, RedisLost, RedisRefused

log = structlog.get_logger("storage")

Write = tuple[int, list[Record], bool]
"""(channel id, records in order, whether they are new and to be published)"""


class RecentMessages:
    """Pipelines over the sorted sets.

    Args:
        size: messages kept of a channel.
        ttl: seconds that a quiet channel is kept.
        seconds: for one pipeline, connecting included.
    """

    def __init__(
        self,
        client: Client,
        keys: Keys,
        *,
        breaker: Breaker,
        size: int,
        ttl: int,
        seconds: float,
    ) -> None:
        self._client = client
        self._keys = keys
        self._breaker = breaker
        self._size = size
        self._ttl = ttl
        self._seconds = seconds

    async def read(self, channel_ids: Sequence[int]) -> list[list[Record]]:
        """What Redis has of each channel, by sequence number; proves nothing.

        Raises:
            StoreUnavailable: Redis is down or hangs.
        """
        self._breaker.check()
        recent = self._keys.recent
        commands = [("ZRANGE", recent(channel_id), 0, -1) for channel_id in channel_ids]
        answers = await self._execute("read", commands)
        return [_decode(raw) for raw in answers]

    async def write(self, writes: Sequence[Write]) -> None:
        """Add messages to their sets, trim, and publish: in order, one pipeline.

        A rebuild takes the place of what the set had in its range: another version of a message
        (its author has a new name) would keep an older message out. Nothing else is taken away
        but the oldest, so a late write and a rebuild may cross.

        Raises:
            StoreUnavailable: Redis is down or hangs; some of it may have been done.
        """
        self._breaker.check()
        commands: list[Command] = []
        for channel_id, records, publish in writes:
            key = self._keys.recent(channel_id)
            encoded = [record.encode() for record in records]
            if not publish:
                commands.append(("ZREMRANGEBYSCORE", key, records[0].seq, records[-1].seq))
            scored = [
                part
                for record, raw in zip(records, encoded, strict=True)
                for part in (record.seq, raw)
            ]
            commands += (
                ("ZADD", key, *scored),
                ("ZREMRANGEBYRANK", key, 0, -(self._size + 1)),
                ("EXPIRE", key, self._ttl),
            )
            if publish:
                name = self._keys.live(channel_id)
                commands += [("PUBLISH", name, raw) for raw in encoded]
        await self._execute("write", commands)

    async def probe(self) -> bool:
        """Whether Redis answers and may be written. Never raises."""
        try:
            await self._execute("probe", [("SET", self._keys.probe, b"1", "EX", 60)])
        except StoreUnavailable:
            return False
        return True

    async def _execute(self, operation: str, commands: Sequence[Command]) -> list[Any]:
        REDIS_ROUND_TRIPS.labels(operation).inc()
        try:
            with REDIS_SECONDS.labels(operation).time(), trio.fail_after(self._seconds):
                answers = await self._client.call(commands)
        except (RedisFailed, trio.TooSlowError) as error:
            refused = isinstance(error, RedisLost)
            # It may be read and not written: between failed writes a read always succeeds.
            refused |= operation == "probe" and isinstance(error, RedisRefused)
            if self._breaker.up:  # while it is down, that was said once
                log.warning("redis_failed", operation=operation, **describe(error))
            self._breaker.record(Event.REFUSED if refused else Event.FAILED)
            raise StoreUnavailable from None
        self._breaker.record(Event.SUCCEEDED)
        return answers


def _decode(members: list[bytes]) -> list[Record]:
    records: list[Record] = []
    for raw in members:
        with suppress(ValueError):  # not ours: the proof will miss its number
            record = Record.decode(raw)
            if not records or record.seq > records[-1].seq:
                records.append(record)
    return records
