"""Word that somebody's access may be over: forget what is cached, look at their streams again.

Without such word, or with Redis gone, a revoked access lasts as long as the cache and the
recheck of open streams together.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from server.auth.access import Gate
from storage.contract import Eviction

SLICE = 500
"""Streams that are told before others have their turn; a millisecond."""
TICK_SECONDS = 0.05
"""Between passes over the streams. A pass over 18,000 takes some 2 ms, however many evictions
gathered for it."""


class Stream(Protocol):
    channel_id: int
    user_id: int

    def recheck_soon(self) -> None:
        """Look at access again, by and by if many are told at once; plain, and nothing happens
        if it has ended."""


class Evictions:
    """Obeys evictions.

    Args:
        streams: gives all open streams.
    """

    def __init__(self, gate: Gate, streams: Callable[[], Sequence[Stream]]) -> None:
        self._gate = gate
        self._streams = streams
        self._arrived = trio.Event()
        self._all = False
        self._users: set[int] = set()
        self._channels: set[int] = set()

    def take(self, evictions: Sequence[Eviction]) -> None:
        """Nothing that was cached of them is used from here on; their streams are next. Plain."""
        for eviction in evictions:
            self._gate.forget(eviction)
            self._all |= eviction.all
            if eviction.user_id is not None:
                self._users.add(eviction.user_id)
            if eviction.clerk_id is not None:
                user_id = self._gate.user_known_as(eviction.clerk_id)
                if user_id is not None:  # else nobody with a stream here
                    self._users.add(user_id)
            if eviction.channel_id is not None:
                self._channels.add(eviction.channel_id)
        self._arrived.set()

    def missed(self) -> None:
        """Some may have passed unheard: as if all had come. Plain."""
        self.take([Eviction(all=True)])

    async def serve(self) -> None:
        """Have streams look at their access until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            for index, stream in enumerate(self._concerned(), 1):
                stream.recheck_soon()
                if index % SLICE == 0:
                    await trio.lowlevel.checkpoint()
            await trio.sleep(TICK_SECONDS)

    def _concerned(self) -> list[Stream]:
        everybody, self._all = self._all, False
        users, self._users = self._users, set()
        channels, self._channels = self._channels, set()
        return [
            stream
            for stream in self._streams()
            if everybody or stream.user_id in users or stream.channel_id in channels
        ]
