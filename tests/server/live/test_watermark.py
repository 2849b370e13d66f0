"""Whatever the fast path does to the frames, a stream is given each once, in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.frames import Frame, join_frames
from server.live.watermark import MAX_GATHERED, Event, State, Watermark
from tests.server.live.fakes import frame, frames

TABLE = [
    (State.BEHIND, Event.CAUGHT_UP, State.LIVE),
    (State.BEHIND, Event.GAP, State.BEHIND),
    (State.BEHIND, Event.END, State.ENDED),
    (State.LIVE, Event.CAUGHT_UP, State.LIVE),
    (State.LIVE, Event.GAP, State.BEHIND),
    (State.LIVE, Event.END, State.ENDED),
    (State.ENDED, Event.CAUGHT_UP, State.ENDED),
    (State.ENDED, Event.GAP, State.ENDED),
    (State.ENDED, Event.END, State.ENDED),
]


@pytest.mark.parametrize(("state", "event", "after"), TABLE)
def test_an_event_moves_it_as_the_table_says(state: State, event: Event, after: State):
    mark = Watermark()
    mark.state = state
    mark.move(event)
    assert mark.state is after


def test_the_table_is_whole():
    assert {(s, e) for s, e, _ in TABLE} == {(s, e) for s in State for e in Event}


def seqs(given_out: list[Frame]) -> list[int]:
    return [each.seq for each in given_out]


def state(mark: Watermark) -> State:
    """As a call: mypy would take what was asserted before for still true."""
    return mark.state


def live(seq: int) -> Watermark:
    mark = Watermark(seq)
    assert mark.join(seq) == []
    assert state(mark) is State.LIVE
    return mark


def test_a_live_stream_is_given_the_next_frame_and_no_other():
    mark = live(5)
    assert mark.offer(frame(6))
    assert not mark.offer(frame(6)), "again"
    assert not mark.offer(frame(3)), "an old one"
    assert state(mark) is State.LIVE
    assert not mark.offer(frame(8)), "a gap"
    assert state(mark) is State.BEHIND
    assert not mark.offer(frame(7)), "too late: it reads now"
    assert mark.seq == 6


def test_the_next_batch_is_handed_on_as_it_is():
    mark = live(5)
    batch = join_frames(frames(6, 7, 8))
    assert mark.offer(batch) is batch
    assert mark.seq == 8
    assert mark.offer(batch) is None, "again"
    assert state(mark) is State.LIVE


def test_of_a_batch_that_it_has_begun_only_the_rest_is_handed_on():
    mark = live(5)
    due = mark.offer(join_frames(frames(4, 5, 6, 7)))
    assert due is not None
    assert due.plain == b"".join(each.plain for each in frames(6, 7))
    assert (due.first, due.seq, mark.seq) == (6, 7, 7)
    lone = mark.offer(join_frames(frames(7, 8)))
    assert lone is not None
    assert lone.chunked == frame(8).chunked
    assert state(mark) is State.LIVE


def test_a_batch_after_a_gap_gathers_message_by_message():
    mark = live(5)
    assert mark.offer(join_frames(frames(8, 9, 10))) is None
    assert state(mark) is State.BEHIND
    assert seqs(mark.replay(frames(6, 7, 8))) == [6, 7, 8]
    assert seqs(mark.join(10)) == [9, 10]
    assert state(mark) is State.LIVE


def test_a_batch_larger_than_what_may_gather_is_read_from_the_store():
    mark = Watermark(0)
    mark.offer(join_frames(frames(*range(1, MAX_GATHERED + 3))))
    assert mark._gathered is not None
    assert len(mark._gathered) == MAX_GATHERED
    assert mark.join(MAX_GATHERED + 2) == []
    assert state(mark) is State.BEHIND
    assert seqs(mark.replay(frames(1, 2, 3))) == [1, 2, 3]
    assert mark._gathered is None, "what did not fit is not kept"


def test_what_gathers_while_it_reads_is_joined_without_a_seam():
    mark = Watermark(2)
    for seq in (4, 5, 6, 6, 7):
        assert not mark.offer(frame(seq))
    assert seqs(mark.replay(frames(1, 2, 3, 4, 5))) == [3, 4, 5]
    assert seqs(mark.join(7)) == [6, 7]
    assert state(mark) is State.LIVE


def test_it_does_not_join_below_what_others_were_given():
    mark = Watermark(2)
    assert mark.join(4) == []
    assert state(mark) is State.BEHIND
    assert seqs(mark.replay(frames(3, 4))) == [3, 4]
    mark.join(4)
    assert state(mark) is State.LIVE


def test_a_hole_in_what_gathered_is_read_not_jumped():
    mark = Watermark(2)
    mark.offer(frame(3))
    mark.offer(frame(5))
    assert seqs(mark.join(3)) == [3]
    assert state(mark) is State.BEHIND


def test_what_gathers_is_bounded():
    mark = Watermark(0)
    for seq in range(1, 3 * MAX_GATHERED):
        mark.offer(frame(seq))
    assert mark._gathered is not None
    assert len(mark._gathered) == MAX_GATHERED
    assert mark.join(3 * MAX_GATHERED - 1) == []
    assert state(mark) is State.BEHIND
    mark.replay(frames(*range(1, 3 * MAX_GATHERED)))
    mark.join(3 * MAX_GATHERED - 1)
    assert state(mark) is State.LIVE


def test_an_ended_stream_is_given_nothing():
    mark = Watermark(2)
    mark.offer(frame(3))
    mark.move(Event.END)
    assert not mark.offer(frame(3))
    assert mark.replay(frames(3, 4)) == []
    assert mark.join(0) == []
    assert mark.seq == 2
    assert state(mark) is State.ENDED


STEPS = ["message", "message", "lost", "again", "early", "batch", "overlap", "read"]


@settings(max_examples=300)
@given(st.data())
def test_any_interleaving_is_given_out_without_holes_or_repeats(data: st.DataObject):
    """The channel hands out 1..n in order (some of it lost on the way, repeated, or late); the
    store is read at any moment, any page at a time."""
    newest = data.draw(st.integers(0, 5), label="history at the start")
    cursor = data.draw(st.integers(0, newest), label="cursor")
    mark = Watermark(cursor)
    out: list[int] = []
    for _ in range(data.draw(st.integers(0, 40))):
        match data.draw(st.sampled_from(STEPS)):
            case "message":
                newest += 1
                if mark.offer(frame(newest)):
                    out.append(newest)
            case "lost":
                newest += 1
            case "again" | "early" as what:
                low, high = (1, newest) if what == "again" else (newest + 1, newest + 3)
                if low <= high:
                    seq = data.draw(st.integers(low, high))
                    newest = max(newest, seq)
                    if mark.offer(frame(seq)):
                        out.append(seq)
            case "batch" | "overlap" as what:
                first = newest + 1 if what == "batch" else data.draw(st.integers(1, newest + 2))
                last = first + data.draw(st.integers(0, 5))
                newest = max(newest, last)
                given_out = mark.offer(join_frames(frames(*range(first, last + 1))))
                if given_out is not None:
                    out += seqs(list(given_out.parts) or [given_out])
            case "read":
                if mark.state is State.LIVE:
                    continue
                seen = data.draw(st.integers(mark.seq, newest), label="a page's last")
                out += seqs(mark.replay(frames(*range(max(1, mark.seq - 1), seen + 1))))
                if data.draw(st.booleans(), label="and join"):
                    out += seqs(mark.join(newest))
        assert out == list(range(cursor + 1, mark.seq + 1))
    mark.move(Event.GAP)
    out += seqs(mark.replay(frames(*range(mark.seq + 1, newest + 1))))
    out += seqs(mark.join(newest))
    assert out == list(range(cursor + 1, newest + 1)), "nothing is missing in the end"
    assert state(mark) is State.LIVE
