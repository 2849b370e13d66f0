"""Somebody listens to a channel: opens its stream, checks what it shows, opens it again."""

import random
import time
from typing import TYPE_CHECKING

import gevent
import msgspec

from loadtest.ledger import Reader, Shown
from loadtest.manners import stamped_at
from loadtest.people import Seat
from loadtest.sse import Ended, Refused, Stream
from protocol.cursors import parse_cursor
from protocol.events import CLOSING, RESET
from protocol.parser import ServerSentEvent

if TYPE_CHECKING:
    from loadtest.session import Session

RETRY_SECONDS = 1.5
"""Before a stream that was refused is tried again, jittered up to twice: as the server asks those
that it did let in."""


class _Data(msgspec.Struct, rename="camel"):
    """What we look at of an unnamed event."""

    channel_id: int
    type: str = ""
    text: str = ""
    client_message_id: str = ""


class _Closing(msgspec.Struct):
    reconnect: bool


_decode = msgspec.json.Decoder(_Data).decode
_decode_closing = msgspec.json.Decoder(_Closing).decode


class Listener:
    """One stream after the other, of one seat.

    Args:
        session: of this process.
        seat: whose.
        bytes_per_second: that it reads, for a slow reader; None reads at once.

    Attributes:
        sends: whether the session's pacer may send from this seat.
    """

    __slots__ = (
        "_began",
        "_bytes_per_second",
        "_cursor",
        "_cut",
        "_lost_at",
        "_pause",
        "_reader",
        "_session",
        "_stay_away",
        "_stream",
        "_unread",
        "place",
        "seat",
        "sends",
    )

    def __init__(
        self,
        session: "Session",
        seat: Seat,
        *,
        sends: bool = True,
        bytes_per_second: int | None = None,
    ) -> None:
        self.seat = seat
        self.sends = sends
        self.place = -1  # in the session's list
        self._session = session
        self._bytes_per_second = bytes_per_second
        excused = bytes_per_second is not None
        self._reader: Reader = session.ledger.join(seat.channel_id, excused=excused)
        self._stream: Stream | None = None
        self._cursor = ""
        self._began = 0.0
        self._lost_at: float | None = None
        self._cut = False
        self._pause: float | None = None
        self._stay_away = False
        self._unread = False

    @property
    def online(self) -> bool:
        return self._reader.online_since is not None

    @property
    def heard_at(self) -> float | None:
        return self._stream.heard_at if self._stream is not None and self.online else None

    def run(self) -> None:
        """Listen until killed, or until the server says that coming back is pointless."""
        self._session.came(self)
        try:
            while not self._stay_away:
                gevent.sleep(self._listen_once())
        finally:
            self._session.went(self)
            self._lost_at = None  # left, not lost

    def leave(self) -> None:
        """Nobody comes back here: nothing is owed any more."""
        self._session.ledger.leave(self._reader)

    def take_unread(self) -> bool:
        """Whether somebody else has written since the last call."""
        unread, self._unread = self._unread, False
        return unread

    def cut(self, *, return_within: float | None = None) -> None:
        """Lose the connection, as a phone does in a tunnel.

        Args:
            return_within: seconds, at random; None: when the server asked to.
        """
        if return_within is not None and self._stream is not None:
            self._pause = random.uniform(0.0, return_within)
        if self._stream is not None:
            self._cut = True
            self._stream.close()

    def forget_cursor(self) -> None:
        """The page was closed: the next stream begins with the newest messages."""
        self._cursor = ""

    def _listen_once(self) -> float:
        """One connection; the seconds until the next one."""
        session = self._session
        self._began = time.monotonic()
        self._cut = False
        receive_bytes = None if self._bytes_per_second is None else 2048
        stream = self._stream = Stream(session.target, self._on_event, receive_bytes=receive_bytes)
        try:
            path = f"/api/chat/{self.seat.channel_id}"
            stream.open(path, self.seat.token, cursor=self._cursor)
            self._read(stream)
        except (Refused, Ended, OSError) as error:
            if not self._cut:
                self._note(error)
        finally:
            stream.close()
            self._stream = None
            if self.online:
                session.open -= 1
                session.ledger.away(self._reader)
                self._lost_at = time.monotonic()
        if self._pause is not None:
            pause, self._pause = self._pause, None
            return pause
        if stream.parser.retry is not None:
            return stream.parser.retry / 1e3
        return RETRY_SECONDS * random.uniform(1.0, 2.0)

    def _read(self, stream: Stream) -> None:
        if self._bytes_per_second is None:
            while True:
                stream.read()
        while True:  # a tenth of a second's worth at a time
            size = stream.read(max(16, self._bytes_per_second // 10))
            gevent.sleep(size / self._bytes_per_second)

    def _note(self, error: Exception) -> None:
        figures = self._session.figures
        if self.online:
            figures.ended_by_server()
        else:
            why = str(error) if isinstance(error, Refused | Ended) else type(error).__name__
            figures.connect_failed(time.monotonic() - self._began, why)

    def _on_event(self, event: ServerSentEvent) -> None:
        if event.event == "message":
            data = _decode(event.data)
            if data.type == "connected":
                self._connected()
            elif event.id:
                self._message(event, data)
        elif event.event == RESET:
            self._cursor = ""
            self._session.ledger.reset(self._reader, time.monotonic())
        elif event.event == CLOSING:
            self._stay_away = not _decode_closing(event.data).reconnect

    def _connected(self) -> None:
        now = time.monotonic()
        figures = self._session.figures
        if self._stream is not None and self._stream.opened_at is not None:
            figures.connected(self._stream.opened_at - self._began)
        figures.first_event(now - self._began)
        if self._lost_at is not None:
            figures.reconnected(now - self._lost_at)
            self._lost_at = None
        self._session.open += 1
        self._session.ledger.connected(self._reader, now, resumed=bool(self._cursor))

    def _message(self, event: ServerSentEvent, data: _Data) -> None:
        figures = self._session.figures
        if data.channel_id != self.seat.channel_id:
            figures.leak()
            return
        cursor = parse_cursor(event.id.encode())
        assert cursor is not None  # an empty id is no message's
        shown = self._session.ledger.shown(self._reader, cursor.seq)
        if shown is Shown.DUPLICATE:
            figures.duplicate()
            return
        if shown is Shown.REORDERED:
            figures.reordering()
            return
        if shown is Shown.GAP:
            figures.gap()
        self._cursor = event.id
        self._unread = self._unread or not self.seat.wrote(data.client_message_id)
        self._time(data.text, len(event.data))

    def _time(self, text: str, size: int) -> None:
        now, since = time.monotonic(), self._reader.online_since
        sent_at = stamped_at(text)
        if sent_at is None or since is None:
            return
        if since <= sent_at <= now and not self._reader.excused:
            self._session.figures.delivered(now - sent_at, size)
        else:
            self._session.figures.caught_up(size)
