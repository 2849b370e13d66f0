"""A channel's frames leave the hub in order, each once, to every stream, without waiting."""

from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import assert_no_checkpoints

from protocol.closing import ClosingReason
from protocol.frames import Frame, join_frames
from server.live.hub import (
    MAX_HELD,
    MAX_RECENT,
    MAX_RECENT_BYTES,
    QUIET_SECONDS,
    Channel,
    Hub,
)
from server.live.outbox import Outbox
from server.live.watermark import State, Watermark
from storage.contract import Record
from tests.server.live.fakes import frame, frames, record


class Stream:
    """A stream as the hub sees it, with the real watermark."""

    def __init__(self, channel_id: int = 42, user_id: int = 1, cursor: int = 0) -> None:
        self.channel_id = channel_id
        self.user_id = user_id
        self.subject = f"user_{user_id}"
        self.mark = Watermark(cursor)
        self.got: list[Record | Frame] = []
        self.writes: list[Frame] = []
        """What it was offered and took, as it was."""
        self.on_offer: Callable[[], None] = lambda: None

    def offer(self, frame: Frame, now: float) -> None:
        assert 0 <= trio.current_time() - now < 1
        due = self.mark.offer(frame)
        if due is not None:
            self.got += due.parts or [due]
            self.writes.append(due)
        self.on_offer()

    def end(self, reason: ClosingReason) -> None:
        raise AssertionError("the hub ends nobody")

    @property
    def seqs(self) -> list[int]:
        return [frame.seq for frame in self.got]

    def read(self, hub: Hub, channel: Channel, newest: int) -> None:
        """As a connection does with a page that ends at `newest`."""
        self.got += self.mark.replay(frames(*range(self.mark.seq + 1, newest + 1)))
        if self.mark.seq >= newest:
            hub.joined(channel, self.mark.seq)
            self.got += self.mark.join(channel.head or 0)


class Wishes:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.hub = Hub()
        self.hub.want = lambda n: self.calls.append(("want", n))
        self.hub.drop = lambda n: self.calls.append(("drop", n))


def joined(hub: Hub, *streams: Stream, at: int = 0) -> Channel:
    for stream in streams:
        channel = hub.attach(stream)
        stream.mark.seq = at
        stream.read(hub, channel, at)
        assert stream.mark.state is State.LIVE
    return channel


async def test_a_channel_is_wanted_from_its_first_stream_until_after_its_last(autojump_clock):
    wishes = Wishes()
    hub, one, two, other = wishes.hub, Stream(), Stream(user_id=2), Stream(7)
    hub.attach(one)
    hub.attach(two)
    hub.attach(other)
    assert wishes.calls == [("want", 42), ("want", 7)]
    assert (hub.streams, hub.streams_of(1), hub.streams_of(2)) == (3, (one, other), (two,))
    hub.detach(one)
    hub.detach(one)
    assert wishes.calls == [("want", 42), ("want", 7)]
    hub.detach(two)
    hub.detach(other)
    hub.detach(Stream(99))
    assert wishes.calls[2:] == [("drop", 42), ("drop", 7)], "nobody has read them: nothing to keep"
    assert (hub.streams, hub.streams_of(1), hub.streams_of(2)) == (0, (), ())
    assert not hub.channels
    assert not hub._of_user


async def test_a_frame_reaches_every_stream_of_its_channel_as_the_same_object(autojump_clock):
    hub = Wishes().hub
    streams, other = [Stream() for _ in range(3)], Stream(7)
    joined(hub, *streams)
    joined(hub, other)
    hub.deliver([(42, record(1))])
    assert [stream.seqs for stream in streams] == [[1]] * 3
    assert len({id(stream.got[0]) for stream in streams}) == 1
    assert other.got == []
    hub.deliver([(99, record(1))])  # nobody listens


async def test_repeats_and_old_ones_go_no_further(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream, at=5)
    for seq in (6, 6, 5, 1, 7, 6, 7):
        hub.deliver([(42, record(seq))])
    hub.publish(channel, frames(3))
    assert stream.seqs == [6, 7]
    assert channel.head == 7
    assert not hub.gap_found.is_set()


async def test_early_ones_wait_for_the_missing_one(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream)
    for seq in (3, 2, 5):
        hub.deliver([(42, record(seq))])
    assert stream.seqs == []
    assert hub.gap_found.is_set()
    assert hub.take_gaps() == [channel]
    hub.deliver([(42, record(1))])
    assert stream.seqs == [1, 2, 3]
    assert hub.take_gaps() == [], "it is being filled already"
    hub.deliver([(42, record(4))])
    assert stream.seqs == [1, 2, 3, 4, 5]
    assert channel.held is None
    assert channel.head == channel.target == 5


async def test_before_the_first_stream_has_read_frames_are_held(autojump_clock):
    hub, stream = Wishes().hub, Stream(cursor=2)
    channel = hub.attach(stream)
    for seq in (6, 5, 4):
        hub.deliver([(42, record(seq))])
    assert not hub.gap_found.is_set(), "nobody knows yet what is missing"
    stream.read(hub, channel, 4)
    assert stream.seqs == [3, 4, 5, 6]
    assert stream.mark.state is State.LIVE
    assert channel.held is None


async def test_a_stream_that_read_further_than_the_channel_makes_it_read(autojump_clock):
    hub, early, late = Wishes().hub, Stream(), Stream()
    channel = joined(hub, early)
    hub.attach(late)
    late.read(hub, channel, 3)
    assert hub.take_gaps() == [channel]
    for each in frames(1, 2, 3, 4):
        hub.publish(channel, [each])
    assert early.seqs == late.seqs == [1, 2, 3, 4]


async def test_what_is_held_is_bounded_and_the_rest_is_read(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream)
    for seq in range(2, 2 * MAX_HELD):
        hub.deliver([(42, record(seq))])
    assert channel.held is not None
    assert len(channel.held) == MAX_HELD
    assert channel.target == 2 * MAX_HELD - 1
    hub.deliver([(42, record(1))])
    assert stream.seqs == list(range(1, MAX_HELD + 2))
    assert channel.head is not None
    assert channel.filling and channel.head < channel.target


async def test_word_of_a_higher_number_is_a_gap_once(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream, at=3)
    hub.heard_of(channel, 3)
    assert not hub.gap_found.is_set()
    hub.heard_of(channel, 5)
    hub.heard_of(channel, 9)
    assert hub.take_gaps() == [channel]
    assert not hub.gap_found.is_set()
    channel.filling = False
    hub.heard_of(channel, 4)
    assert hub.take_gaps() == [channel], "it still misses some"


async def test_a_stream_that_ends_while_it_is_offered_a_frame_leaves_the_others_theirs(
    autojump_clock,
):
    hub = Wishes().hub
    streams = [Stream(user_id=n) for n in range(4)]
    joined(hub, *streams)

    def take_another_along() -> None:
        hub.detach(streams[1])
        hub.detach(streams[2])

    streams[1].on_offer = take_another_along
    hub.deliver([(42, record(1))])
    hub.deliver([(42, record(2))])
    assert streams[0].seqs == streams[3].seqs == [1, 2]
    assert streams[1].seqs == [1]
    assert hub.streams == 2
    assert hub.all_streams() == [streams[0], streams[3]]


async def test_the_last_stream_may_end_while_it_is_offered_a_frame(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream)
    stream.on_offer = lambda: hub.detach(stream)
    hub.deliver([(42, record(2))])
    hub.publish(channel, frames(1))
    assert stream.seqs == [1, 2], "it had both before it ended: they were one write"
    assert hub.streams == 0
    assert channel.head == 2


async def test_nothing_in_it_is_a_checkpoint(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    outbox = Outbox(limit=10_000)
    with assert_no_checkpoints():
        channel = hub.attach(stream)
        hub.deliver([(42, record(3))])
        hub.joined(channel, 1)
        hub.publish(channel, frames(2, 3, 7))
        hub.heard_of(channel, 9)
        hub.take_gaps()
        hub.recall(channel, 1, head=1)
        outbox.offer(frame(1))
        outbox.take()
        hub.detach(stream)
    await trio.lowlevel.checkpoint()


# Batches


async def test_a_batch_is_one_write_and_the_same_object_for_every_stream(autojump_clock):
    hub, streams, other = Hub(), [Stream() for _ in range(3)], Stream(7)
    joined(hub, *streams)
    joined(hub, other)
    hub.deliver(
        [(42, record(1)), (7, record(1)), (42, record(2)), (42, record(3)), (99, record(1))]
    )
    assert [stream.seqs for stream in streams] == [[1, 2, 3]] * 3
    assert [len(stream.writes) for stream in streams] == [1] * 3
    assert len({id(stream.writes[0]) for stream in streams}) == 1
    assert streams[0].writes[0].chunked == join_frames(frames(1, 2, 3)).chunked
    assert other.writes[0].chunked == frame(1).chunked


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        ([[3, 1, 2]], [[1, 2, 3]]),
        ([[2, 3], [1]], [[1, 2, 3]]),
        ([[1, 2], [2, 3]], [[1, 2], [3]]),
        ([[1, 1, 2, 2]], [[1, 2]]),
        ([[1, 2, 4, 5], [3]], [[1, 2], [3, 4, 5]]),
        ([[1, 4], [3, 2]], [[1], [2, 3, 4]]),
        ([[2], [1, 2, 3]], [[1, 2, 3]]),
        ([[5], [1, 2], [0, 1, 2], [4, 3]], [[1, 2], [3, 4, 5]]),
    ],
    ids=str,
)
async def test_batches_leave_in_order_and_without_holes(
    autojump_clock, batches: list[list[int]], got: list[list[int]]
):
    hub, stream = Hub(), Stream()
    channel = joined(hub, stream)
    for batch in batches:
        hub.deliver([(42, record(seq)) for seq in batch])
    writes = [[each.seq for each in write.parts or [write]] for write in stream.writes]
    assert writes == got
    assert channel.held is None
    assert channel.head == channel.target == got[-1][-1]
    assert channel.recent is not None
    assert [each.seq for each in channel.recent] == list(range(1, got[-1][-1] + 1))


async def test_what_is_read_and_what_is_offered_may_overlap(autojump_clock):
    """A stream that read further than its channel is given the rest of the next batch."""
    hub, early, late = Hub(), Stream(), Stream()
    channel = joined(hub, early)
    hub.attach(late)
    late.read(hub, channel, 2)
    hub.publish(channel, frames(1, 2, 3, 4))
    assert early.seqs == late.seqs == [1, 2, 3, 4]
    assert early.writes[0] is not late.writes[0]
    hub.publish(channel, frames(5, 6))
    assert early.writes[-1] is late.writes[-1]


# Streams that come back


async def test_a_cursor_that_memory_covers_is_answered_from_it(autojump_clock):
    hub, stream = Hub(), Stream()
    channel = joined(hub, stream, at=5)
    hub.publish(channel, frames(6, 7))
    hub.publish(channel, frames(8, 9, 10))

    def recall(cursor: int | None, head: int = 0) -> list[int] | None:
        found = hub.recall(channel, cursor, head=head)
        return None if found is None else [each.seq for each in found]

    assert recall(5) == [6, 7, 8, 9, 10]
    assert recall(8) == [9, 10]
    assert recall(10) == []
    assert recall(8, head=10) == [9, 10]
    assert recall(4) is None, "6 is the oldest here"
    assert recall(0) is None
    assert recall(11) is None, "ahead: that is for the store to say"
    assert recall(None) is None
    assert recall(8, head=11) is None, "somebody knows more"
    hub.heard_of(channel, 11)
    assert recall(8) is None
    assert recall(10) is None, "while something is missing"
    hub.publish(channel, frames(12))
    assert recall(10) is None
    hub.publish(channel, frames(11))
    assert recall(10) == [11, 12]


async def test_before_anything_was_read_or_handed_out_only_the_head_is_known(autojump_clock):
    hub, stream = Hub(), Stream()
    channel = hub.attach(stream)
    assert hub.recall(channel, 0, head=0) is None
    hub.publish(channel, frames(3, 4))
    assert hub.recall(channel, 2, head=0) is None
    stream.mark.seq = 2
    stream.read(hub, channel, 2)
    assert [each.seq for each in hub.recall(channel, 2, head=4) or []] == [3, 4]
    fresh = joined(hub, Stream(7), at=9)
    assert hub.recall(fresh, 9, head=9) == []
    assert hub.recall(fresh, 8, head=9) is None


async def test_what_is_remembered_is_bounded_in_frames_and_bytes(autojump_clock):
    hub, stream = Hub(), Stream()
    channel = joined(hub, stream)
    hub.publish(channel, frames(*range(1, 3 * MAX_RECENT + 1)))
    assert channel.recent is not None
    newest = 3 * MAX_RECENT
    assert [each.seq for each in channel.recent] == list(range(newest - 15, newest + 1))
    assert hub.recall(channel, newest - 17, head=0) is None
    assert len(hub.recall(channel, newest - 16, head=0) or []) == MAX_RECENT

    def large(seq: int, size: int) -> Frame:
        return Record(seq, 0, b"x" * size, b"{}").frame()

    third = MAX_RECENT_BYTES // 3
    for _ in range(5):
        newest += 1
        hub.publish(channel, [large(newest, third)])
        assert sum(len(each.chunked) for each in channel.recent) <= MAX_RECENT_BYTES
    assert [each.seq for each in channel.recent] == [newest - 1, newest]
    newest += 1
    hub.publish(channel, [large(newest, MAX_RECENT_BYTES)])
    assert len(channel.recent) == 0, "one alone is too large"
    assert hub.recall(channel, newest, head=0) == []
    assert hub.recall(channel, newest - 1, head=0) is None
    hub.publish(channel, frames(newest + 1))
    assert [each.seq for each in hub.recall(channel, newest, head=0) or []] == [newest + 1]
    assert hub.recall(channel, newest - 1, head=0) is None, "not over the hole"


async def test_a_quiet_channel_is_kept_for_a_while_and_hears_on(autojump_clock):
    wishes, stream, other = Wishes(), Stream(), Stream(7)
    hub = wishes.hub
    channel = joined(hub, stream, at=3)
    joined(hub, other)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.serve)
        hub.detach(stream)
        await trio.sleep(20)
        hub.deliver([(42, record(4)), (42, record(5))])
        again = Stream(cursor=3)
        assert hub.attach(again) is channel
        assert [each.seq for each in hub.recall(channel, 3, head=5) or []] == [4, 5]
        assert hub.streams == 2
        await trio.sleep(2 * QUIET_SECONDS)
        assert 42 in hub.channels, "it is not quiet any more"
        hub.detach(again)
        await trio.sleep(QUIET_SECONDS - 1)
        assert 42 in hub.channels
        assert ("drop", 42) not in wishes.calls
        await trio.sleep(3)
        assert 42 not in hub.channels
        assert wishes.calls.count(("drop", 42)) == 1
        assert not hub._quiet
        assert ("drop", 7) not in wishes.calls
        assert wishes.calls.count(("want", 42)) == 1
        nursery.cancel_scope.cancel()


async def test_quiet_channels_go_in_the_order_in_which_they_became_quiet(autojump_clock):
    wishes = Wishes()
    hub, streams = wishes.hub, [Stream(n) for n in range(5)]
    for stream in streams:
        joined(hub, stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.serve)
        for stream in reversed(streams):
            hub.detach(stream)
            await trio.sleep(5)
        hub.attach(streams[4])
        hub.detach(streams[4])  # quiet since now only
        await trio.sleep(2 * QUIET_SECONDS)
        nursery.cancel_scope.cancel()
    assert [n for what, n in wishes.calls if what == "drop"] == [3, 2, 1, 0, 4]


async def test_quiet_channels_are_bounded(autojump_clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.live.hub.MAX_QUIET", 3)
    wishes = Wishes()
    hub, streams = wishes.hub, [Stream(n) for n in range(6)]
    for stream in streams:
        joined(hub, stream)
    for stream in streams:
        hub.detach(stream)
        assert len(hub._quiet) <= 3
    assert list(hub.channels) == [3, 4, 5], "the longest quiet ones go first"
    assert [n for what, n in wishes.calls if what == "drop"] == [0, 1, 2]


# Any order of anything


@settings(max_examples=300, deadline=None)
@given(data=st.data())
async def test_any_interleaving_gives_every_stream_its_history_without_holes(
    data: st.DataObject,
):
    hub = Hub()
    newest = data.draw(st.integers(0, 4), label="history at the start")
    attached: dict[Stream, Channel] = {}
    cursors: dict[Stream, int] = {}
    steps = ["message", "message", "batch", "lost", "again", "early"]
    steps += ["attach", "rejoin", "read", "fill", "detach"]

    def fill() -> None:
        for channel in hub.take_gaps():
            if channel.head is not None and channel.head < channel.target:
                hub.publish(channel, frames(*range(channel.head + 1, channel.target + 1)))
            channel.filling = False

    def attach(cursor: int) -> Stream:
        stream = Stream(user_id=data.draw(st.integers(1, 2)), cursor=cursor)
        cursors[stream] = cursor
        attached[stream] = hub.attach(stream)
        return stream

    for _ in range(data.draw(st.integers(0, 50))):
        match data.draw(st.sampled_from(steps)):
            case "message":
                newest += 1
                hub.deliver([(42, record(newest))])
            case "batch":
                newest += data.draw(st.integers(0, 3), label="new ones")
                seqs = st.integers(max(1, newest - 6), max(1, newest))
                batch = data.draw(st.lists(seqs, max_size=6), label="with holes, in any order")
                hub.deliver([(42, record(seq)) for seq in batch if seq <= newest])
            case "lost":
                newest += 1
            case "again" if newest:
                hub.deliver([(42, record(data.draw(st.integers(1, newest))))])
            case "early":
                newest += data.draw(st.integers(1, 3))
                hub.deliver([(42, record(newest))])
            case "attach":
                attach(data.draw(st.integers(0, newest)))
            case "rejoin":
                stream = attach(data.draw(st.integers(0, newest)))
                channel = attached[stream]
                known = data.draw(st.integers(0, newest), label="head that was heard of")
                recalled = hub.recall(channel, stream.mark.seq, head=known)
                if recalled is not None:
                    assert known <= stream.mark.seq + len(recalled) <= newest
                    stream.got += stream.mark.replay(recalled)
                    hub.joined(channel, stream.mark.seq)
                    stream.got += stream.mark.join(channel.head or 0)
                    assert stream.mark.state is State.LIVE
            case "read" if attached:
                stream = data.draw(st.sampled_from(list(attached)))
                if stream.mark.state is State.BEHIND:
                    seen = data.draw(st.integers(stream.mark.seq, newest))
                    stream.read(hub, attached[stream], seen)
            case "fill":
                fill()
            case "detach" if attached:
                stream = data.draw(st.sampled_from(list(attached)))
                hub.detach(stream)
                del attached[stream]
        for stream, cursor in cursors.items():
            assert stream.seqs == list(range(cursor + 1, stream.mark.seq + 1))
        assert hub.streams == len(attached)

    for stream, channel in attached.items():
        if stream.mark.state is State.BEHIND:
            stream.read(hub, channel, newest)
    for channel in set(attached.values()):
        hub.heard_of(channel, newest)  # the look for missed messages
    fill()
    for stream, channel in attached.items():
        if stream.mark.state is State.BEHIND:
            stream.read(hub, channel, newest)
        assert stream.seqs == list(range(cursors[stream] + 1, newest + 1)), "nothing is missing"
        assert stream.mark.state is State.LIVE
    for stream in list(attached):
        hub.detach(stream)
    assert len(hub.channels) == len(hub._quiet)
    assert not hub._of_user


@pytest.mark.parametrize("count", [1, 500])
async def test_publishing_builds_the_frame_once_for_all(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    built: list[Record] = []
    make = Record.frame

    def count_and_make(self: Record) -> Frame:
        built.append(self)
        return make(self)

    monkeypatch.setattr(Record, "frame", count_and_make)
    hub = Wishes().hub
    joined(hub, *(Stream() for _ in range(count)))
    built.clear()
    hub.deliver([(42, record(1)), (42, record(2))])
    hub.deliver([(42, record(1))])
    assert len(built) == 2
