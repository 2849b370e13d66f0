"""Server-Sent Events, encoded once. Nothing here knows HTTP, but for the chunk's two lengths.

WHATWG HTML §9.2.5 "Parsing an event stream" is the format; RFC 9112 §7.1 the chunk.
"""

from collections.abc import Sequence

import msgspec

from protocol.closing import CLOSING_RULES, ClosingReason
from protocol.cursors import encode_cursor
from protocol.events import CLOSING, HEARTBEAT, RESET, Closing, Connected, Reset

_encode = msgspec.json.Encoder().encode


class Frame:
    """One message, or some that follow each other, as it stands on every stream of a channel:
    made once per process. The fan-out hands out these same objects and copies nothing.

    Attributes:
        first, seq: the numbers of its first and last message.
        ts: when the last one was stored, in milliseconds since the epoch.
        chunked: the events wrapped as one HTTP/1.1 chunk.
        parts: the frames that it was joined from; empty for a single message.
    """

    __slots__ = ("_plain_at", "chunked", "first", "parts", "seq", "ts")

    def __init__(self, seq: int, ts: int, plain: bytes, parts: tuple["Frame", ...] = ()) -> None:
        self.first: int = parts[0].first if parts else seq
        self.seq = seq
        self.ts = ts
        self.chunked = chunk(plain)
        self.parts = parts
        self._plain_at = len(self.chunked) - len(plain) - 2

    @property
    def plain(self) -> bytes:
        """The events alone; cut out when asked for, so that a frame is held once."""
        return self.chunked[self._plain_at : -2]

    def __repr__(self) -> str:
        return f"<Frame seq={self.seq} {len(self.chunked)} bytes>"


def message_frame(seq: int, ts: int, data: bytes, *, epoch: int = 0) -> Frame:
    """A chat message's frame.

    Args:
        data: the JSON of an `events.ChatMessage`: one line, as every JSON encoder here writes
            it (line breaks inside strings are escaped).
    """
    return Frame(seq, ts, message_event(seq, data, epoch=epoch))


def message_event(seq: int, data: bytes, *, epoch: int = 0) -> bytes:
    """The event of a `message_frame`, for one stream alone."""
    return b"id: %b\ndata: %b\n\n" % (encode_cursor(epoch, seq), data)


def chunk(data: bytes) -> bytes:
    """`data`, not empty, as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_event(
    data: bytes | str,
    *,
    event: str | None = None,
    event_id: str | None = None,
    retry: int | None = None,
) -> bytes:
    """Any event, also one whose data has line breaks.

    Args:
        event: its name, without line breaks; None for one that `onmessage` gets.
        event_id: its `id:`, without NUL or line breaks; an empty one makes the
            client forget its last one.
        retry: milliseconds that the client waits before it reconnects.
    """
    lines: list[bytes] = []
    if event is not None:
        lines.append(b"event: " + event.encode())
    if event_id is not None:
        lines.append(b"id: " + event_id.encode())
    if retry is not None:
        lines.append(b"retry: %d" % retry)
    raw = data.encode() if isinstance(data, str) else data
    lines.extend(
        b"data: " + line for line in raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    )
    return b"\n".join(lines) + b"\n\n"


def connected_event(channel_id: int, timestamp: int, *, retry: int) -> bytes:
    return encode_event(_encode(Connected(channel_id, timestamp)), retry=retry)


def reset_event(channel_id: int) -> bytes:
    """The empty id makes the client forget the cursor that was refused."""
    return encode_event(_encode(Reset(channel_id)), event=RESET, event_id="")


def closing_event(reason: ClosingReason, *, retry: int | None = None) -> bytes:
    data = _encode(Closing(reason, CLOSING_RULES[reason].reconnect))
    return encode_event(data, event=CLOSING, retry=retry)


HEARTBEAT_EVENT = encode_event(b"{}", event=HEARTBEAT)


def join_frames(frames: Sequence[Frame]) -> Frame:
    """Frames that follow each other, at least one, as one write."""
    if len(frames) == 1:
        return frames[0]
    last = frames[-1]
    return Frame(last.seq, last.ts, b"".join([frame.plain for frame in frames]), tuple(frames))
