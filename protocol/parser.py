"""An incremental reader of event streams, for our own clients and for the encoder's tests.

WHATWG HTML §9.2.6 "Interpreting an event stream", fed any split of the bytes.
"""

from typing import NamedTuple


class ServerSentEvent(NamedTuple):
    data: str
    event: str = "message"
    id: str = ""
    """The last event id as it stands after this event."""

    def __repr__(self) -> str:
        return f"<ServerSentEvent {self.event} id={self.id!r}>"


class EventStreamParser:
    """Turns bytes into events. `last_event_id` and `retry` (ms) hold what the stream said."""

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._buffer = bytearray()
        self._first = True
        self._skip_lf = False
        self._data: list[str] = []
        self._event = ""
        self._id = ""

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Events that `data` completes, in order."""
        events: list[ServerSentEvent] = []
        self._buffer += data
        if self._first:
            if len(self._buffer) < 3 and b"\xef\xbb\xbf".startswith(bytes(self._buffer)):
                return events
            self._first = False
            if self._buffer.startswith(b"\xef\xbb\xbf"):
                del self._buffer[:3]
        while (line := self._next_line()) is not None:
            if line:
                self._field(line.decode("utf-8", "replace"))
            elif (event := self._dispatch()) is not None:
                events.append(event)
        return events

    def _next_line(self) -> bytes | None:
        """A line ends at CR LF, LF or CR. A lone CR at the end ends it too: the LF that may
        follow in the next bytes is skipped then."""
        buffer = self._buffer
        if self._skip_lf and buffer:
            self._skip_lf = False
            if buffer[0] == 0x0A:
                del buffer[0]
        lf, cr = buffer.find(b"\n"), buffer.find(b"\r")
        if lf < 0 and cr < 0:
            return None
        end = cr if lf < 0 or 0 <= cr < lf else lf
        line = bytes(buffer[:end])
        self._skip_lf = end == cr
        del buffer[: end + 1]
        return line

    def _field(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if colon and value.startswith(" "):
            value = value[1:]
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._event = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit() and len(value) < 19:
                self.retry = int(value)
            case _:  # a comment, or a field that the format does not know
                pass

    def _dispatch(self) -> ServerSentEvent | None:
        self.last_event_id = self._id
        data, self._data = self._data, []
        name, self._event = self._event, ""
        if not data:
            return None
        return ServerSentEvent("\n".join(data), name or "message", self.last_event_id)
