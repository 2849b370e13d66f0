"""What every stream was owed and what it was shown. Nothing here does I/O or knows Locust.

A message is owed to each stream of its channel that was open when it was sent, and to each that
was away and comes back with its cursor. `settle` looks, some seconds after a message was
acknowledged, whether all of them have it. The order is judged at once, by the sequence numbers.
"""

from collections import deque
from enum import Enum
from typing import NamedTuple

import msgspec

SETTLE_SECONDS = 5.0
"""From the acknowledgment until a message must have been shown: more than the four seconds after
which the servers look for what got lost between them."""
PAGE = 50
"""Messages that a stream without a cursor begins with (SOTTOVOCE_HISTORY_SIZE)."""
MAX_MISSING = 1_000
"""Numbers that a reader remembers as missing, to tell what comes late from what comes twice."""


class Shown(Enum):
    """How an event's number follows those before it."""

    NEXT = "next"
    GAP = "gap"
    DUPLICATE = "duplicate"
    REORDERED = "reordered"


class Tally(msgspec.Struct):
    """Counts since the beginning of a run. Those of several processes add up.

    Attributes:
        connects, connect_failures: attempts to open a stream, and those that failed.
        reconnects: streams that were resumed after they had been lost.
        ended_by_server: streams that said `closing`, or just ended.
        shown: messages, on any stream.
        expected: messages times the streams that they were owed to, as far as that is judged.
        delivered: of these, how many had been shown.
        lost: of these, how many had not.
        duplicates, reorderings, leaks: events that should not have been.
        gaps: numbers that were left out.
        lost_heartbeats: times that a stream was silent for too long.
        resets: streams whose cursor the server refused.
        sends, send_failures: acknowledged, and attempts that were not.
    """

    connects: int = 0
    connect_failures: int = 0
    reconnects: int = 0
    ended_by_server: int = 0
    shown: int = 0
    expected: int = 0
    delivered: int = 0
    lost: int = 0
    duplicates: int = 0
    reorderings: int = 0
    leaks: int = 0
    gaps: int = 0
    lost_heartbeats: int = 0
    resets: int = 0
    sends: int = 0
    send_failures: int = 0

    def plus(self, other: "Tally", times: int = 1) -> "Tally":
        return Tally(
            **{
                name: getattr(self, name) + times * getattr(other, name)
                for name in self.__struct_fields__
            }
        )

    def minus(self, other: "Tally") -> "Tally":
        return self.plus(other, -1)

    @property
    def delivery_percent(self) -> float:
        """Of what was owed; 100 as long as nothing was."""
        return 100.0 * self.delivered / self.expected if self.expected else 100.0


class Channel:
    """A channel that this process sends to and listens to.

    Attributes:
        head: the newest number that was acknowledged or shown; None until there is one.
        in_flight: sends that have no answer. They may be stored, so the channel may have come as
            far as `head + in_flight`.
    """

    __slots__ = ("head", "id", "in_flight", "readers")

    def __init__(self, channel_id: int) -> None:
        self.id = channel_id
        self.head: int | None = None
        self.in_flight = 0
        self.readers: list[Reader] = []

    def reached(self, seq: int) -> None:
        self.head = seq if self.head is None else max(self.head, seq)


class Reader:
    """Somebody who listens to a channel, over any number of connections.

    Attributes:
        last: the highest number shown; None before the first one.
        joined_at: since when everything that is sent is owed.
        online_since: None while it is away.
        excused: it reads slowly on purpose: its order is judged, its time is not.
    """

    __slots__ = ("channel", "excused", "joined_at", "last", "missing", "online_since")

    def __init__(self, channel: Channel, *, excused: bool = False) -> None:
        self.channel = channel
        self.excused = excused
        self.last: int | None = None
        self.missing: set[int] | None = None
        self.joined_at: float | None = None
        self.online_since: float | None = None

    def has(self, seq: int) -> bool:
        if self.last is None or seq > self.last:
            return False
        return not self.missing or seq not in self.missing


class _Acknowledged(NamedTuple):
    seq: int
    channel: Channel
    readers: list[Reader] | None
    """None: all that are there when it is looked at."""
    sent_at: float
    due_at: float


class Ledger:
    """Of one process: whoever listens to a channel and whoever sends to it share one.

    Args:
        settle_seconds: from the acknowledgment until a message must have been shown.
    """

    def __init__(self, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self.tally = Tally()
        self.settle_seconds = settle_seconds
        self._channels: dict[int, Channel] = {}
        self._pending: deque[_Acknowledged] = deque()

    @property
    def pending(self) -> int:
        """Acknowledged messages that nobody has looked for yet."""
        return len(self._pending)

    def join(self, channel_id: int, *, excused: bool = False) -> Reader:
        channel = self._channel(channel_id)
        reader = Reader(channel, excused=excused)
        channel.readers.append(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """Nothing is owed to it any more."""
        reader.online_since = None
        if reader in reader.channel.readers:
            reader.channel.readers.remove(reader)

    # What a stream sees

    def connected(self, reader: Reader, now: float, *, resumed: bool) -> None:
        """A stream is open.

        Args:
            resumed: it gave the cursor `reader.last`; else it begins with the newest page.
        """
        reader.online_since = now
        if not resumed or reader.joined_at is None:
            reader.joined_at = now
            if not resumed:
                reader.last = None
                reader.missing = None

    def away(self, reader: Reader) -> None:
        reader.online_since = None

    def reset(self, reader: Reader, now: float) -> None:
        """The server refused the cursor: what follows starts afresh, with numbers of its own."""
        self.tally.resets += 1
        reader.channel.head = None
        self.connected(reader, now, resumed=False)

    def shown(self, reader: Reader, seq: int) -> Shown:
        """An event came. For a gap `reader.last` has grown by more than one."""
        self.tally.shown += 1
        last = reader.last
        if last is None:
            return self._shown_first(reader, seq)
        if seq == last + 1:
            self._advance(reader, seq)
            return Shown.NEXT
        if seq > last:
            return self._leave_out(reader, last + 1, seq)
        if reader.missing and seq in reader.missing:
            reader.missing.remove(seq)
            self.tally.reorderings += 1
            return Shown.REORDERED
        self.tally.duplicates += 1
        return Shown.DUPLICATE

    def _shown_first(self, reader: Reader, seq: int) -> Shown:
        """A page begins at the first message of all, or it is full."""
        channel = reader.channel
        if seq > 1 and channel.head is not None:
            newest = channel.head + channel.in_flight
            if (first := max(1, newest - PAGE + 1)) < seq:
                return self._leave_out(reader, first, seq)
        self._advance(reader, seq)
        return Shown.NEXT

    def _leave_out(self, reader: Reader, first: int, seq: int) -> Shown:
        self.tally.gaps += seq - first
        if reader.missing is None:
            reader.missing = set()
        room = MAX_MISSING - len(reader.missing)
        reader.missing.update(range(max(first, seq - room), seq))
        self._advance(reader, seq)
        return Shown.GAP

    def _advance(self, reader: Reader, seq: int) -> None:
        reader.last = seq
        reader.channel.reached(seq)

    # What a sender knows

    def sending(self, channel_id: int) -> None:
        """From here on the channel may have one more."""
        self._channel(channel_id).in_flight += 1

    def acknowledged(self, channel_id: int, seq: int, *, sent_at: float, now: float) -> None:
        """The server has it. A send that is never acknowledged stays in flight: nobody knows."""
        channel = self._channel(channel_id)
        channel.in_flight -= 1
        channel.reached(seq)
        self.tally.sends += 1
        due_at = now + self.settle_seconds
        self._pending.append(_Acknowledged(seq, channel, None, sent_at, due_at))

    def refused(self, channel_id: int) -> None:
        """The server has said that it does not have it."""
        self._channel(channel_id).in_flight -= 1

    def settle(self, now: float) -> int:
        """Look for what should have been shown by now; how many deliveries were missing.

        Who is away, or has just come back, is looked at again later.
        """
        lost = 0
        while self._pending and self._pending[0].due_at <= now:
            message = self._pending.popleft()
            readers = message.channel.readers if message.readers is None else message.readers
            waiting = []
            for reader in readers:
                if reader.joined_at is None or message.sent_at < reader.joined_at:
                    continue
                if reader.has(message.seq):
                    self.tally.delivered += 1
                elif reader not in message.channel.readers:
                    continue  # it has left meanwhile
                elif (
                    reader.excused
                    or reader.online_since is None
                    or reader.online_since > now - self.settle_seconds
                ):
                    waiting.append(reader)
                    continue
                else:
                    self.tally.lost += 1
                    lost += 1
                self.tally.expected += 1
            if waiting:
                due_at = now + self.settle_seconds
                self._pending.append(message._replace(readers=waiting, due_at=due_at))
        return lost

    def _channel(self, channel_id: int) -> Channel:
        channel = self._channels.get(channel_id)
        if channel is None:
            channel = self._channels[channel_id] = Channel(channel_id)
        return channel
