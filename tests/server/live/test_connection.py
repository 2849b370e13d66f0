"""One stream's whole life: what it is sent, when, and that nothing is left of it."""

import gc
import random
import weakref
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from protocol.closing import CLOSING_RULES, ClosingReason
from protocol.parser import EventStreamParser
from server.live.catch_up import CatchUp
from server.live.connection import (
    GOODBYE_SECONDS,
    LISTEN_SECONDS,
    Connection,
    EndedEarly,
    Lease,
    StreamLimits,
    jittered,
)
from server.live.hub import Hub
from server.live.watermark import State
from storage.contract import ChannelGone, StoreUnavailable
from tests.server.live.fakes import FakeStore, Peer, frame, record

LIMITS = StreamLimits(heartbeat=15, retry=2000, outbox=10_000, stall=5, recheck=60)


async def allow() -> ClosingReason | None:
    await trio.lowlevel.checkpoint()
    return None


class Room:
    """A hub, a store, and streams of channel 42."""

    def __init__(self, newest: int = 0, **store: Any) -> None:
        self.hub = Hub()
        self.store = FakeStore(newest, **store)

    def connection(
        self,
        *,
        limits: StreamLimits = LIMITS,
        session: float = 10_000,
        max_age: float = 20_000,
        check: Callable[[], Awaitable[ClosingReason | None]] = allow,
    ) -> Connection:
        now = trio.current_time()
        return Connection(
            id="stream-1",
            channel_id=42,
            user_id=1,
            hub=self.hub,
            store=self.store,  # type: ignore[arg-type]
            limits=limits,
            lease=Lease(now + session, now + max_age, check),
        )

    def run(
        self, connection: Connection, peer: Peer, *, cursor: int | None = None, head: int = 0
    ) -> Awaitable[None]:
        return connection.run(
            cursor=cursor, head=head, start=peer.start, send=peer.send, receive=peer.receive
        )

    def store_message(self) -> int:
        self.store.newest += 1
        return self.store.newest

    def publish(self) -> int:
        seq = self.store_message()
        self.hub.deliver([(42, record(seq))])
        return seq


class Opened:
    """A stream that runs in a nursery of the test's."""

    def __init__(self, nursery: trio.Nursery, room: Room, cursor: int | None, **options: Any):
        self.peer = Peer()
        self.connection = room.connection(**options)
        self.done = False
        nursery.start_soon(self._run, room, cursor)

    async def _run(self, room: Room, cursor: int | None) -> None:
        await room.run(self.connection, self.peer, cursor=cursor)
        self.done = True


def reason_of(peer: Peer) -> tuple[str, bool]:
    (closing,) = peer.named("closing")
    said = msgspec.json.decode(closing.data)
    return said["reason"], said["reconnect"]


# What is sent


async def test_a_stream_begins_with_connected_and_what_comes_after_the_cursor(autojump_clock):
    room = Room(newest=5)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=3)
        await trio.sleep(1)
        assert [e.event for e in opened.peer.events] == ["message"] * 3
        assert '"type":"connected"' in opened.peer.events[0].data
        assert len(opened.peer.written) == 1, "in one write"
        assert opened.peer.seqs == [4, 5]
        assert room.publish() == 6
        await trio.sleep(1)
        assert opened.peer.seqs == [4, 5, 6]
        opened.peer.leave()


async def test_without_a_cursor_it_begins_with_the_newest(autojump_clock):
    room = Room(newest=70)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None)
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(21, 71))
        opened.peer.leave()


async def test_a_cursor_ahead_is_a_reset_before_the_newest(autojump_clock):
    room = Room(newest=70)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=71)
        await trio.sleep(1)
        assert [e.event for e in opened.peer.events[:3]] == ["message", "reset", "message"]
        assert opened.peer.seqs == list(range(21, 71))
        opened.peer.leave()


async def test_an_empty_channel_with_a_cursor_ahead_is_reset_and_goes_live(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=9)
        await trio.sleep(1)
        room.publish()
        await trio.sleep(1)
        assert len(opened.peer.named("reset")) == 1
        assert opened.peer.seqs == [1]
        opened.peer.leave()


async def test_what_is_published_while_history_is_read_is_neither_lost_nor_repeated(
    autojump_clock,
):
    room = Room(newest=4)
    room.store.takes = room.store.takes_after = 1
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=2)
        for _ in range(30):  # before the page is seen, and after it
            await trio.sleep(0.1)
            room.publish()
        await trio.sleep(5)
        assert opened.peer.seqs == list(range(3, 35))
        opened.peer.leave()


async def test_a_long_catch_up_is_read_page_by_page(autojump_clock):
    room = Room(newest=25, page=10)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(1, 26))
        assert [after for after, _ in room.store.reads] == [0, 10, 20]
        assert opened.connection.watermark.state is State.LIVE
        opened.peer.leave()


async def test_a_page_that_is_behind_other_streams_is_not_the_end(autojump_clock):
    """Redis may be behind: what others were given is owed to this one, too."""
    room = Room(newest=3)
    async with trio.open_nursery() as nursery:
        first = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        room.publish()
        room.store.newest = 3  # the next page is an old one
        room.store.before_answer = lambda: setattr(room.store, "newest", 4)
        second = Opened(nursery, room, cursor=0)
        await trio.sleep(2)
        assert first.peer.seqs == second.peer.seqs == [1, 2, 3, 4]
        assert room.store.reads[-1] == (3, 4), "read again, and told how far it goes"
        first.peer.leave()
        second.peer.leave()


async def test_a_stream_does_not_wait_long_for_its_subscription(autojump_clock):
    room = Room(newest=1)
    room.store.feed.listen = 60
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        started = trio.current_time()
        await trio.sleep(5)
        assert opened.peer.started == pytest.approx(started + LISTEN_SECONDS)
        opened.peer.leave()


async def test_retry_is_between_once_and_twice_what_is_set(autojump_clock):
    seen = {jittered(2000) for _ in range(300)}
    assert 2000 <= min(seen) < 2300
    assert 3700 < max(seen) <= 4000
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None)
        await trio.sleep(1)
        parser = EventStreamParser()
        parser.feed(opened.peer.written[0][1])
        assert parser.retry is not None
        assert 2000 <= parser.retry <= 4000
        opened.peer.leave()


# Heartbeats


async def test_a_heartbeat_comes_after_so_much_silence_and_any_write_resets_it(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None)
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


async def test_a_busy_stream_has_no_heartbeat(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None)
        for _ in range(20):
            await trio.sleep(10)
            room.publish()
        await trio.sleep(1)
        assert opened.peer.named("heartbeat") == []
        opened.peer.leave()


async def test_while_the_store_is_down_a_stream_that_is_behind_lives_on(autojump_clock):
    room = Room(newest=2)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        room.store.down = True
        opened.connection.offer(frame(9))  # nobody filled the gap
        room.store.newest = 9
        await trio.sleep(100)
        assert opened.peer.seqs == [1, 2]
        assert len(opened.peer.named("heartbeat")) == 6
        assert len(room.store.reads) < 1000
        room.store.down = False
        await trio.sleep(1)
        assert opened.peer.seqs == list(range(1, 10))
        opened.peer.leave()


async def test_while_the_store_knows_less_than_was_given_out_a_stream_lives_on(autojump_clock):
    """A standby that is behind, or a past that was restored."""
    room = Room(newest=5)
    async with trio.open_nursery() as nursery:
        first = Opened(nursery, room, cursor=5)
        await trio.sleep(1)
        room.publish()
        room.store.newest = 5
        second = Opened(nursery, room, cursor=4)
        await trio.sleep(50)
        assert second.peer.seqs == [5]
        assert len(second.peer.named("heartbeat")) == 3
        room.store.newest = 6
        await trio.sleep(1)
        assert second.peer.seqs == [5, 6]
        first.peer.leave()
        second.peer.leave()


async def test_a_slow_read_that_brings_nothing_new_delays_the_heartbeat_and_breaks_nothing(
    autojump_clock,
):
    room = Room(newest=2)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(14)
        room.store.takes = 3
        opened.connection.watermark.state = State.BEHIND
        opened.connection.outbox.wake()
        await trio.sleep(10)
        assert len(opened.peer.named("heartbeat")) == 1
        assert not opened.done
        opened.peer.leave()


# The end


async def test_a_peer_that_leaves_leaves_nothing_behind(autojump_clock):
    room = Room(newest=2)
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        assert room.hub.streams == 1
        opened.peer.leave()
        await trio.sleep(1)
        assert opened.done
        assert opened.peer.named("closing") == []
    assert room.hub.streams == 0
    assert not room.hub.channels
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    gone = weakref.ref(opened.connection)
    del opened, nursery
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("reason", ClosingReason)
async def test_an_ended_stream_says_why_and_whether_to_come_back(
    autojump_clock, reason: ClosingReason
):
    room = Room(newest=2)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        with assert_no_checkpoints():
            opened.connection.end(reason)
            opened.connection.end(ClosingReason.DRAIN)
        assert room.hub.streams == 0, "at once"
        assert opened.connection.watermark.state is State.ENDED
        room.publish()
    assert reason_of(opened.peer) == (reason.value, CLOSING_RULES[reason].reconnect)
    assert opened.peer.ended
    assert opened.peer.seqs == [1, 2], "nothing but the reason"


@pytest.mark.parametrize("moment", ["before it ran", "while it reads"])
async def test_a_stream_that_is_ended_before_its_response_started_says_so(
    autojump_clock, moment: str
):
    room, peer = Room(newest=2), Peer()
    room.store.takes = 2
    connection = room.connection()
    if moment == "before it ran":
        connection.end(ClosingReason.DRAIN)
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(1)
            connection.end(ClosingReason.DRAIN)

        nursery.start_soon(end)
        with pytest.raises(EndedEarly) as caught:
            await room.run(connection, peer)
    assert caught.value.reason is ClosingReason.DRAIN
    assert peer.started is None
    assert peer.written == []
    assert room.hub.streams == 0


@pytest.mark.parametrize(("fault", "error"), [("down", StoreUnavailable), ("gone", ChannelGone)])
async def test_history_that_cannot_be_read_is_an_error_before_the_response_starts(
    autojump_clock, fault: str, error: type[Exception]
):
    room, peer = Room(newest=2), Peer()
    setattr(room.store, fault, True)
    with pytest.raises(error):
        await room.run(room.connection(), peer)
    assert peer.started is None
    assert room.hub.streams == 0
    assert not room.hub.channels


async def test_a_channel_that_goes_away_while_it_is_read_ends_the_stream(autojump_clock):
    room = Room(newest=2)
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=0)
        await trio.sleep(1)
        room.store.gone = True
        opened.connection.offer(frame(9))
        await trio.sleep(5)
        assert opened.done
    assert reason_of(opened.peer) == ("access_revoked", False)


async def test_a_slow_reader_is_ended_and_the_publisher_never_waits(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        slow = Opened(nursery, room, cursor=None)
        fast = Opened(nursery, room, cursor=None)
        await trio.sleep(1)
        slow.peer.stop_reading()
        with assert_no_checkpoints():
            room.publish()
        await trio.sleep(1)  # its writer is in the middle of a write now
        published = 1
        with assert_no_checkpoints():
            while slow.connection.reason is None and published < 1000:
                room.publish()
                published += 1
                if published % 50 == 0:
                    fast.connection.outbox.take()  # as a writer that is never late would
        assert slow.connection.reason is ClosingReason.SLOW
        assert published > 50
        assert room.hub.streams == 1
        assert len(slow.connection.outbox) == 0, "nothing is kept for it"
        ended = trio.current_time()
        await trio.sleep(GOODBYE_SECONDS + 1)
        assert slow.done, "and it is not waited for"
        assert trio.current_time() - ended < GOODBYE_SECONDS + 1.1
        fast.peer.leave()


async def test_a_reader_without_progress_for_too_long_is_slow(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None)
        await trio.sleep(1)
        opened.peer.stop_reading()
        room.publish()
        await trio.sleep(4)
        room.publish()
        assert opened.connection.reason is None
        await trio.sleep(2)
        room.publish()
        assert opened.connection.reason is ClosingReason.SLOW
        opened.peer.reading.set()  # it reads again, in time for the reason
        await trio.sleep(1)
        assert reason_of(opened.peer) == ("slow", True)


# The lease


async def test_a_stream_is_no_older_than_its_maximum_age(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None, max_age=100.5, session=200)
        started = trio.current_time()
        await wait_all_tasks_blocked()
    assert trio.current_time() - started == pytest.approx(100.5)
    assert reason_of(opened.peer) == ("max_age", True)


async def test_a_stream_ends_with_its_session(autojump_clock):
    room = Room()
    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None, session=77)
        started = trio.current_time()
    assert trio.current_time() - started == pytest.approx(77)
    assert reason_of(opened.peer) == ("session_ended", True)


@pytest.mark.parametrize("reason", [ClosingReason.ACCESS_REVOKED, ClosingReason.SUBSCRIPTION_ENDED])
async def test_access_is_looked_at_again_while_the_stream_is_open(
    autojump_clock, reason: ClosingReason
):
    room = Room()
    looks: list[float] = []
    answers: list[Any] = [None, StoreUnavailable(), None, reason]

    async def check() -> ClosingReason | None:
        await trio.lowlevel.checkpoint()
        looks.append(trio.current_time())
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None, check=check)
        started = trio.current_time()
    times = [started, *looks]
    pauses = [after - before for before, after in pairwise(times)]
    assert len(pauses) == 4
    assert all(48 <= pause <= 60.001 for pause in pauses), "each jittered, so that they spread"
    assert reason_of(opened.peer) == (reason.value, False)


async def test_a_check_that_takes_long_does_not_outlast_the_lease(autojump_clock):
    room = Room()

    async def check() -> ClosingReason | None:
        await trio.sleep(30)
        return None

    async with trio.open_nursery() as nursery:
        opened = Opened(nursery, room, cursor=None, check=check, max_age=62)
        started = trio.current_time()
    assert trio.current_time() - started == pytest.approx(62)
    assert reason_of(opened.peer) == ("max_age", True)


# Cancelled anywhere


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


@pytest.mark.parametrize("k", range(1, 31))
async def test_cancelled_at_any_step_a_stream_is_detached(autojump_clock, k: int):
    room = Room(newest=25, page=10)
    room.store.takes = 0.01
    room.store.feed.listen = 0.01
    tasks = trio.lowlevel.current_statistics().tasks_living
    cancel = CancelAt(k)
    peer = Peer()
    connection = room.connection()

    async def stream() -> None:
        with cancel.scope:
            cancel.root = trio.lowlevel.current_task()
            await room.run(connection, peer, cursor=0)

    trio.lowlevel.add_instrument(cancel)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            for _ in range(30):
                await trio.sleep(0.5)
                if room.hub.streams:
                    room.publish()
            assert cancel.scope.cancel_called
    finally:
        trio.lowlevel.remove_instrument(cancel)
    assert room.hub.streams == 0
    assert not room.hub.channels
    assert room.hub.streams_of(1) == 0
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert connection.watermark.state is State.ENDED
    assert peer.named("closing") == []
    assert peer.seqs == list(range(1, len(peer.seqs) + 1))


async def test_streams_and_catch_up_together_lose_nothing(autojump_clock):
    """The fast path loses, repeats and reorders; streams come and go and resume."""
    chance = random.Random(5)
    room = Room(newest=3)
    room.store.takes = 0.005
    catch_up = CatchUp(room.hub, room.store, reconcile=2, poll=1)  # type: ignore[arg-type]
    got: list[list[int]] = [[] for _ in range(6)]
    over = False

    async def read(number: int) -> None:
        while not over or (got[number] or [0])[-1] < room.store.newest:
            peer, connection = Peer(), room.connection()
            cursor = got[number][-1] if got[number] else 0
            async with trio.open_nursery() as nursery:

                async def leave(peer: Peer = peer) -> None:
                    await trio.sleep(chance.uniform(0.01, 6))
                    peer.leave()

                nursery.start_soon(leave)
                await room.run(connection, peer, cursor=cursor)
            got[number] += peer.seqs

    async with trio.open_nursery() as nursery:
        nursery.start_soon(catch_up.serve)
        async with trio.open_nursery() as readers:
            for number in range(6):
                readers.start_soon(read, number)
            for _ in range(400):
                seq = room.store_message()
                for _ in range(chance.choice([0, 1, 1, 1, 2])):
                    late = chance.choice([0, 0, 0, 0.01, 0.1, 1])

                    async def deliver(seq: int = seq, late: float = late) -> None:
                        await trio.sleep(late)
                        room.hub.deliver([(42, record(seq))])

                    readers.start_soon(deliver)
                await trio.sleep(chance.expovariate(20))
            over = True
        nursery.cancel_scope.cancel()
    for seqs in got:
        assert seqs == list(range(1, 404))
    assert room.hub.streams == 0
