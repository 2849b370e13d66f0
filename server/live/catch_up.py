"""Finds and fills what the fast path lost: gaps between frames, and messages never heard of."""

import random

import trio

from server.live.hub import Channel, Hub
from server.metrics import GAPS
from storage.contract import ChannelGone, StoreUnavailable
from storage.store import Store

GRACE_SECONDS = 0.02
"""For the missing frame to come by itself: another worker's publish is a millisecond behind."""
WARY_SECONDS = 3.0
"""After the last sign of trouble with Redis: other servers may have it for longer, and publish
nothing. They ask Redis each half second, for half a second, and their feeds try as often."""
RETRY_SECONDS = 0.25
"""While the store is unavailable, jittered by half; ends when the channel's streams do."""


class CatchUp:
    """Reads what a channel misses, and looks for channels that miss something.

    Args:
        reconcile: seconds between looks while Redis is well.
        poll: the same while it is not, and PostgreSQL is the only way to hear of other workers;
            and for `WARY_SECONDS` more.
    """

    def __init__(self, hub: Hub, store: Store, *, reconcile: float, poll: float) -> None:
        self._hub = hub
        self._store = store
        self._reconcile = reconcile
        self._poll = poll
        self._missed = trio.Event()
        self._wary_until = 0.0

    def look_now(self) -> None:
        """Something may have passed unheard, and more may do so. Plain."""
        self._wary_until = trio.current_time() + WARY_SECONDS
        self._missed.set()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_for_missed)
            while True:
                await self._hub.gap_found.wait()
                for channel in self._hub.take_gaps():
                    nursery.start_soon(self._fill, channel)

    async def _fill(self, channel: Channel) -> None:
        try:
            await trio.sleep(GRACE_SECONDS)
            while channel.streams and channel.head is not None and channel.head < channel.target:
                try:
                    page = await self._store.missed(channel.id, channel.head, head=channel.target)
                except ChannelGone:
                    return
                except StoreUnavailable:
                    await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
                    continue
                if page.reset or not page.records:  # heard of what is not there: a restored past
                    channel.target = channel.head
                    return
                GAPS.inc()
                # PostgreSQL shows numbers in their order, so what it lacks before another one was
                # deleted by the main application. To wait for it would be to read without end.
                self._hub.skip(channel, page.records[0].seq - 1)
                self._hub.publish(channel, [record.frame() for record in page.records])
        finally:
            channel.filling = False

    async def _look_for_missed(self) -> None:
        took = 0.0
        while True:
            now = trio.current_time()
            if self._store.redis.suspect or not self._store.feed.connected:
                self._wary_until = now + WARY_SECONDS
            # After a slow look a longer one, twice at most: PostgreSQL may be busy, and everybody
            # waits for the next.
            wary = now < self._wary_until
            pause = self._poll + min(took, self._poll) if wary else self._reconcile
            with trio.move_on_after(pause * random.uniform(0.9, 1.0)):
                await self._missed.wait()
            self._missed = trio.Event()
            known = {
                channel.id: channel.head
                for channel in self._hub.channels.values()
                if channel.head is not None
            }
            if not known:
                continue
            started = trio.current_time()
            try:
                ahead = await self._store.heads(known)
            except StoreUnavailable:
                await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
                self.look_now()  # not only after the next pause
                continue
            took = trio.current_time() - started
            for channel_id, head in ahead.items():
                if (found := self._hub.channels.get(channel_id)) is not None:
                    self._hub.heard_of(found, head)
