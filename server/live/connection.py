"""One open stream: a nursery that watches the peer, and what is written to it.

A stream that keeps up has one task, which waits for the peer to leave; frames and heartbeats are
written where they are made. What cannot be done at once - a reader that does not read, history
that is still missing - has a task in the stream's nursery for as long as it takes. Whatever ends
first ends the others, and leaving detaches from the hub.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
import trio

from protocol.closing import ClosingReason, least_pause
from protocol.frames import (
    HEARTBEAT_EVENT,
    Frame,
    chunk,
    closing_event,
    connected_event,
    reset_event,
)
from server.live.clock import Clock, Ticking
from server.live.hub import Channel, Hub
from server.live.outbox import Outbox
from server.live.watermark import Event, State, Watermark
from server.live.wire import Wire
from server.metrics import SLOW_STREAMS
from server.web.response import jittered
from storage.contract import ChannelGone, Record, StoreUnavailable
from storage.failures import describe
from storage.store import Store

log = structlog.get_logger("live")

LISTEN_SECONDS = 0.5
"""That a new stream waits for its channel's subscription before it goes on without."""
GOODBYE_SECONDS = 2.0
"""For the last event of a stream, to a reader that may not read."""
RETRY_SECONDS = 0.25
"""Before a catch-up that failed is tried again, jittered by half."""

_HEARTBEAT_CHUNK = chunk(HEARTBEAT_EVENT)


class StreamLimits(NamedTuple):
    heartbeat: float
    """Seconds of silence."""
    retry: int
    """Milliseconds."""
    outbox: int
    """Bytes."""
    stall: float
    """Seconds."""


class Lease(NamedTuple):
    """Until when a stream may be sent to, on Trio's clock, and what is over then."""

    ends_at: float
    why: ClosingReason


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

    `open` begins it, `live` is its life, and follows without a checkpoint between. `end` asks it
    to end, from anywhere, at any time, any number of times.
    """

    __slots__ = (
        "__weakref__",
        "_channel",
        "_clock",
        "_hub",
        "_lease",
        "_limits",
        "_nursery",
        "_outbox",
        "_store",
        "_wire",
        "_wrote",
        "channel_id",
        "reason",
        "slot",
        "subject",
        "user_id",
        "watermark",
    )

    def __init__(
        self,
        *,
        channel_id: int,
        user_id: int,
        subject: str,
        hub: Hub,
        store: Store,
        clock: Clock,
        limits: StreamLimits,
        lease: Lease,
    ) -> None:
        self.channel_id = channel_id
        self.user_id = user_id
        self.subject = subject
        """The Clerk `sub`."""
        self.watermark = Watermark()
        self.reason: ClosingReason | None = None
        """Why we ended it; None while it lives and if the peer did."""
        self.slot: dict[Ticking, None] | None = None
        self._hub = hub
        self._store = store
        self._clock = clock
        self._limits = limits
        self._lease = lease
        self._channel: Channel | None = None
        self._nursery: trio.Nursery | None = None
        self._wire: Wire | None = None
        self._outbox: Outbox | None = None
        """While `_work` has something to do; then what is offered waits here."""
        self._wrote = 0.0

    def offer(self, frame: Frame, now: float) -> None:
        """A live frame. Plain: the publisher waits for no reader."""
        due = self.watermark.offer(frame)
        if due is None:
            if self.watermark.state is State.BEHIND and self._wire is not None:
                self._start_work()  # a gap that nobody filled, or it is reading already
        elif self._outbox is None:
            wire = self._wire
            assert wire is not None  # the watermark is live
            self._wrote = now
            if not wire.write(due.chunked if wire.chunked else due.plain):
                self._start_work()
        elif not self._outbox.offer(due):
            SLOW_STREAMS.inc()
            self.end(ClosingReason.SLOW)

    def end(self, reason: ClosingReason) -> None:
        """Send nothing more but the reason, and let go."""
        if self.reason is None:
            self.reason = reason
            self._let_go()
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()

    async def open(self, *, cursor: int | None, head: int, begin: Callable[[], Wire]) -> None:
        """Attach, read history, and begin the response with it.

        Args:
            cursor: the sequence number to resume after; None for the newest messages.
            head: a number that the channel is known to have reached.
            begin: starts the response; called once the first page is there. Plain.

        Raises:
            StoreUnavailable, ChannelGone, EndedEarly: the response has not begun.
        """
        if self.reason is not None:
            raise EndedEarly(self.reason)
        try:
            self._channel = channel = self._hub.attach(self)
            if cursor is None:
                opening = self._hub.opening(channel, head=head)
                if opening is not None:
                    self.watermark.seq = channel.head or 0
                    self._begin(begin(), opening + self._replay((), head=self.watermark.seq))
                    return
            elif (recent := self._hub.recall(channel, cursor, head=head)) is not None:
                self.watermark.seq = cursor
                self._begin(begin(), self._replay(recent, head=channel.head or 0))
                return
            # Both waits are short; a stream that is ended meanwhile is told after them.
            await self._store.feed.listening(self.channel_id, seconds=LISTEN_SECONDS)
            page = await self._store.history(self.channel_id, cursor, head=head)
            if self.reason is not None:
                raise EndedEarly(self.reason)
            records = page.records
            if cursor is not None and not page.reset:
                self.watermark.seq = cursor
            else:
                self.watermark.seq = records[0].seq - 1 if records else page.head
            wire = begin()
            events = self._replay(records, head=page.head)
            if cursor is None and self.watermark.state is State.LIVE:
                self._hub.keep_opening(channel, self.watermark.seq, events)
            self._begin(wire, events, reset=page.reset)
        except BaseException:
            self._let_go()
            raise

    async def live(self) -> None:
        """Stay until something ends the stream; never raises for what the peer did."""
        wire = self._wire
        assert wire is not None
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.reason is not None:
                    nursery.cancel_scope.cancel()
                if self._outbox is not None:
                    nursery.start_soon(self._work)
                beat_at = self._wrote + self._limits.heartbeat
                self._clock.set(self, min(beat_at, self._lease.ends_at - self._clock.seconds))
                try:
                    await wire.closed()
                finally:
                    self._let_go()  # before others have their turn: the nursery takes no more tasks
                    nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._let_go()
        if self.reason is not None:
            await self._say_goodbye(wire)

    def tick(self, now: float) -> float:
        """The clock's: end what is over its time, or beat."""
        # The clock may be late by one tick, and nothing is sent later than the lease.
        ends_at, why = self._lease
        ends_at -= self._clock.seconds
        if now >= ends_at:
            self.end(why)
            return math.inf
        heartbeat = self._limits.heartbeat
        beat_at = self._wrote + heartbeat
        if now >= beat_at:
            self._beat(now)
            beat_at = self._wrote + heartbeat
            if now >= beat_at:  # something is on its way
                beat_at = now + heartbeat / 2
        return min(beat_at, ends_at)

    def _let_go(self) -> None:
        """Be offered nothing more, and be in nobody's hands. Plain; again is no error."""
        self.watermark.move(Event.END)
        self._hub.detach(self)
        self._clock.forget(self)
        self._channel = None
        if self._outbox is not None:
            self._outbox.take()

    def _begin(self, wire: Wire, events: bytes, *, reset: bool = False) -> None:
        """The first write: connected, a reset if the cursor was none of ours, the first page."""
        retry = jittered(self._limits.retry)
        first = connected_event(self.channel_id, time.time_ns() // 1_000_000, retry=retry)
        if reset:
            first += reset_event(self.channel_id)
        first += events
        self._wire = wire
        self._wrote = trio.current_time()
        written = wire.write(chunk(first) if wire.chunked else first)
        if not written or self.watermark.state is State.BEHIND:
            self._start_work()

    def _replay(self, page: Sequence[Frame | Record], *, head: int) -> bytes:
        """What of a page is due, and, if that is all there is, what gathered meanwhile."""
        due = self.watermark.replay(page)
        channel = self._channel
        if channel is not None and self.watermark.seq >= head:
            self._hub.joined(channel, self.watermark.seq)
            due += self.watermark.join(channel.head or 0)
        return b"".join([message.plain for message in due])

    # What cannot be done at once

    def _start_work(self) -> None:
        if self._outbox is None:
            self._outbox = Outbox(limit=self._limits.outbox)
            if self._nursery is not None:
                self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        """Write what the reader did not take at once, and read what is missing, until a live
        frame can be written again where it is published."""
        wire, outbox = self._wire, self._outbox
        assert wire is not None and outbox is not None
        while True:
            try:
                await wire.flush(seconds=self._limits.stall)
            except trio.TooSlowError:
                SLOW_STREAMS.inc()
                self.end(ClosingReason.SLOW)
                return
            if wire.gone:
                return
            if len(outbox):
                self._write(b"".join([frame.plain for frame in outbox.take()]))
            elif self.watermark.state is State.BEHIND:
                await self._read_on()
            else:
                self._outbox = None
                return

    async def _read_on(self) -> None:
        """A page from the watermark on."""
        channel = self._channel
        head = max(self.watermark.seq, (channel.head or 0) if channel else 0)
        try:
            page = await self._store.history(self.channel_id, self.watermark.seq, head=head)
        except StoreUnavailable:
            await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
            return
        except ChannelGone:
            self.end(ClosingReason.ACCESS_REVOKED)
            return
        if due := self._replay(page.records, head=page.head):
            self._write(due)
        elif self.watermark.state is State.BEHIND:
            await trio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))

    def _write(self, events: bytes) -> None:
        wire = self._wire
        assert wire is not None
        self._wrote = trio.current_time()
        wire.write(chunk(events) if wire.chunked else events)

    def _beat(self, now: float) -> None:
        """Unless there is something on its way anyway."""
        wire = self._wire
        assert wire is not None
        if self._outbox is None:
            self._wrote = now
            if not wire.write(_HEARTBEAT_CHUNK if wire.chunked else HEARTBEAT_EVENT):
                self._start_work()
        elif self.watermark.state is State.BEHIND and not len(self._outbox):
            self._wrote = now
            wire.write(_HEARTBEAT_CHUNK if wire.chunked else HEARTBEAT_EVENT)

    async def _say_goodbye(self, wire: Wire) -> None:
        assert self.reason is not None
        pause = least_pause(self.reason, self._limits.retry)
        body = closing_event(self.reason, retry=jittered(pause))
        with trio.move_on_after(GOODBYE_SECONDS, shield=True):
            try:
                wire.write(chunk(body) if wire.chunked else body)
                wire.end()
                await wire.flush(seconds=GOODBYE_SECONDS)
            except Exception as error:
                log.debug("goodbye_failed", channel_id=self.channel_id, **describe(error))
