"""One open stream: a nursery with its watcher, its writer and its lease.

The first of the three to end ends the others, and leaving the block detaches from the hub
whatever happened. Between attaching and detaching nothing is remembered of the request but
what this object holds.
"""

import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import structlog
import trio

from protocol.closing import ClosingReason
from protocol.frames import (
    HEARTBEAT_EVENT,
    Frame,
    closing_event,
    connected_event,
    join_plain,
    reset_event,
)
from server.live.hub import Channel, Hub
from server.live.outbox import Outbox
from server.live.watermark import Event, State, Watermark
from server.metrics import SLOW_STREAMS
from storage.contract import ChannelGone, Page, StoreUnavailable
from storage.failures import describe
from storage.store import Store

log = structlog.get_logger("live")

LISTEN_SECONDS = 0.5
"""That a new stream waits for its channel's subscription before it goes on without."""
GOODBYE_SECONDS = 2.0
"""For the last event of a stream, to a reader that may not read."""
RETRY_SECONDS = 0.25
"""Before a catch-up that failed is tried again, jittered by half."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class StreamLimits(NamedTuple):
    heartbeat: float
    """Seconds of silence."""
    retry: int
    """Milliseconds."""
    outbox: int
    """Bytes."""
    stall: float
    """Seconds."""
    recheck: float
    """Seconds between looks at access."""


class Lease(NamedTuple):
    """Until when a stream may be sent to, on Trio's clock, and how to ask for longer."""

    session_ends: float
    max_age_ends: float
    check: Callable[[], Awaitable[ClosingReason | None]]
    """Looks at access and subscription again: why to end, or None.

    Raises:
        StoreUnavailable: nobody can tell now; the stream goes on.
    """


class EndedEarly(Exception):
    """The stream was ended before its response had started.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: ClosingReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Connection:
    """One stream of one channel.

    `run` is its life. `end` asks it to end, from anywhere, at any time, any number of times.
    """

    __slots__ = (
        "__weakref__",
        "_channel",
        "_hub",
        "_lease",
        "_limits",
        "_scope",
        "_store",
        "_wrote",
        "channel_id",
        "id",
        "outbox",
        "reason",
        "user_id",
        "watermark",
    )

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - what it is called in the log
        channel_id: int,
        user_id: int,
        hub: Hub,
        store: Store,
        limits: StreamLimits,
        lease: Lease,
    ) -> None:
        self.id = id
        self.channel_id = channel_id
        self.user_id = user_id
        self.watermark = Watermark()
        self.outbox = Outbox(limit=limits.outbox, stall=limits.stall)
        self.reason: ClosingReason | None = None
        """Why we ended it; None while it lives and if the peer did."""
        self._hub = hub
        self._store = store
        self._limits = limits
        self._lease = lease
        self._scope = trio.CancelScope()
        self._channel: Channel | None = None
        self._wrote = 0.0

    def offer(self, frame: Frame) -> None:
        """A live frame. Plain: the publisher waits for no reader."""
        if self.watermark.offer(frame):
            if not self.outbox.offer(frame):
                SLOW_STREAMS.inc()
                self.end(ClosingReason.SLOW)
        elif self.watermark.state is State.BEHIND:
            self.outbox.wake()  # a gap that nobody filled: the writer reads

    def end(self, reason: ClosingReason) -> None:
        """Send nothing more but the reason, and let go."""
        if self.reason is None:
            self.reason = reason
            self.watermark.move(Event.END)
            self.outbox.clear()
            self._hub.detach(self)
            self._scope.cancel()

    async def run(
        self,
        *,
        cursor: int | None,
        head: int,
        start: Callable[[Send], Awaitable[None]],
        send: Send,
        receive: Receive,
    ) -> None:
        """Attach, read history, start the response, and stay until something ends it.

        Args:
            cursor: the sequence number to resume after; None for the newest messages.
            head: a number that the channel is known to have reached.
            start: sends the response's start; called once the first page is there.

        Raises:
            StoreUnavailable, ChannelGone, EndedEarly: before the response has started.
        """
        started = False
        try:
            self._channel = self._hub.attach(self)
            with self._scope:
                await self._store.feed.listening(self.channel_id, seconds=LISTEN_SECONDS)
                page = await self._store.history(self.channel_id, cursor, head=head)
                await start(send)
                started = True
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, receive)
                    nursery.start_soon(self._keep_lease)
                    await self._write(send, page, cursor)
        finally:
            self.watermark.move(Event.END)
            self._hub.detach(self)
            self._channel = None
        if self.reason is not None:
            if not started:
                raise EndedEarly(self.reason)
            await self._say_goodbye(send)

    async def _watch(self, receive: Receive) -> None:
        """ASGI's `send` says nothing when the peer has left; `receive` does."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._scope.cancel()

    async def _keep_lease(self) -> None:
        lease = self._lease
        ends = min(lease.session_ends, lease.max_age_ends)
        while True:
            pause = self._limits.recheck * random.uniform(0.8, 1.0)
            await trio.sleep_until(min(ends, trio.current_time() + pause))
            now = trio.current_time()
            if now >= lease.max_age_ends:
                self.end(ClosingReason.MAX_AGE)
            elif now >= lease.session_ends:
                self.end(ClosingReason.SESSION_ENDED)
            else:
                with trio.move_on_at(ends), suppress(StoreUnavailable):
                    if (reason := await lease.check()) is not None:
                        self.end(reason)
            if self.reason is not None:
                return

    async def _write(self, send: Send, page: Page, cursor: int | None) -> None:
        await self._open(send, page, cursor)
        while True:
            if len(self.outbox):
                await self._send(send, self.outbox.take())
            elif self.watermark.state is State.BEHIND:
                await self._catch_up(send)
            else:
                await self.outbox.wait(self._wrote + self._limits.heartbeat)
                if not len(self.outbox):
                    await self._beat_if_due(send)

    async def _open(self, send: Send, page: Page, cursor: int | None) -> None:
        """The first write: connected, a reset if the cursor was none of ours, the first page."""
        retry = jittered(self._limits.retry)
        first = connected_event(self.channel_id, time.time_ns() // 1_000_000, retry=retry)
        if page.reset:
            first += reset_event(self.channel_id)
        if cursor is None or page.reset:
            self.watermark.seq = page.records[0].seq - 1 if page.records else page.head
        else:
            self.watermark.seq = cursor
        await self._send(send, first + self._replay(page))

    async def _catch_up(self, send: Send) -> None:
        """Read on from the watermark until nothing is missing."""
        channel = self._channel
        head = max(self.watermark.seq, (channel.head or 0) if channel else 0)
        try:
            page = await self._store.history(self.channel_id, self.watermark.seq, head=head)
        except StoreUnavailable:
            await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
            await self._beat_if_due(send)
            return
        except ChannelGone:
            self.end(ClosingReason.ACCESS_REVOKED)
            await trio.sleep_forever()  # the scope is cancelled
        if body := self._replay(page):
            await self._send(send, body)
        elif self.watermark.state is State.BEHIND:
            await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
            await self._beat_if_due(send)

    def _replay(self, page: Page) -> bytes:
        """What of a page is due, and, if that is all there is, what gathered meanwhile."""
        frames = self.watermark.replay(record.frame() for record in page.records)
        channel = self._channel
        if channel is not None and self.watermark.seq >= page.head:
            self._hub.joined(channel, self.watermark.seq)
            frames += self.watermark.join(channel.head or 0)
        return join_plain(frames)

    async def _beat_if_due(self, send: Send) -> None:
        if trio.current_time() >= self._wrote + self._limits.heartbeat:
            await self._send(send, HEARTBEAT_EVENT)

    async def _send(self, send: Send, body: bytes) -> None:
        self.outbox.write_begins()
        try:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self.outbox.write_ended()
        self._wrote = trio.current_time()

    async def _say_goodbye(self, send: Send) -> None:
        assert self.reason is not None
        body = closing_event(self.reason, retry=jittered(self._limits.retry))
        with trio.move_on_after(GOODBYE_SECONDS, shield=True):
            try:
                await send({"type": "http.response.body", "body": body, "more_body": False})
            except Exception as error:
                log.debug("goodbye_failed", stream_id=self.id, **describe(error))


def jittered(milliseconds: int) -> int:
    """Between once and twice as long, so that many clients do not come back at once."""
    return round(milliseconds * random.uniform(1.0, 2.0))
