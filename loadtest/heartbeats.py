"""Who has been silent for too long. Pure: one look at all streams, and no timer for each."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

ALLOWED = 2.0
"""Heartbeats that may be late: the server's clock ticks once a second, and networks stall."""


class Heard(Protocol):
    @property
    def heard_at(self) -> float | None:
        """When it was last heard of; None while it is not open."""


S = TypeVar("S", bound=Heard)


class Listening:
    """Looks from time to time.

    Args:
        heartbeat: seconds of silence after which the server says something.
        every: seconds between two looks.
    """

    def __init__(self, heartbeat: float, *, every: float = 1.0) -> None:
        self.limit = ALLOWED * heartbeat
        self._every = every
        self._looked_at: float | None = None

    def silent(self, streams: Iterable[S], now: float) -> list[S]:
        """Those that have said nothing for longer than they may.

        None if this look comes late: then it was us who did not listen, and what they said waits.
        """
        looked_at, self._looked_at = self._looked_at, now
        if looked_at is None or now - looked_at > 2 * self._every:
            return []
        oldest = now - self.limit
        return [
            stream
            for stream in streams
            if (heard_at := stream.heard_at) is not None and heard_at < oldest
        ]
