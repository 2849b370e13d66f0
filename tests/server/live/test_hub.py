"""A channel's frames leave the hub in order, each once, to every stream, without waiting."""

from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import assert_no_checkpoints

from protocol.closing import ClosingReason
from protocol.frames import Frame
from server.live.hub import MAX_HELD, Channel, Hub
from server.live.outbox import Outbox
from server.live.watermark import State, Watermark
from storage.contract import Record
from tests.server.live.fakes import frame, frames, record


class Stream:
    """A stream as the hub sees it, with the real watermark."""

    def __init__(self, channel_id: int = 42, user_id: int = 1, cursor: int = 0) -> None:
        self.channel_id = channel_id
        self.user_id = user_id
        self.mark = Watermark(cursor)
        self.got: list[Frame] = []
        self.on_offer: Callable[[], None] = lambda: None

    def offer(self, frame: Frame) -> None:
        if self.mark.offer(frame):
            self.got.append(frame)
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


def test_a_channel_is_wanted_from_its_first_stream_to_its_last():
    wishes = Wishes()
    hub, one, two, other = wishes.hub, Stream(), Stream(user_id=2), Stream(7)
    hub.attach(one)
    hub.attach(two)
    hub.attach(other)
    assert wishes.calls == [("want", 42), ("want", 7)]
    assert (hub.streams, hub.streams_of(1), hub.streams_of(2)) == (3, 2, 1)
    hub.detach(one)
    hub.detach(one)
    assert wishes.calls == [("want", 42), ("want", 7)]
    hub.detach(two)
    assert wishes.calls[2:] == [("drop", 42)]
    hub.detach(other)
    hub.detach(Stream(99))
    assert (hub.streams, hub.streams_of(1), hub.streams_of(2)) == (0, 0, 0)
    assert not hub.channels
    assert not hub._of_user


def test_a_frame_reaches_every_stream_of_its_channel_as_the_same_object():
    hub = Wishes().hub
    streams, other = [Stream() for _ in range(3)], Stream(7)
    joined(hub, *streams)
    joined(hub, other)
    hub.deliver([(42, record(1))])
    assert [stream.seqs for stream in streams] == [[1]] * 3
    assert len({id(stream.got[0]) for stream in streams}) == 1
    assert other.got == []
    hub.deliver([(99, record(1))])  # nobody listens


def test_repeats_and_old_ones_go_no_further():
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream, at=5)
    for seq in (6, 6, 5, 1, 7, 6, 7):
        hub.deliver([(42, record(seq))])
    hub.publish(channel, frame(3))
    assert stream.seqs == [6, 7]
    assert channel.head == 7
    assert not hub.gap_found.is_set()


def test_early_ones_wait_for_the_missing_one():
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
    assert channel.held == {}
    assert channel.head == channel.target == 5


def test_before_the_first_stream_has_read_frames_are_held():
    hub, stream = Wishes().hub, Stream(cursor=2)
    channel = hub.attach(stream)
    for seq in (6, 5, 4):
        hub.deliver([(42, record(seq))])
    assert not hub.gap_found.is_set(), "nobody knows yet what is missing"
    stream.read(hub, channel, 4)
    assert stream.seqs == [3, 4, 5, 6]
    assert stream.mark.state is State.LIVE
    assert channel.held == {}


def test_a_stream_that_read_further_than_the_channel_makes_it_read():
    hub, early, late = Wishes().hub, Stream(), Stream()
    channel = joined(hub, early)
    hub.attach(late)
    late.read(hub, channel, 3)
    assert hub.take_gaps() == [channel]
    for each in frames(1, 2, 3, 4):
        hub.publish(channel, each)
    assert early.seqs == late.seqs == [1, 2, 3, 4]


def test_what_is_held_is_bounded_and_the_rest_is_read():
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream)
    for seq in range(2, 2 * MAX_HELD):
        hub.deliver([(42, record(seq))])
    assert len(channel.held) == MAX_HELD
    assert channel.target == 2 * MAX_HELD - 1
    hub.deliver([(42, record(1))])
    assert stream.seqs == list(range(1, MAX_HELD + 2))
    assert channel.head is not None
    assert channel.filling and channel.head < channel.target


def test_word_of_a_higher_number_is_a_gap_once():
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


def test_a_stream_that_ends_while_it_is_offered_a_frame_leaves_the_others_theirs():
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


def test_the_last_stream_may_end_while_it_is_offered_a_frame():
    hub, stream = Wishes().hub, Stream()
    channel = joined(hub, stream)
    stream.on_offer = lambda: hub.detach(stream)
    hub.deliver([(42, record(2))])
    hub.publish(channel, frame(1))
    assert not hub.channels
    assert stream.seqs[:1] == [1]


async def test_nothing_in_it_is_a_checkpoint(autojump_clock):
    hub, stream = Wishes().hub, Stream()
    outbox = Outbox(limit=10_000, stall=1)
    with assert_no_checkpoints():
        channel = hub.attach(stream)
        hub.deliver([(42, record(3))])
        hub.joined(channel, 1)
        hub.publish(channel, frame(2))
        hub.heard_of(channel, 9)
        hub.take_gaps()
        outbox.offer(frame(1))
        outbox.take()
        hub.detach(stream)
    await trio.lowlevel.checkpoint()


@settings(max_examples=200)
@given(st.data())
def test_any_interleaving_gives_every_stream_its_history_without_holes(data: st.DataObject):
    hub = Wishes().hub
    newest = data.draw(st.integers(0, 4), label="history at the start")
    attached: dict[Stream, Channel] = {}
    cursors: dict[Stream, int] = {}
    steps = ["message", "message", "lost", "again", "early", "attach", "read", "fill", "detach"]

    def fill() -> None:
        for channel in hub.take_gaps():
            while channel.head is not None and channel.head < channel.target:
                hub.publish(channel, frame(channel.head + 1))
            channel.filling = False

    for _ in range(data.draw(st.integers(0, 50))):
        match data.draw(st.sampled_from(steps)):
            case "message":
                newest += 1
                hub.deliver([(42, record(newest))])
            case "lost":
                newest += 1
            case "again" if newest:
                hub.deliver([(42, record(data.draw(st.integers(1, newest))))])
            case "early":
                newest += data.draw(st.integers(1, 3))
                hub.deliver([(42, record(newest))])
            case "attach":
                cursor = data.draw(st.integers(0, newest))
                stream = Stream(user_id=data.draw(st.integers(1, 2)), cursor=cursor)
                cursors[stream] = cursor
                attached[stream] = hub.attach(stream)
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
    assert not hub.channels


@pytest.mark.parametrize("count", [1, 500])
def test_publishing_builds_the_frame_once_for_all(count: int, monkeypatch: pytest.MonkeyPatch):
    built: list[Record] = []
    make = Record.frame

    def count_and_make(self: Record) -> Frame:
        built.append(self)
        return make(self)

    monkeypatch.setattr(Record, "frame", count_and_make)
    hub = Wishes().hub
    joined(hub, *(Stream() for _ in range(count)))
    built.clear()
    hub.deliver([(42, record(1))])
    hub.deliver([(42, record(1))])
    assert len(built) == 1
