"""Who listens to what in this process. Nothing that publishes here awaits.

A channel's frames leave here in order and without holes, each once: what comes early is held
until what is missing has come, by itself or by `catch_up`. So a stream that is live needs no
more than the next frame, and a stream that joins compares one integer.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from protocol.closing import ClosingReason
from protocol.frames import Frame, join_frames
from server.live.openings import Openings
from server.metrics import DELIVERIES, DELIVERY_SECONDS, DUPLICATES
from storage.contract import Record

MAX_HELD = 256
"""Early frames that one channel holds; further ones are read from the store."""
MAX_RECENT = 16
MAX_RECENT_BYTES = 8 * 1024
"""Of the last frames of one channel, kept for streams that come back."""
QUIET_SECONDS = 30.0
"""That a channel is kept after its last stream. Clients come back within three seconds."""
MAX_QUIET = 20_000


class Subscriber(Protocol):
    """What the hub needs of a stream."""

    channel_id: int
    user_id: int
    subject: str

    def offer(self, frame: Frame, now: float) -> None:
        """Take the frame or end; plain, and never raises. `now` is Trio's time."""

    def end(self, reason: ClosingReason) -> None:
        """Detach and say why; plain."""


class Channel:
    """A channel with a stream here, or with one a moment ago."""

    __slots__ = ("filling", "head", "held", "id", "recent", "streams", "target")

    def __init__(self, channel_id: int) -> None:
        self.id = channel_id
        self.streams: dict[Subscriber, None] = {}  # ordered: the oldest stream is served first
        self.head: int | None = None
        """The newest number handed out; None until the first stream has read its history."""
        self.target = 0
        """The newest number heard of. `head < target` is a gap."""
        self.held: dict[int, Frame] | None = None
        self.recent: deque[Frame] | None = None
        """The last ones handed out, without holes up to `head`."""
        self.filling = False


class Hub:
    """All channels with streams in this process.

    Attributes:
        want: called with a channel's id when its first stream attaches. Plain.
        drop: called when its last one has been gone for a while. Plain.
    """

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}
        self.streams = 0
        self.want: Callable[[int], None] = lambda _: None
        self.drop: Callable[[int], None] = lambda _: None
        self._of_user: dict[int, tuple[Subscriber, ...]] = {}
        """By user: their streams, the oldest first."""
        self._quiet: dict[Channel, float] = {}
        """Channels without streams, and since when; the longest first."""
        self._openings = Openings()
        self._gaps: list[Channel] = []
        self.gap_found = trio.Event()

    def streams_of(self, user_id: int) -> tuple[Subscriber, ...]:
        """A user's streams, the oldest first."""
        return self._of_user.get(user_id, ())

    def all_streams(self) -> list[Subscriber]:
        return [stream for channel in self.channels.values() for stream in channel.streams]

    def attach(self, stream: Subscriber) -> Channel:
        """From now on the stream is offered its channel's frames."""
        channel = self.channels.get(stream.channel_id)
        if channel is None:
            channel = self.channels[stream.channel_id] = Channel(stream.channel_id)
            self.want(channel.id)
        self._quiet.pop(channel, None)
        channel.streams[stream] = None
        self.streams += 1
        self._of_user[stream.user_id] = (*self.streams_of(stream.user_id), stream)
        return channel

    def detach(self, stream: Subscriber) -> None:
        """The hub forgets the stream; again is no error.

        A channel is kept for a while after its last stream, with its subscription: whoever was
        cut off comes back, and is then given what they missed from here.
        """
        channel = self.channels.get(stream.channel_id)
        if channel is None or stream not in channel.streams:
            return
        del channel.streams[stream]
        self.streams -= 1
        left = tuple(each for each in self._of_user.pop(stream.user_id) if each is not stream)
        if left:
            self._of_user[stream.user_id] = left
        if not channel.streams:
            self._quiet[channel] = trio.current_time()
            if channel.head is None or len(self._quiet) > MAX_QUIET:
                self._forget(channel if channel.head is None else next(iter(self._quiet)))

    async def serve(self) -> None:
        """Let go of channels whose last stream is gone for long, until cancelled."""
        while True:
            await trio.sleep_until(trio.current_time() // 1 + 1)  # with the clock, not between
            self._openings.forget_old()
            while self._quiet:
                channel, since = next(iter(self._quiet.items()))
                if trio.current_time() - since < QUIET_SECONDS:
                    break
                self._forget(channel)

    def recall(self, channel: Channel, cursor: int | None, *, head: int) -> list[Frame] | None:
        """What comes after a cursor, if this process has all of it.

        Args:
            head: a number that the channel is known to have reached.

        Returns:
            The frames, none for a cursor at the head; or None: read the store.
        """
        known = channel.head
        if cursor is None or known is None or channel.target > known or head > known:
            return None
        if cursor == known:
            return []
        if cursor > known or not channel.recent or channel.recent[0].first > cursor + 1:
            return None
        return [frame for frame in channel.recent if frame.seq > cursor]

    def opening(self, channel: Channel, *, head: int) -> bytes | None:
        """What a stream without a cursor begins with, if one did so a moment ago and the channel
        is where it was then.

        Args:
            head: a number that the channel is known to have reached.
        """
        known = channel.head
        if known is None or channel.target > known or head > known:
            return None
        return self._openings.find(channel.id, known)

    def keep_opening(self, channel: Channel, seq: int, events: bytes) -> None:
        """A stream without a cursor begins with these events, the last of which is `seq`."""
        self._openings.keep(channel.id, seq, events)

    def deliver(self, batch: Sequence[tuple[int, Record]]) -> None:
        """Messages were stored or heard of: in any order, any number of times."""
        found: dict[Channel, list[Frame]] = {}
        for channel_id, record in batch:
            channel = self.channels.get(channel_id)
            if channel is None:
                continue
            if channel.head is not None and record.seq <= channel.head:
                DUPLICATES.inc()
                continue
            found.setdefault(channel, []).append(record.frame())
        for channel, frames in found.items():
            self.publish(channel, frames)

    def publish(self, channel: Channel, frames: Sequence[Frame]) -> None:
        """Hand frames to every stream of the channel, those in order as one write; hold others."""
        head, newest = channel.head, 0
        due: list[Frame] = []
        for frame in frames:
            newest = max(newest, frame.seq)
            if head is not None and frame.seq == head + 1:
                due.append(frame)
                head = frame.seq
            elif head is None or frame.seq > head:
                if channel.held is None:
                    channel.held = {}
                if len(channel.held) < MAX_HELD:
                    channel.held[frame.seq] = frame
        self._hand_out(channel, due)
        self.heard_of(channel, newest)

    def heard_of(self, channel: Channel, seq: int) -> None:
        """The channel has reached `seq`; what is missing here will be read."""
        channel.target = max(channel.target, seq)
        if channel.head is not None and channel.target > channel.head and not channel.filling:
            channel.filling = True
            self._gaps.append(channel)
            self.gap_found.set()

    def skip(self, channel: Channel, seq: int) -> None:
        """No number up to `seq` that is missing here is stored any more: what follows is next.
        Each stream sees a gap, reads what the store has, and goes on behind it. Plain."""
        if channel.head is not None and channel.head < seq:
            channel.head = seq
            self._hand_out(channel, [])

    def joined(self, channel: Channel, seq: int) -> None:
        """A stream has read its history up to `seq`: news, if the channel knew less."""
        if channel.head is None:
            channel.head = seq
            self._hand_out(channel, [])
        self.heard_of(channel, seq)

    def take_gaps(self) -> list[Channel]:
        """The channels that want reading, each once until its `filling` is reset."""
        gaps, self._gaps = self._gaps, []
        self.gap_found = trio.Event()
        return gaps

    def _hand_out(self, channel: Channel, due: list[Frame]) -> None:
        """Those, which follow the head, and whatever was held and follows them."""
        if channel.held:
            self._take_held(channel, due)
        if not due:
            return
        frame = join_frames(due)
        channel.head = frame.seq
        channel.target = max(channel.target, frame.seq)
        now = trio.current_time()
        for stream in tuple(channel.streams):  # a stream that ends here detaches
            stream.offer(frame, now)
        self._remember(channel, due)
        DELIVERIES.inc(len(due) * len(channel.streams))
        clock = time.time()
        for each in due:
            DELIVERY_SECONDS.observe(max(0.0, clock - each.ts / 1000))

    def _take_held(self, channel: Channel, due: list[Frame]) -> None:
        held, head = channel.held, due[-1].seq if due else channel.head
        if held is None or head is None:
            return
        while (frame := held.pop(head + 1, None)) is not None:
            due.append(frame)
            head = frame.seq
        for seq in [seq for seq in held if seq <= head]:
            del held[seq]
        if not held:
            channel.held = None

    def _remember(self, channel: Channel, frames: list[Frame]) -> None:
        recent = channel.recent
        if recent is None:
            recent = channel.recent = deque(maxlen=MAX_RECENT)
        recent.extend(frames)
        size = sum(len(frame.chunked) for frame in recent)
        while size > MAX_RECENT_BYTES:
            size -= len(recent.popleft().chunked)

    def _forget(self, channel: Channel) -> None:
        self._quiet.pop(channel, None)
        self._openings.forget(channel.id)
        del self.channels[channel.id]
        self.drop(channel.id)
