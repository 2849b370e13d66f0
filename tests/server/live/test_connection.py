"""One stream's whole life: what it is sent, when, and that nothing is left of it."""

import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from protocol.closing import CLOSING_RULES, ClosingReason
from protocol.parser import EventStreamParser
from server.live.catch_up import CatchUp
from server.live.clock import Clock
from server.live.connection import (
    GOODBYE_SECONDS,
    LISTEN_SECONDS,
    Connection,
    EndedEarly,
    Lease,
    StreamLimits,
)
from server.live.hub import Hub
from server.live.watermark import MAX_GATHERED, State
from server.live.wire import Wire
from server.web.response import jittered
from storage.contract import ChannelGone, StoreUnavailable
from tests.server.live.fakes import DirectWire, FakeStore, Peer, frame, record

TICK = 0.1
LIMITS = StreamLimits(heartbeat=15, retry=2000, outbox=10_000, stall=5)


@pytest.fixture(params=["direct", "asgi"])
def kind(request):
    return request.param


class Room:
    """A hub, a store, a clock that does not run yet, and streams of channel 42."""

    def __init__(self, kind: str, newest: int = 0, **store: Any) -> None:
        self.kind = kind
        self.hub = Hub()
        self.clock = Clock(tick=TICK)
        self.store = FakeStore(newest, **store)
        self.nursery: trio.Nursery

    def connection(
        self,
        *,
        limits: StreamLimits = LIMITS,
        ends_in: float = 10_000,
        why: ClosingReason = ClosingReason.SESSION_ENDED,
    ) -> Connection:
        now = trio.current_time()
        return Connection(
            channel_id=42,
            user_id=1,
            subject="user_1",
            hub=self.hub,
            store=self.store,  # type: ignore[arg-type]
            clock=self.clock,
            limits=limits,
            lease=Lease(now + ends_in, why),
        )

    def opened(self, cursor: int | None = None, **options: Any) -> "Opened":
        return Opened(self, cursor, **options)

    def store_message(self) -> int:
        self.store.newest += 1
        return self.store.newest

    def publish(self, count: int = 1) -> int:
        """Messages that come as one batch."""
        batch = [(42, record(self.store_message())) for _ in range(count)]
        self.hub.deliver(batch)
        return self.store.newest


@asynccontextmanager
async def open_room(kind: str, newest: int = 0, **store: Any) -> AsyncIterator[Room]:
    """Runs the clock, and waits until every stream has ended."""
    room = Room(kind, newest, **store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.clock.run)
        with trio.fail_after(2000):
            async with trio.open_nursery() as room.nursery:
                yield room
        nursery.cancel_scope.cancel()


async def run(
    connection: Connection, peer: Peer, *, cursor: int | None = None, head: int = 0
) -> None:
    await connection.open(cursor=cursor, head=head, begin=peer.begin)
    await connection.live()


class Opened:
    """A stream that runs in a room."""

    def __init__(self, room: Room, cursor: int | None, *, head: int = 0, **options: Any) -> None:
        self.peer = Peer(room.kind)
        self.connection = room.connection(**options)
        self.done = False
        room.nursery.start_soon(self._run, cursor, head)

    async def _run(self, cursor: int | None, head: int) -> None:
        await run(self.connection, self.peer, cursor=cursor, head=head)
        self.done = True

    @property
    def tasks(self) -> int:
        """That are in its nursery."""
        nursery = self.connection._nursery
        assert nursery is not None
        return len(nursery.child_tasks)

    @property
    def given(self) -> list[bytes]:
        """The objects that its direct wire was given."""
        assert isinstance(self.peer.wire, DirectWire)
        return self.peer.wire.given


def reason_of(peer: Peer) -> tuple[str, bool]:
    (closing,) = peer.named("closing")
    said = msgspec.json.decode(closing.data)
    return said["reason"], said["reconnect"]


# What is sent


async def test_a_stream_begins_with_connected_and_what_comes_after_the_cursor(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=5) as room:
        opened = room.opened(cursor=3)
        await trio.sleep(1)
        assert [e.event for e in opened.peer.events] == ["message"] * 3
        assert '"type":"connected"' in opened.peer.events[0].data
        assert len(opened.peer.written) == 1, "in one write"
        assert opened.peer.seqs == [4, 5]
        assert room.publish() == 6
        await trio.sleep(1)
        assert opened.peer.seqs == [4, 5, 6]
        opened.peer.leave()


async def test_without_a_cursor_it_begins_with_the_newest(kind: str, autojump_clock):
    async with open_room(kind, newest=70) as room:
        opened = room.opened()
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(21, 71))
        opened.peer.leave()


async def test_the_second_without_a_cursor_is_given_what_the_first_was_and_nothing_is_read(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=70) as room:
        first = room.opened()
        await trio.sleep(1)
        second = room.opened(head=70)
        await trio.sleep(1)
        assert second.peer.seqs == first.peer.seqs == list(range(21, 71))
        assert len(room.store.reads) == 1
        room.publish()
        await trio.sleep(1)
        third = room.opened(head=71)
        await trio.sleep(1)
        assert third.peer.seqs == list(range(22, 72)), "it has a message more by now"
        assert second.peer.seqs == first.peer.seqs == list(range(21, 72))
        assert len(room.store.reads) == 2
        unheard = room.store_message()  # stored elsewhere, and the caller has seen its number
        fourth = room.opened(head=unheard)
        await trio.sleep(1)
        assert fourth.peer.seqs == list(range(23, 73))
        for opened in (first, second, third, fourth):
            opened.peer.leave()


async def test_a_page_after_a_reset_or_a_cursor_is_no_opening(kind: str, autojump_clock):
    async with open_room(kind, newest=3) as room:
        for cursor in (1, 9):
            room.opened(cursor=cursor).peer.leave()
            await trio.sleep(1)
        fresh = room.opened()
        await trio.sleep(1)
        assert fresh.peer.seqs == [1, 2, 3]
        fresh.peer.leave()


async def test_a_cursor_ahead_is_a_reset_before_the_newest(kind: str, autojump_clock):
    async with open_room(kind, newest=70) as room:
        opened = room.opened(cursor=71)
        await trio.sleep(1)
        assert [e.event for e in opened.peer.events[:3]] == ["message", "reset", "message"]
        assert opened.peer.seqs == list(range(21, 71))
        opened.peer.leave()


async def test_an_empty_channel_with_a_cursor_ahead_is_reset_and_goes_live(
    kind: str, autojump_clock
):
    async with open_room(kind) as room:
        opened = room.opened(cursor=9)
        await trio.sleep(1)
        room.publish()
        await trio.sleep(1)
        assert len(opened.peer.named("reset")) == 1
        assert opened.peer.seqs == [1]
        opened.peer.leave()


async def test_what_is_published_while_history_is_read_is_neither_lost_nor_repeated(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=4) as room:
        room.store.takes = room.store.takes_after = 1
        opened = room.opened(cursor=2)
        for _ in range(30):  # before the page is seen, and after it
            await trio.sleep(0.1)
            room.publish()
        await trio.sleep(5)
        assert opened.peer.seqs == list(range(3, 35))
        opened.peer.leave()


async def test_a_long_catch_up_is_read_page_by_page(kind: str, autojump_clock):
    async with open_room(kind, newest=25, page=10) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(1, 26))
        assert [after for after, _ in room.store.reads] == [0, 10, 20]
        assert opened.connection.watermark.state is State.LIVE
        opened.peer.leave()


async def test_a_page_that_is_behind_other_streams_is_not_the_end(kind: str, autojump_clock):
    """Redis may be behind: what others were given is owed to this one, too."""
    async with open_room(kind, newest=3) as room:
        first = room.opened(cursor=0)
        await trio.sleep(1)
        room.publish()
        room.store.newest = 3  # the next page is an old one
        room.store.before_answer = lambda: setattr(room.store, "newest", 4)
        second = room.opened(cursor=0)
        await trio.sleep(2)
        assert first.peer.seqs == second.peer.seqs == [1, 2, 3, 4]
        assert room.store.reads[-1] == (3, 4), "read again, and told how far it goes"
        first.peer.leave()
        second.peer.leave()


async def test_a_stream_does_not_wait_long_for_its_subscription(kind: str, autojump_clock):
    async with open_room(kind, newest=1) as room:
        room.store.feed.listen = 60
        opened = room.opened(cursor=0)
        started = trio.current_time()
        await trio.sleep(5)
        assert opened.peer.started == pytest.approx(started + LISTEN_SECONDS)
        opened.peer.leave()


async def test_retry_is_between_once_and_twice_what_is_set(kind: str, autojump_clock):
    seen = {jittered(2000) for _ in range(300)}
    assert 2000 <= min(seen) < 2300
    assert 3700 < max(seen) <= 4000
    async with open_room(kind) as room:
        opened = room.opened()
        await trio.sleep(1)
        parser = EventStreamParser()
        parser.feed(opened.peer.body)
        assert parser.retry is not None
        assert 2000 <= parser.retry <= 4000
        opened.peer.leave()


# Heartbeats


async def test_a_heartbeat_comes_after_so_much_silence_and_any_write_resets_it(
    kind: str, autojump_clock
):
    async with open_room(kind) as room:
        opened = room.opened()
        await trio.sleep(0)
        started = trio.current_time()
        await trio.sleep(40)  # heartbeats at 15 and 30
        room.publish()  # at 40
        await trio.sleep(30)  # heartbeats at 55 and 70
        await trio.sleep(1)
        at = [round(when - started) for when, _ in opened.peer.written]
        assert at == [0, 15, 30, 40, 55, 70]
        assert len(opened.peer.named("heartbeat")) == 4
        opened.peer.leave()


async def test_a_busy_stream_has_no_heartbeat(kind: str, autojump_clock):
    async with open_room(kind) as room:
        opened = room.opened()
        for _ in range(20):
            await trio.sleep(10)
            room.publish()
        await trio.sleep(1)
        assert opened.peer.named("heartbeat") == []
        opened.peer.leave()


async def test_while_the_store_is_down_a_stream_that_is_behind_lives_on(kind: str, autojump_clock):
    async with open_room(kind, newest=2) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        room.store.down = True
        opened.connection.offer(frame(9), trio.current_time())  # nobody filled the gap
        room.store.newest = 9
        await trio.sleep(100)
        assert opened.peer.seqs == [1, 2]
        assert len(opened.peer.named("heartbeat")) == 6
        assert len(room.store.reads) < 1000
        room.store.down = False
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(1, 10))
        opened.peer.leave()


async def test_while_the_store_knows_less_than_was_given_out_a_stream_lives_on(
    kind: str, autojump_clock
):
    """A standby that is behind, or a past that was restored."""
    async with open_room(kind, newest=5) as room:
        first = room.opened(cursor=5)
        await trio.sleep(1)
        room.publish()
        room.store.newest = 5
        second = room.opened(cursor=4)
        await trio.sleep(50)
        assert second.peer.seqs == [5]
        assert len(second.peer.named("heartbeat")) == 3
        room.store.newest = 6
        await trio.sleep(1)
        assert second.peer.seqs == [5, 6]
        first.peer.leave()
        second.peer.leave()


async def test_a_slow_read_that_brings_nothing_new_breaks_nothing(kind: str, autojump_clock):
    async with open_room(kind, newest=2) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(14)
        room.store.takes = 3
        opened.connection.offer(frame(9), trio.current_time())
        await trio.sleep(10)
        assert len(opened.peer.named("heartbeat")) == 1
        assert not opened.done
        opened.peer.leave()


async def test_what_waits_for_a_reader_needs_no_heartbeat(kind: str, autojump_clock):
    limits = LIMITS._replace(stall=1000)
    async with open_room(kind) as room:
        opened = room.opened(limits=limits)
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish(2)
        await trio.sleep(1)
        room.publish()
        await trio.sleep(200)
        opened.peer.read_on()
        await trio.sleep(1)
        assert opened.peer.seqs == [1, 2, 3]
        assert opened.peer.named("heartbeat") == []
        opened.peer.leave()


# No more than it must


class Steps(trio.abc.Instrument):
    """Which tasks were woken."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []

    def task_scheduled(self, task: Any) -> None:
        self.tasks.append(task)


async def test_streams_that_keep_up_are_written_to_where_the_frame_is_published(autojump_clock):
    async with open_room("direct", newest=1) as room:
        streams = [room.opened(cursor=1) for _ in range(20)]
        await trio.sleep(1)
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        try:
            with assert_no_checkpoints():
                room.publish()
                room.publish(3)
            assert [opened.peer.seqs for opened in streams] == [[2, 3, 4, 5]] * 20
            await wait_all_tasks_blocked()
        finally:
            trio.lowlevel.remove_instrument(steps)
        assert {task for task in steps.tasks if task.name.endswith(("_run", "_work"))} == set()
        assert [opened.tasks for opened in streams] == [0] * 20
        for opened in streams:
            opened.peer.leave()


async def test_frames_of_one_batch_are_one_write_of_the_same_object_to_every_stream(
    autojump_clock,
):
    async with open_room("direct", newest=1) as room:
        streams = [room.opened(cursor=1) for _ in range(5)]
        await trio.sleep(1)
        room.publish()
        room.publish(3)
        room.publish(2)
        for opened in streams:
            assert len(opened.given) == 4, "and the beginning"
            assert [len(EventStreamParser().feed(data)) for data in opened.given[1:]] == [1, 3, 2]
        for number in range(1, 4):
            assert len({id(opened.given[number]) for opened in streams}) == 1
        assert streams[0].peer.seqs == [2, 3, 4, 5, 6, 7]
        for opened in streams:
            opened.peer.leave()


async def test_a_stream_that_read_further_than_others_is_given_the_rest_of_a_batch(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=1) as room:
        first = room.opened(cursor=1)
        await trio.sleep(1)
        room.store.newest = 3  # not heard of yet
        ahead = room.opened(cursor=0)
        await trio.sleep(1)
        assert ahead.peer.seqs == [1, 2, 3]
        room.store.newest = 5
        room.hub.deliver([(42, record(seq)) for seq in (2, 3, 4, 5)])
        await trio.sleep(1)
        assert first.peer.seqs == [2, 3, 4, 5]
        assert ahead.peer.seqs == [1, 2, 3, 4, 5]
        first.peer.leave()
        ahead.peer.leave()


async def test_what_a_stream_missed_a_moment_ago_is_not_read_from_the_store(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=1) as room:
        first = room.opened(cursor=1)
        await trio.sleep(1)
        room.publish(3)
        first.peer.leave()
        await trio.sleep(5)
        reads = len(room.store.reads)
        again = room.opened(cursor=2, head=4)
        level = room.opened(cursor=4, head=4)
        await trio.sleep(1)
        assert again.peer.seqs == [3, 4]
        assert level.peer.seqs == []
        assert len(again.peer.events) == 3
        room.publish()
        await trio.sleep(1)
        assert again.peer.seqs == [3, 4, 5]
        assert level.peer.seqs == [5]
        assert len(room.store.reads) == reads
        newest = room.opened(head=5)
        await trio.sleep(1)
        assert len(room.store.reads) == reads + 1, "without a cursor it is"
        for opened in (again, level, newest):
            opened.peer.leave()


async def test_what_gathers_over_its_bound_while_history_is_read_is_read_too(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=1) as room:
        room.store.takes_after = 1
        opened = room.opened(cursor=0, limits=LIMITS._replace(outbox=100_000))
        await trio.sleep(0.5)  # the page is seen, and not here yet
        room.publish(MAX_GATHERED + 5)
        room.publish(2)
        await trio.sleep(20)
        assert opened.peer.seqs == list(range(1, MAX_GATHERED + 9))
        assert opened.connection.watermark.state is State.LIVE
        opened.peer.leave()


# The end


async def test_a_peer_that_leaves_leaves_nothing_behind(kind: str, autojump_clock):
    async with open_room(kind, newest=2) as room:
        await trio.sleep(0.1)
        tasks = trio.lowlevel.current_statistics().tasks_living
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        assert room.hub.streams == 1
        assert opened.connection.slot
        opened.peer.leave()
        await trio.sleep(1)
        assert opened.done
        assert opened.peer.named("closing") == []
        assert room.hub.streams == 0
        assert not any(room.clock._slots)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        gone = weakref.ref(opened.connection)
        del opened
        gc.collect()
        assert gone() is None


async def test_a_quiet_stream_holds_nothing_of_its_request(kind: str, autojump_clock):
    class Scope:
        pass

    async def open_one() -> weakref.ref[Scope]:
        scope = Scope()

        def begin() -> Wire:
            assert scope
            return peer.begin()

        await connection.open(cursor=1, head=0, begin=begin)
        return weakref.ref(scope)

    async with open_room(kind, newest=2) as room:
        peer, connection = Peer(kind), room.connection()
        scope = await open_one()
        room.nursery.start_soon(connection.live)
        await trio.sleep(1)
        gc.collect()
        assert scope() is None
        assert connection._outbox is None
        assert room.hub.streams == 1
        peer.leave()


@pytest.mark.parametrize("reason", ClosingReason)
async def test_an_ended_stream_says_why_and_whether_to_come_back(
    kind: str, autojump_clock, reason: ClosingReason
):
    async with open_room(kind, newest=2) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        with assert_no_checkpoints():
            opened.connection.end(reason)
            opened.connection.end(ClosingReason.DRAIN)
        assert room.hub.streams == 0, "at once"
        assert not any(room.clock._slots)
        assert opened.connection.watermark.state is State.ENDED
        room.publish()
    assert reason_of(opened.peer) == (reason.value, CLOSING_RULES[reason].reconnect)
    assert opened.peer.ended
    assert opened.peer.seqs == [1, 2], "nothing but the reason"


@pytest.mark.parametrize("cursor", [None, 2], ids=["from the store", "from memory"])
@pytest.mark.parametrize("moment", ["before it ran", "while it reads"])
async def test_a_stream_that_is_ended_before_its_response_started_says_so(
    kind: str, autojump_clock, moment: str, cursor: int | None
):
    room, peer = Room(kind, newest=2), Peer(kind)
    before = room.connection()
    await before.open(cursor=0, head=0, begin=Peer(kind).begin)
    before.end(ClosingReason.DRAIN)
    room.store.takes = 2
    connection = room.connection()
    if moment == "before it ran":
        connection.end(ClosingReason.DRAIN)
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(1)
            connection.end(ClosingReason.DRAIN)

        if moment == "while it reads":
            nursery.start_soon(end)
            cursor = None
        with pytest.raises(EndedEarly) as caught:
            await run(connection, peer, cursor=cursor)
    assert caught.value.reason is ClosingReason.DRAIN
    assert peer.started is None
    assert peer.written == []
    assert room.hub.streams == 0


async def test_a_stream_that_is_ended_as_its_response_starts_says_why(kind: str, autojump_clock):
    async with open_room(kind, newest=2) as room:
        peer, connection = Peer(kind), room.connection()
        await connection.open(cursor=0, head=0, begin=peer.begin)
        connection.end(ClosingReason.DRAIN)
        room.publish()
        await connection.live()
        assert reason_of(peer) == ("drain", True)
        assert 3 not in peer.seqs
        assert peer.ended
        assert room.hub.streams == 0
        assert not any(room.clock._slots)


@pytest.mark.parametrize(("fault", "error"), [("down", StoreUnavailable), ("gone", ChannelGone)])
async def test_history_that_cannot_be_read_is_an_error_before_the_response_starts(
    kind: str, autojump_clock, fault: str, error: type[Exception]
):
    room, peer = Room(kind, newest=2), Peer(kind)
    setattr(room.store, fault, True)
    with pytest.raises(error):
        await run(room.connection(), peer)
    assert peer.started is None
    assert room.hub.streams == 0
    assert not room.hub.channels


async def test_a_channel_that_goes_away_while_it_is_read_ends_the_stream(kind: str, autojump_clock):
    async with open_room(kind, newest=2) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        room.store.gone = True
        opened.connection.offer(frame(9), trio.current_time())
        await trio.sleep(5)
        assert opened.done
        assert reason_of(opened.peer) == ("access_revoked", False)


# In the moment in which its peer leaves, others know it still


class When(trio.abc.Instrument):
    """Calls something once, before a task's step, when a condition holds."""

    def __init__(self, condition: Callable[[], bool], call: Callable[[], None]) -> None:
        self.condition = condition
        self.call: Callable[[], None] | None = call

    def before_task_step(self, task: Any) -> None:
        if self.call is not None and self.condition():
            call, self.call = self.call, None
            call()


@pytest.mark.parametrize("what", ["frame", "gap", "tick"])
async def test_a_stream_whose_nursery_has_closed_breaks_nobody(
    kind: str, autojump_clock, what: str
):
    async with open_room(kind, newest=2) as room:
        opened = room.opened(cursor=0)
        await trio.sleep(1)
        connection, peer = opened.connection, opened.peer
        failed: list[Exception] = []

        def closed() -> bool:
            nursery = connection._nursery
            return nursery is not None and nursery._closed

        def do() -> None:
            now = trio.current_time()
            try:
                if what == "frame":
                    room.publish()
                elif what == "gap":
                    connection.offer(frame(9), now)
                elif connection.slot is not None:
                    connection.tick(now)
            except Exception as error:
                failed.append(error)

        peer.stop_reading()
        when = When(closed, do)
        trio.lowlevel.add_instrument(when)
        try:
            peer.leave()
            await trio.sleep(1)
        finally:
            trio.lowlevel.remove_instrument(when)
        assert when.call is None, "there was such a moment"
        assert failed == []
        assert opened.done
        assert not any(room.clock._slots)


# Slow readers


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_slow_reader_is_ended_and_the_publisher_never_waits(
    kind: str, autojump_clock, batch: int
):
    async with open_room(kind) as room:
        slow, fast = room.opened(), room.opened()
        await trio.sleep(1)
        slow.peer.stop_reading()
        with assert_no_checkpoints():
            room.publish()
        await trio.sleep(1)  # it waits for its reader now
        size = len(frame(10).chunked)
        published = 0
        while slow.connection.reason is None and published < 1000:
            with assert_no_checkpoints():
                room.publish(batch)
            published += batch
            if kind == "asgi":
                await trio.sleep(0.001)
        assert slow.connection.reason is ClosingReason.SLOW
        assert 0.8 * LIMITS.outbox < published * size < 1.3 * LIMITS.outbox
        assert room.hub.streams == 1
        assert slow.connection._outbox is not None
        assert len(slow.connection._outbox) == 0, "nothing is kept for it"
        ended = trio.current_time()
        with trio.move_on_after(100):
            while not slow.done:
                await trio.sleep(0.1)
        assert trio.current_time() - ended < GOODBYE_SECONDS + 0.2, "and it is not waited for"
        await trio.sleep(1)
        assert fast.peer.seqs == list(range(1, published + 2))
        fast.peer.leave()


async def test_a_reader_without_progress_for_too_long_is_slow_without_another_frame(
    kind: str, autojump_clock
):
    async with open_room(kind) as room:
        opened = room.opened()
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish()
        await trio.sleep(LIMITS.stall - 0.5)
        assert opened.connection.reason is None
        await trio.sleep(1)
        assert opened.connection.reason is ClosingReason.SLOW
        assert room.hub.streams == 0
        opened.peer.read_on()  # in time for the reason
        await trio.sleep(1)
        assert reason_of(opened.peer) == ("slow", True)
        assert opened.done


async def test_a_quiet_stream_whose_reader_is_frozen_is_found_by_its_heartbeat(
    kind: str, autojump_clock
):
    async with open_room(kind) as room:
        opened = room.opened()
        await trio.sleep(1)
        opened.peer.stop_reading()
        await trio.sleep(LIMITS.heartbeat + LIMITS.stall - 1.5)
        assert opened.connection.reason is None
        await trio.sleep(1)
        assert opened.connection.reason is ClosingReason.SLOW


async def test_a_reader_that_takes_a_little_each_time_is_not_slow(autojump_clock):
    async with open_room("direct") as room:
        opened = room.opened()
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish(3)
        for _ in range(10):
            await trio.sleep(LIMITS.stall - 0.5)
            opened.peer.read_on(20)
        assert opened.connection.reason is None
        opened.peer.read_on()
        await trio.sleep(1)
        assert opened.peer.seqs == [1, 2, 3]
        assert opened.tasks == 0, "it keeps up again"
        before = len(opened.given)
        room.publish()
        assert len(opened.given) == before + 1
        opened.peer.leave()


@pytest.mark.parametrize("cut", [1, 3, 20, 50])
async def test_nothing_comes_between_the_halves_of_a_frame(autojump_clock, cut: int):
    """`dechunk` raises where it does."""
    async with open_room("direct", newest=1) as room:
        opened = room.opened(cursor=1)
        await trio.sleep(1)
        opened.peer.stop_reading(after=cut)
        room.publish()
        room.publish(2)
        await trio.sleep(0.1)
        room.publish()
        opened.connection.tick(trio.current_time() + LIMITS.heartbeat)
        opened.peer.read_on(cut)
        await trio.sleep(0.1)
        room.publish()
        opened.peer.read_on()
        await trio.sleep(0.1)
        assert opened.peer.seqs == [2, 3, 4, 5, 6]
        opened.peer.leave()


@pytest.mark.parametrize("cut", [1, 3, 20, 40])
async def test_the_reason_comes_after_the_whole_of_a_frame_that_was_begun(autojump_clock, cut: int):
    async with open_room("direct", newest=1) as room:
        opened = room.opened(cursor=1)
        await trio.sleep(1)
        opened.peer.stop_reading(after=cut)
        room.publish()
        await trio.sleep(0.1)
        room.publish()
        opened.connection.end(ClosingReason.DRAIN)
        await trio.sleep(0.1)
        assert not opened.done
        opened.peer.read_on()
    assert opened.peer.seqs == [2], "what was not begun is not sent"
    assert reason_of(opened.peer) == ("drain", True)
    assert opened.peer.ended


async def test_a_reader_that_drips_does_not_hold_up_the_end(autojump_clock):
    async with open_room("direct") as room:
        opened = room.opened()
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish(3)
        await trio.sleep(1)
        opened.connection.end(ClosingReason.DRAIN)
        ended = trio.current_time()
        for _ in range(20):
            await trio.sleep(GOODBYE_SECONDS / 2 - 0.1)
            opened.peer.read_on(1)
            if opened.done:
                break
        assert trio.current_time() - ended < 1.5 * GOODBYE_SECONDS


async def test_a_stream_that_is_ended_before_its_beginning_is_out_is_whole(
    kind: str, autojump_clock
):
    async with open_room(kind, newest=2) as room:
        opened = Opened.__new__(Opened)
        opened.peer, opened.connection, opened.done = Peer(kind), room.connection(), False
        opened.peer.stop_reading(after=30 if kind == "direct" else 0)
        room.nursery.start_soon(opened._run, 0, 0)
        await trio.sleep(1)
        opened.connection.end(ClosingReason.DRAIN)
        await trio.sleep(0.5)
        opened.peer.read_on()
    assert opened.peer.started is not None
    assert reason_of(opened.peer) == ("drain", True)
    assert opened.peer.ended


async def test_a_peer_that_leaves_while_it_is_waited_for_ends_the_stream(kind: str, autojump_clock):
    async with open_room(kind) as room:
        opened = room.opened()
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish()
        await trio.sleep(1)
        opened.peer.leave()
        await trio.sleep(0.1)
        assert opened.done
        assert opened.connection.reason is None
        assert room.hub.streams == 0


# The lease


@pytest.mark.parametrize("why", [ClosingReason.MAX_AGE, ClosingReason.SESSION_ENDED])
@pytest.mark.parametrize("ends", [100.55, 77, 0.01])
async def test_nothing_is_sent_later_than_the_lease(
    kind: str, autojump_clock, ends: float, why: ClosingReason
):
    async with open_room(kind) as room:
        opened = room.opened(ends_in=ends, why=why)
        started = trio.current_time()

        async def talk() -> None:
            while not opened.done:
                room.publish()
                await trio.sleep(0.03)

        room.nursery.start_soon(talk)
    over = max(when for when, body in opened.peer.written if b"data: {" in body) - started
    assert ends - 2 * TICK <= over <= max(ends, TICK) + 0.001
    assert reason_of(opened.peer) == (why.value, True)


# Cancelled anywhere


STEPS = [*(("direct", k) for k in range(1, 9)), *(("asgi", k) for k in range(1, 16))]
"""All that such a stream's tasks have in those tests."""


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when its task has been scheduled for the k-th time."""

    def __init__(self, k: int) -> None:
        self.left = k
        self.scope = trio.CancelScope()
        self.root: Any = None

    def before_task_step(self, task: Any) -> None:
        if self.root is None or self.left <= 0:
            return
        node: Any = task
        while node is not None and node is not self.root:
            node = node.parent_nursery.parent_task if node.parent_nursery else None
        if node is self.root:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


@pytest.mark.parametrize(("kind", "k"), STEPS)
async def test_cancelled_at_any_step_a_stream_is_detached(kind: str, autojump_clock, k: int):
    cancel = CancelAt(k)
    trio.lowlevel.add_instrument(cancel)
    try:
        async with open_room(kind, newest=25, page=10) as room:
            room.store.takes = 0.01
            room.store.feed.listen = 0.01
            await trio.sleep(0.1)
            tasks = trio.lowlevel.current_statistics().tasks_living
            peer, connection = Peer(kind), room.connection()

            async def stream() -> None:
                with cancel.scope:
                    cancel.root = trio.lowlevel.current_task()
                    await run(connection, peer, cursor=0)

            room.nursery.start_soon(stream)
            for _ in range(30):
                await trio.sleep(0.5)
                if room.hub.streams:
                    room.publish()
                    peer.stop_reading(after=30)
                    await trio.sleep(0.1)
                    peer.read_on()
            assert cancel.scope.cancel_called
            assert room.hub.streams == 0
            assert room.hub.streams_of(1) == ()
            assert not any(room.clock._slots)
            assert trio.lowlevel.current_statistics().tasks_living == tasks
            assert connection.watermark.state is State.ENDED
            assert peer.named("closing") == []
            assert peer.seqs == list(range(1, len(peer.seqs) + 1))
    finally:
        trio.lowlevel.remove_instrument(cancel)


@pytest.mark.parametrize(("kind", "k"), STEPS)
async def test_ended_at_any_step_a_stream_says_why_or_has_not_begun(
    kind: str, autojump_clock, k: int
):
    end = CancelAt(k)
    early = False
    trio.lowlevel.add_instrument(end)
    try:
        async with open_room(kind, newest=25, page=10) as room:
            room.store.takes = 0.01
            room.store.feed.listen = 0.01
            peer, connection = Peer(kind), room.connection()

            class Ends:
                """In place of a scope."""

                cancel_called = False

                def cancel(self) -> None:
                    connection.end(ClosingReason.DRAIN)

            end.scope = Ends()  # type: ignore[assignment]

            async def stream() -> None:
                nonlocal early
                end.root = trio.lowlevel.current_task()
                try:
                    await run(connection, peer, cursor=0)
                except EndedEarly:
                    early = True

            room.nursery.start_soon(stream)
            for _ in range(30):
                await trio.sleep(0.5)
                if room.hub.streams:
                    room.publish()
            assert room.hub.streams == 0
            assert connection.reason is ClosingReason.DRAIN
            assert not any(room.clock._slots)
            if early:
                assert peer.started is None
            else:
                assert reason_of(peer) == ("drain", True)
                assert peer.ended
            assert peer.seqs == list(range(1, len(peer.seqs) + 1))
    finally:
        trio.lowlevel.remove_instrument(end)


async def test_streams_and_catch_up_together_lose_nothing(kind: str, autojump_clock):
    """The fast path loses, repeats, reorders and batches; streams come and go and resume."""
    chance = random.Random(5)
    async with open_room(kind, newest=3) as room:
        room.store.takes = 0.005
        catch_up = CatchUp(room.hub, room.store, reconcile=2, poll=1)  # type: ignore[arg-type]
        got: list[list[int]] = [[] for _ in range(6)]
        over = False

        async def read(number: int) -> None:
            while not over or (got[number] or [0])[-1] < room.store.newest:
                peer, connection = Peer(kind), room.connection()
                cursor = got[number][-1] if got[number] else 0
                async with trio.open_nursery() as nursery:

                    async def leave(peer: Peer = peer) -> None:
                        await trio.sleep(chance.uniform(0.01, 3))
                        if kind == "direct":
                            peer.stop_reading(after=chance.randrange(200))
                        await trio.sleep(chance.uniform(0.01, 1))
                        peer.read_on()
                        await trio.sleep(chance.uniform(0.01, 3))
                        peer.leave()

                    nursery.start_soon(leave)
                    await run(connection, peer, cursor=cursor)
                got[number] += peer.seqs

        async with trio.open_nursery() as nursery:
            nursery.start_soon(catch_up.serve)
            nursery.start_soon(room.hub.serve)
            async with trio.open_nursery() as readers:
                for number in range(6):
                    readers.start_soon(read, number)
                for _ in range(200):
                    batch = [room.store_message() for _ in range(chance.choice([1, 1, 2, 4]))]
                    for _ in range(chance.choice([0, 1, 1, 1, 2])):
                        late = chance.choice([0, 0, 0, 0.01, 0.1, 1])
                        chance.shuffle(batch)

                        async def deliver(batch: list[int] = batch[:], late: float = late) -> None:
                            await trio.sleep(late)
                            room.hub.deliver([(42, record(seq)) for seq in batch])

                        readers.start_soon(deliver)
                    await trio.sleep(chance.expovariate(10))
                over = True
            nursery.cancel_scope.cancel()
        for seqs in got:
            assert seqs == list(range(1, room.store.newest + 1))
        assert room.hub.streams == 0
