"""Word that somebody's access may be over: forget what is cached, look at their streams again.

Without such word, or with Redis gone, a revoked access lasts as long as the cache and two rounds
of looks at open streams together, at most.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import trio

from server.auth.access import Gate
from storage.contract import Eviction, StoreUnavailable

TICK_SECONDS = 0.05
"""Between passes over the streams. A pass over 18,000 takes some 2 ms, however many evictions
gathered for it."""


class Stream(Protocol):
    channel_id: int
    user_id: int
    subject: str
    """The Clerk `sub` of whom it belongs to."""


S = TypeVar("S", bound=Stream)


class Evictions(Generic[S]):
    """Obeys evictions.

    Args:
        streams: gives all open streams.
        look: looks at the access of some again, and ends those that have lost it. May raise
            StoreUnavailable, when nobody can tell.
    """

    def __init__(
        self,
        gate: Gate,
        streams: Callable[[], Sequence[S]],
        look: Callable[[list[S]], Awaitable[None]],
    ) -> None:
        self._gate = gate
        self._streams = streams
        self._look = look
        self._arrived = trio.Event()
        self._all = False
        self._users: set[int] = set()
        self._subjects: set[str] = set()
        self._channels: set[int] = set()

    def take(self, evictions: Sequence[Eviction]) -> None:
        """Nothing that was cached of them is used from here on; their streams are next. Plain."""
        for eviction in evictions:
            self._gate.forget(eviction)
            self._all |= eviction.all
            if eviction.user_id is not None:
                self._users.add(eviction.user_id)
            if eviction.clerk_id is not None:
                self._subjects.add(eviction.clerk_id)
            if eviction.channel_id is not None:
                self._channels.add(eviction.channel_id)
        self._arrived.set()

    def missed(self) -> None:
        """Some may have passed unheard: as if all had come. Plain."""
        self.take([Eviction(all=True)])

    async def serve(self) -> None:
        """Have their streams' access looked at until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            with suppress(StoreUnavailable):
                await self._look(self._concerned())
            await trio.sleep(TICK_SECONDS)

    def _concerned(self) -> list[S]:
        everybody, self._all = self._all, False
        users, self._users = self._users, set()
        subjects, self._subjects = self._subjects, set()
        channels, self._channels = self._channels, set()
        return [
            stream
            for stream in self._streams()
            if everybody
            or stream.user_id in users
            or stream.subject in subjects
            or stream.channel_id in channels
        ]
