"""One clock for all streams of a worker, in place of timers of each.

A wheel of slots: a stream stands in the one of its next moment, and says after each which the
next is. A write costs the wheel nothing; a stream that was written to is asked a little early,
finds nothing to do, and names a later moment.
"""

import math
from typing import Protocol

import trio

SLOTS = 256
SLICE = 64
"""Streams that are ticked before others have their turn."""


class Ticking(Protocol):
    slot: "dict[Ticking, None] | None"
    """The clock's: where the stream stands."""

    def tick(self, now: float) -> float:
        """Do what is due; when to be asked again, on Trio's clock. Plain."""


class Clock:
    """Ticks streams.

    Args:
        tick: seconds between two slots; a stream is ticked this much late at most.
    """

    def __init__(self, *, tick: float) -> None:
        self.seconds = tick
        self._slots: list[dict[Ticking, None]] = [{} for _ in range(SLOTS)]
        self._now = math.floor(trio.current_time() / tick)
        """The number of the last slot that was done."""

    def set(self, stream: Ticking, at: float) -> None:
        """Have a stream ticked at a time, or at the wheel's horizon if that is before. Plain."""
        self._put(stream, at, soonest=1)

    def _put(self, stream: Ticking, at: float, *, soonest: int) -> None:
        if stream.slot is not None:
            self.forget(stream)
        ahead = min(max(math.ceil(at / self.seconds) - self._now, soonest), SLOTS - 1)
        stream.slot = slot = self._slots[(self._now + ahead) % SLOTS]
        slot[stream] = None

    def forget(self, stream: Ticking) -> None:
        """Tick it no more. Plain; again is no error."""
        if stream.slot is not None:
            stream.slot.pop(stream, None)
            stream.slot = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep_until((self._now + 1) * self.seconds)
            slot = self._slots[(self._now + 1) % SLOTS]
            while slot:
                now = trio.current_time()
                for _ in range(min(SLICE, len(slot))):
                    if not slot:  # a tick may end others
                        break
                    stream, _ = slot.popitem()
                    stream.slot = None
                    at = stream.tick(now)
                    if at < math.inf:
                        self._put(stream, at, soonest=2)  # not into the slot that is being done
                if slot:
                    await trio.lowlevel.checkpoint()
            self._now += 1
