"""Looks at the access of open streams again, many in one statement.

Each on its own cost 160 us of CPU: a task, a place in a batch, a timer. 10,000 quiet streams spent
more on it than on their heartbeats.
"""

from typing import Protocol

import trio

from protocol.closing import ClosingReason
from server.auth.access import Gate
from storage.contract import StoreUnavailable

MAX_TOGETHER = 500
"""Streams in one statement; some five milliseconds of ours."""
GATHER_SECONDS = 0.5
"""From the first that is due to the statement, in which others become due: of 10,000 streams some
90. What was decided about somebody is felt this much later."""


class Stream(Protocol):
    channel_id: int
    subject: str
    """The Clerk `sub` of whom it belongs to."""

    def end(self, reason: ClosingReason) -> None:
        """Again, or after it has ended, is no error; plain."""


class Rechecks:
    """Ends the streams that have lost their access or subscription."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._due: dict[Stream, None] = {}
        """Each once, however often it is told: no more than there are streams."""
        self._arrived = trio.Event()

    def add(self, stream: Stream) -> None:
        """Look at its access soon. Plain."""
        self._due[stream] = None
        self._arrived.set()

    async def serve(self) -> None:
        """Until cancelled. While nobody can tell, streams go on: each asks again by itself."""
        while True:
            await self._arrived.wait()
            await trio.sleep(GATHER_SECONDS)
            self._arrived = trio.Event()
            due, self._due = list(self._due), {}
            try:
                for start in range(0, len(due), MAX_TOGETHER):
                    await self._look(due[start : start + MAX_TOGETHER])
            except StoreUnavailable:
                pass  # also for the rest of them

    async def _look(self, streams: list[Stream]) -> None:
        reasons = await self._gate.why_end({(each.subject, each.channel_id) for each in streams})
        for stream in streams:
            reason = reasons[stream.subject, stream.channel_id]
            if reason is not None:
                stream.end(reason)
