"""Who listens to what in this process. Nothing here awaits.

A channel's frames leave here in order and without holes, each once: what comes early is held
until what is missing has come, by itself or by `catch_up`. So a stream that is live needs no
more than the next frame, and a stream that joins compares one integer.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from protocol.closing import ClosingReason
from protocol.frames import Frame
from server.metrics import DELIVERIES, DELIVERY_SECONDS, DUPLICATES
from storage.contract import Record

MAX_HELD = 256
"""Early frames that one channel holds; further ones are read from the store."""


class Subscriber(Protocol):
    """What the hub needs of a stream."""

    channel_id: int
    user_id: int

    def offer(self, frame: Frame) -> None:
        """Take the frame or end; plain, and never raises."""

    def end(self, reason: ClosingReason) -> None:
        """Detach and say why; plain."""


class Channel:
    """A channel with at least one stream here."""

    __slots__ = ("filling", "head", "held", "id", "streams", "target")

    def __init__(self, channel_id: int) -> None:
        self.id = channel_id
        self.streams: dict[Subscriber, None] = {}  # ordered: the oldest stream is served first
        self.head: int | None = None
        """The newest number handed out; None until the first stream has read its history."""
        self.target = 0
        """The newest number heard of. `head < target` is a gap."""
        self.held: dict[int, Frame] = {}
        self.filling = False


class Hub:
    """All channels with streams in this process.

    Attributes:
        want: called with a channel's id when its first stream attaches. Plain.
        drop: called when its last one detaches. Plain.
    """

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}
        self.streams = 0
        self.want: Callable[[int], None] = lambda _: None
        self.drop: Callable[[int], None] = lambda _: None
        self._of_user: dict[int, int] = {}
        self._gaps: list[Channel] = []
        self.gap_found = trio.Event()

    def streams_of(self, user_id: int) -> int:
        return self._of_user.get(user_id, 0)

    def all_streams(self) -> list[Subscriber]:
        return [stream for channel in self.channels.values() for stream in channel.streams]

    def attach(self, stream: Subscriber) -> Channel:
        """From now on the stream is offered its channel's frames."""
        channel = self.channels.get(stream.channel_id)
        if channel is None:
            channel = self.channels[stream.channel_id] = Channel(stream.channel_id)
            self.want(channel.id)
        channel.streams[stream] = None
        self.streams += 1
        self._of_user[stream.user_id] = self.streams_of(stream.user_id) + 1
        return channel

    def detach(self, stream: Subscriber) -> None:
        """The hub forgets the stream; again is no error."""
        channel = self.channels.get(stream.channel_id)
        if channel is None or stream not in channel.streams:
            return
        del channel.streams[stream]
        self.streams -= 1
        left = self._of_user.pop(stream.user_id) - 1
        if left:
            self._of_user[stream.user_id] = left
        if not channel.streams:
            del self.channels[channel.id]
            self.drop(channel.id)

    def deliver(self, batch: Sequence[tuple[int, Record]]) -> None:
        """Messages were stored or heard of: in any order, any number of times."""
        for channel_id, record in batch:
            channel = self.channels.get(channel_id)
            if channel is None:
                continue
            if channel.head is not None and record.seq <= channel.head:
                DUPLICATES.inc()
                continue
            self.publish(channel, record.frame())

    def publish(self, channel: Channel, frame: Frame) -> None:
        """Hand a frame to every stream of the channel, in order; or hold it."""
        head = channel.head
        if head is None or frame.seq > head + 1:
            if len(channel.held) < MAX_HELD:
                channel.held[frame.seq] = frame
            self.heard_of(channel, frame.seq)
            return
        if frame.seq <= head:
            return
        self._hand_out(channel, frame)
        if channel.held:
            self._hand_out_held(channel)

    def heard_of(self, channel: Channel, seq: int) -> None:
        """The channel has reached `seq`; what is missing here will be read."""
        channel.target = max(channel.target, seq)
        if channel.head is not None and channel.target > channel.head and not channel.filling:
            channel.filling = True
            self._gaps.append(channel)
            self.gap_found.set()

    def joined(self, channel: Channel, seq: int) -> None:
        """A stream has read its history up to `seq`: news, if the channel knew less."""
        if channel.head is None:
            channel.head = seq
            self._hand_out_held(channel)
        self.heard_of(channel, seq)

    def take_gaps(self) -> list[Channel]:
        """The channels that want reading, each once until its `filling` is reset."""
        gaps, self._gaps = self._gaps, []
        self.gap_found = trio.Event()
        return gaps

    def _hand_out(self, channel: Channel, frame: Frame) -> None:
        channel.head = frame.seq
        if frame.seq > channel.target:
            channel.target = frame.seq
        for stream in tuple(channel.streams):  # a stream that ends here detaches
            stream.offer(frame)
        DELIVERIES.inc(len(channel.streams))
        DELIVERY_SECONDS.observe(max(0.0, time.time() - frame.ts / 1000))

    def _hand_out_held(self, channel: Channel) -> None:
        held = channel.held
        while channel.head is not None and (frame := held.pop(channel.head + 1, None)):
            self._hand_out(channel, frame)
        if held and channel.head is not None:
            for seq in [seq for seq in held if seq <= channel.head]:
                del held[seq]
            if held:
                self.heard_of(channel, max(held))
