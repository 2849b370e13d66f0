"""Events and their bytes, read by the encoder's tests one way and by the parser's the other."""

from typing import NamedTuple

from protocol.closing import ClosingReason
from protocol.frames import (
    HEARTBEAT_EVENT,
    closing_event,
    connected_event,
    encode_event,
    message_frame,
    reset_event,
)
from protocol.parser import ServerSentEvent


class Case(NamedTuple):
    name: str
    encoded: bytes
    """What the encoder made."""
    wire: bytes
    """What it must be, with LF."""
    events: list[ServerSentEvent]
    last_event_id: str = ""
    retry: int | None = None


CASES = [
    Case(
        "a message has its number and one line of data",
        message_frame(17, 0, b'{"text":"hi"}').plain,
        b'id: 17\ndata: {"text":"hi"}\n\n',
        [ServerSentEvent('{"text":"hi"}', id="17")],
        last_event_id="17",
    ),
    Case(
        "a message of a later epoch says so",
        message_frame(17, 0, b"{}", epoch=2).plain,
        b"id: 2.17\ndata: {}\n\n",
        [ServerSentEvent("{}", id="2.17")],
        last_event_id="2.17",
    ),
    Case(
        "connected is unnamed and carries the retry time",
        connected_event(42, 1700000000123, retry=2500),
        b'retry: 2500\ndata: {"type":"connected","channelId":42,"timestamp":1700000000123}\n\n',
        [ServerSentEvent('{"type":"connected","channelId":42,"timestamp":1700000000123}')],
        retry=2500,
    ),
    Case(
        "a heartbeat is a named event",
        HEARTBEAT_EVENT,
        b"event: heartbeat\ndata: {}\n\n",
        [ServerSentEvent("{}", "heartbeat")],
    ),
    Case(
        "a reset makes the client forget its last id",
        reset_event(42),
        b'event: reset\nid: \ndata: {"channelId":42}\n\n',
        [ServerSentEvent('{"channelId":42}', "reset")],
    ),
    Case(
        "closing says why, whether to come back and when",
        closing_event(ClosingReason.DRAIN, retry=1000),
        b'event: closing\nretry: 1000\ndata: {"reason":"drain","reconnect":true}\n\n',
        [ServerSentEvent('{"reason":"drain","reconnect":true}', "closing")],
        retry=1000,
    ),
    Case(
        "data with line breaks takes several lines",
        encode_event("one\n\nthree"),
        b"data: one\ndata: \ndata: three\n\n",
        [ServerSentEvent("one\n\nthree")],
    ),
    Case(
        "empty data is an event all the same",
        encode_event("", event="x"),
        b"event: x\ndata: \n\n",
        [ServerSentEvent("", "x")],
    ),
    Case(
        "leading spaces survive",
        encode_event("  two", event_id=" 1"),
        b"id:  1\ndata:   two\n\n",
        [ServerSentEvent("  two", id=" 1")],
        last_event_id=" 1",
    ),
    Case(
        "letters of every length survive",
        encode_event("é € 😀 \u2028 \u2029 \x85", event="ü"),
        "event: ü\ndata: é € 😀 \u2028 \u2029 \x85\n\n".encode(),
        [ServerSentEvent("é € 😀 \u2028 \u2029 \x85", "ü")],
    ),
]

READ_ONLY_CASES = [
    Case(
        "a byte order mark at the start is none of the data",
        b"",
        b"\xef\xbb\xbfdata: x\n\n",
        [ServerSentEvent("x")],
    ),
    Case(
        "a byte order mark later on is",
        b"",
        b"data: x\n\n\xef\xbb\xbfdata: y\n\ndata: z\n\n",
        [ServerSentEvent("x"), ServerSentEvent("z")],
    ),
    Case("comments are no events", b"", b": hello\n:\n\n:\n\n", []),
    Case(
        "a name without data is no event", b"", b"event: x\n\ndata: y\n\n", [ServerSentEvent("y")]
    ),
    Case(
        "an id without data is no event, and counts",
        b"",
        b"id: 7\n\n",
        [],
        last_event_id="7",
    ),
    Case(
        "an id stays until another one comes",
        b"",
        b"id: 7\ndata: a\n\ndata: b\n\nid: 8\ndata: c\n\n",
        [ServerSentEvent("a", id="7"), ServerSentEvent("b", id="7"), ServerSentEvent("c", id="8")],
        last_event_id="8",
    ),
    Case(
        "an id counts once its event is complete",
        b"",
        b"id: 7\ndata: a\n\nid: 8\ndata: b\n",
        [ServerSentEvent("a", id="7")],
        last_event_id="7",
    ),
    Case(
        "an empty id forgets",
        b"",
        b"id: 7\ndata: a\n\nid\ndata: b\n\n",
        [ServerSentEvent("a", id="7"), ServerSentEvent("b")],
    ),
    Case(
        "an id with a NUL is ignored",
        b"",
        b"id: 7\ndata: a\n\nid: 8\x00\ndata: b\n\n",
        [ServerSentEvent("a", id="7"), ServerSentEvent("b", id="7")],
        last_event_id="7",
    ),
    Case(
        "a retry time is ASCII digits or nothing",
        b"",
        "retry: 1500\n\nretry: 1.5\n\nretry: -1\n\nretry:\n\nretry: ２\n\nretry: 3s\n\n".encode(),
        [],
        retry=1500,
    ),
    Case(
        "a retry time too long to be one is ignored",
        b"",
        b"retry: 1500\n\nretry: " + b"9" * 5000 + b"\n\n",
        [],
        retry=1500,
    ),
    Case(
        "fields may have no space, no value, or a name that nobody knows",
        b"",
        b"data:a\ndata\ndatum: x\nDATA: y\n\n",
        [ServerSentEvent("a\n")],
    ),
    Case(
        "bytes that are no UTF-8 become a question mark",
        b"",
        b"data: \xff\n\n",
        [ServerSentEvent("�")],
    ),
]
