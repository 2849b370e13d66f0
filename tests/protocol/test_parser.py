"""The parser reads what WHATWG HTML §9.2.6 says, however the bytes are split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.parser import EventStreamParser, ServerSentEvent
from tests.protocol.cases import CASES, READ_ONLY_CASES, Case


def read(pieces: list[bytes]) -> tuple[list[ServerSentEvent], str, int | None]:
    parser = EventStreamParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events, parser.last_event_id, parser.retry


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("case", CASES + READ_ONLY_CASES, ids=lambda case: case.name)
def test_the_bytes_mean_the_events_wherever_they_are_split(case: Case, end: bytes):
    raw = case.wire.replace(b"\n", end)
    expected = (case.events, case.last_event_id, case.retry)
    assert read([raw]) == expected
    assert read([raw[i : i + 1] for i in range(len(raw))]) == expected
    for at in range(len(raw) + 1):
        assert read([raw[:at], b"", raw[at:]]) == expected, f"split at {at}"


def test_line_ends_may_be_mixed():
    assert read([b"data: a\rdata: b\r\ndata: c\n\r\n"])[0] == [ServerSentEvent("a\nb\nc")]
    assert read([b"data: a\n\rdata: b\r\r"])[0] == [ServerSentEvent("a"), ServerSentEvent("b")]


def test_an_event_that_ends_in_a_lone_cr_is_given_at_once():
    """The LF that may follow may be a long time coming."""
    parser = EventStreamParser()
    assert parser.feed(b"data: a\r\n\r") == [ServerSentEvent("a")]
    assert parser.feed(b"\ndata: b\r\n\r\n") == [ServerSentEvent("b")]


def test_half_a_byte_order_mark_is_data_in_the_end():
    assert read([b"\xef\xbb", b"data: a\n\n", b"data: b\n\n"])[0] == [ServerSentEvent("b")]


def test_an_event_that_never_ends_is_never_given():
    assert read([b"data: a\n"]) == ([], "", None)


@given(st.lists(st.binary(max_size=30), max_size=10))
def test_no_bytes_break_it(pieces: list[bytes]):
    assert read(pieces) == read([b"".join(pieces)])


def test_an_events_repr_shows_no_text():
    event = ServerSentEvent("canary", "message", "7")
    assert "canary" not in f"{event!r} {event} {[event]}"
