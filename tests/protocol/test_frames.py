"""Events are encoded once, and exactly as WIRE.md and WHATWG HTML §9.2.5 have them."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.closing import CLOSING_RULES, PASSING, ClosingReason, least_pause
from protocol.events import ChatMessage
from protocol.frames import (
    chunk,
    closing_event,
    encode_event,
    join_frames,
    message_frame,
)
from protocol.parser import EventStreamParser, ServerSentEvent
from protocol.problems import PROBLEMS
from tests.protocol.cases import CASES, Case

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r: \u2028"))
LINE = TEXT.map(lambda text: text.translate({10: None, 13: None, 0: None}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_event_is_encoded_as_it_must_be(case: Case):
    assert case.encoded == case.wire


@given(
    data=TEXT,
    event=st.none() | LINE.filter(bool),
    event_id=st.none() | LINE,
    retry=st.none() | st.integers(0, 10**9),
    cut=st.integers(1, 40),
)
def test_any_event_is_read_back_however_it_is_split(data, event, event_id, retry, cut):
    raw = encode_event(data, event=event, event_id=event_id, retry=retry)
    parser = EventStreamParser()
    got = [e for at in range(0, len(raw), cut) for e in parser.feed(raw[at : at + cut])]
    lines = data.replace("\r\n", "\n").replace("\r", "\n")
    assert got == [ServerSentEvent(lines, event or "message", event_id or "")]
    assert parser.last_event_id == (event_id or "")
    assert parser.retry == retry


@given(text=TEXT, author=TEXT, seq=st.integers(1, 2**63 - 1), epoch=st.integers(0, 9))
def test_any_message_is_one_event_with_its_number(text: str, author: str, seq: int, epoch: int):
    message = ChatMessage(
        id="00000000-0000-4000-8000-000000000001",
        text=text,
        author=author,
        author_email="a@example.com",
        channel_id=42,
        ts=1,
        message_type="STANDARD",
    )
    frame = message_frame(seq, 1, msgspec.json.encode(message), epoch=epoch)
    (event,) = EventStreamParser().feed(frame.plain)
    assert event.event == "message"
    assert event.id == (f"{epoch}.{seq}" if epoch else str(seq))
    assert msgspec.json.decode(event.data, type=ChatMessage) == message


def test_line_breaks_in_a_message_make_no_lines_on_the_wire():
    text = "a\nb\r\nc\rd\u2028e\x85\n\nid: 99\ndata: forged\n\n"
    frame = message_frame(1, 0, msgspec.json.encode({"text": text}))
    assert frame.plain.count(b"\n") == 3
    assert b"\r" not in frame.plain


@given(st.binary(min_size=1, max_size=70_000))
def test_a_chunk_says_its_own_length(data: bytes):
    size, _, rest = chunk(data).partition(b"\r\n")
    assert int(size, 16) == len(data)
    assert rest == data + b"\r\n"


def test_a_frame_is_wrapped_once_and_shows_no_text():
    frame = message_frame(3, 5, b'{"text":"canary"}')
    assert frame.chunked == chunk(frame.plain)
    assert (frame.seq, frame.ts) == (3, 5)
    assert "canary" not in repr(frame)


def test_frames_that_follow_each_other_become_one_write_in_their_order():
    frames = [message_frame(seq, 10 * seq, b'{"n":%d}' % seq) for seq in (4, 5, 6)]
    joined = join_frames(frames)
    assert joined.plain == b"".join(frame.plain for frame in frames)
    assert joined.chunked == chunk(joined.plain), "one chunk"
    assert (joined.first, joined.seq, joined.ts) == (4, 6, 60)
    assert joined.parts == tuple(frames)
    again = join_frames([joined, message_frame(7, 0, b"{}")])
    assert (again.first, again.seq) == (4, 7)
    assert len(EventStreamParser().feed(again.plain)) == 4


def test_a_lone_frame_is_handed_on_as_it_is():
    frame = message_frame(3, 5, b"{}")
    assert join_frames([frame]) is frame
    assert (frame.first, frame.seq, frame.parts) == (3, 3, ())


@given(st.binary(min_size=1, max_size=5000).filter(lambda data: b"\n" not in data))
def test_the_events_are_cut_out_of_the_chunk_whatever_its_length(data: bytes):
    assert message_frame(1, 0, data).plain == b"id: 1\ndata: " + data + b"\n\n"


@pytest.mark.parametrize(
    ("reason", "reconnect", "next_status"),
    [
        ("drain", True, None),
        ("slow", True, None),
        ("session_ended", True, None),
        ("access_revoked", False, 403),
        ("subscription_ended", False, 403),
        ("max_age", True, None),
        ("too_many_streams", True, None),
        ("chat_disabled", False, 404),
        ("channel_blocked", False, 403),
        ("server_full", True, None),
        ("unavailable", True, None),
    ],
)
def test_a_closing_event_says_whether_coming_back_helps(
    reason: str, reconnect: bool, next_status: int | None
):
    rule = CLOSING_RULES[ClosingReason(reason)]
    assert (rule.reconnect, rule.next_status) == (reconnect, next_status)
    said = b"true" if reconnect else b"false"
    assert closing_event(ClosingReason(reason)) == (
        b'event: closing\ndata: {"reason":"%b","reconnect":%b}\n\n' % (reason.encode(), said)
    )


def test_every_closing_reason_has_a_rule_and_an_end_where_coming_back_is_pointless():
    assert set(CLOSING_RULES) == set(ClosingReason)
    assert len(ClosingReason) == 11, "a new reason needs its row above"
    for rule in CLOSING_RULES.values():
        assert rule.reconnect is (rule.next_status is None)
        assert rule.next_status is None or 400 <= rule.next_status < 500
        assert rule.meaning


def test_every_problem_that_may_pass_closes_a_stream_that_comes_back():
    for code, reason in PASSING.items():
        assert CLOSING_RULES[reason].reconnect
        assert PROBLEMS[code].status in (401, 429, 500, 503)
    lasting = {code for code, kind in PROBLEMS.items() if kind.status >= 500} - set(PASSING)
    assert lasting == {"METHOD_UNKNOWN", "HTTP_VERSION"}, "which an EventSource never meets"


def test_a_closed_stream_stays_away_for_as_long_as_its_reason_asks():
    assert least_pause(ClosingReason.DRAIN, 1500) == 1500
    assert least_pause(ClosingReason.UNAVAILABLE, 1500) == 5000
    assert least_pause(ClosingReason.UNAVAILABLE, 9000) == 9000
    assert least_pause(ClosingReason.TOO_MANY_STREAMS, 1500) >= 60_000, "minutes"
    for reason, rule in CLOSING_RULES.items():
        assert rule.reconnect or not rule.pause, reason
