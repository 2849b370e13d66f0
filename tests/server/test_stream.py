"""How many streams open at one time, how long the others wait for their turn, and where a stream
resumes."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from protocol.closing import PASSING
from protocol.cursors import MAX_SEQ, Cursor
from protocol.parser import EventStreamParser
from server.handlers.stream import TURN_SECONDS, EventStream
from server.live.clock import Clock
from server.live.connection import StreamLimits
from server.live.hub import Hub
from server.web.problems import Problem, closing_response
from storage.contract import Origin, StoreUnavailable
from tests.server.live.fakes import FakeStore, Peer


def stream(*, turns: int, **about: Any) -> tuple[EventStream, trio.Semaphore]:
    """One that would open next, and what it waits for."""
    opening = trio.Semaphore(turns)
    service: Any = SimpleNamespace(
        opening=opening,
        draining=about.get("draining", False),
        settings=SimpleNamespace(max_streams=2),
        hub=SimpleNamespace(streams=about.get("streams", 0)),
    )
    permit: Any = SimpleNamespace(
        user=SimpleNamespace(id=1), channel=SimpleNamespace(channel_id=12)
    )
    request: Any = None

    async def permit_again(_: Any, channel_id: int) -> Any:
        await trio.lowlevel.checkpoint()
        if about.get("revoked", False):
            raise Problem("NOT_YOUR_CHANNEL")
        assert channel_id == 12
        return permit

    service.permit = permit_again
    claims: Any = None
    return EventStream(service, request, claims, permit, None), opening


async def test_a_turn_is_taken_at_once_where_there_is_one():
    waiting, opening = stream(turns=1)
    await waiting._take_turn()
    assert opening.value == 0


async def test_a_turn_that_comes_in_time_is_taken(autojump_clock):
    waiting, opening = stream(turns=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting._take_turn)
        await trio.sleep(TURN_SECONDS - 1)
        opening.release()
    assert opening.value == 0


async def test_who_lost_their_access_in_the_wait_is_refused_and_the_turn_given_back(autojump_clock):
    waiting, opening = stream(turns=0, revoked=True)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def waits() -> None:
            with pytest.raises(Problem) as refused:
                await waiting._take_turn()
            assert refused.value.code == "NOT_YOUR_CHANNEL"

        await trio.sleep(1)
        opening.release()
    assert opening.value == 1


async def test_who_waits_too_long_is_told_to_come_back(autojump_clock):
    waiting, opening = stream(turns=0)
    began = trio.current_time()
    with pytest.raises(Problem) as refused:
        await waiting._take_turn()
    assert (refused.value.code, trio.current_time() - began) == ("UNAVAILABLE", TURN_SECONDS)
    opening.release()
    assert opening.value == 1, "and is not given one later"


@pytest.mark.parametrize(
    ("about", "code"), [({"draining": True}, "DRAINING"), ({"streams": 2}, "SERVER_FULL")]
)
async def test_what_became_of_the_server_meanwhile_counts_and_the_turn_is_given_back(about, code):
    waiting, opening = stream(turns=1, **about)
    with pytest.raises(Problem) as refused:
        await waiting._take_turn()
    assert (refused.value.code, opening.value) == (code, 1)


@pytest.mark.parametrize(
    ("cursor", "after"),
    [
        (None, None),
        (Cursor(1795430000, 17), 17),
        (Cursor(0, 17), MAX_SEQ),
        (Cursor(1795430001, 17), MAX_SEQ),
        (Cursor(1, 0), MAX_SEQ),
    ],
)
async def test_a_cursor_of_another_epoch_is_ahead_of_everything(cursor, after):
    service: Any = SimpleNamespace(store=SimpleNamespace(epoch=1795430000))
    unused: Any = None
    assert EventStream(service, unused, unused, unused, cursor)._after() == after


# One stream more than allowed


class Person:
    """Somebody's tabs, on a worker that allows ten of them."""

    def __init__(self, *, allowed: int = 10) -> None:
        self.hub = Hub()
        self.store = FakeStore(newest=3)
        self.clock = Clock(tick=0.5)
        self.service: Any = SimpleNamespace(
            opening=trio.Semaphore(400),
            draining=False,
            streams=0,
            hub=self.hub,
            clock=self.clock,
            stream_limits=StreamLimits(heartbeat=15, retry=1500, outbox=10_000, stall=5),
            settings=SimpleNamespace(
                max_streams=100,
                max_streams_per_user=allowed,
                session_lease_seconds=300.0,
                max_age_seconds=4 * 3600.0,
                forwarded_hops=0,
            ),
            store=self.store,
        )
        self.notes: list[str] = []
        row: Any = SimpleNamespace(note=lambda row: self.notes.append(f"{row.action} {row.detail}"))
        self.store.epoch = 0  # type: ignore[attr-defined]
        self.store.audit = row  # type: ignore[attr-defined]

    def stream(self, peer: Peer) -> EventStream:
        origin = Origin(actor="user_1", impersonator=None, user_id=1, address=None, request_id="r")
        request: Any = SimpleNamespace(
            direct={"open": lambda status, headers: peer.begin()}, origin=lambda *, hops: origin
        )
        claims: Any = SimpleNamespace(subject="user_1", expires_at=time.time() + 3600)
        permit: Any = SimpleNamespace(
            user=SimpleNamespace(id=1),
            channel=SimpleNamespace(channel_id=42, head=3),
            role="prospect",
        )
        return EventStream(self.service, request, claims, permit, None)


async def no_send(message: dict[str, Any]) -> None:
    raise AssertionError("it is written to the wire")


class Tab:
    """An `EventSource`: comes back after the pause that it was asked for."""

    def __init__(self, person: Person) -> None:
        self.ended: list[tuple[float, str]] = []
        """When each of its streams was ended, and why."""
        self._person = person

    async def run(self) -> None:
        while True:
            parser = EventStreamParser()
            closing = parser.feed(await self._listen())[-1]
            assert closing.event == "closing"
            said = json.loads(closing.data)
            assert said["reconnect"]
            self.ended.append((trio.current_time(), said["reason"]))
            assert parser.retry is not None
            await trio.sleep(parser.retry / 1000)

    async def _listen(self) -> bytes:
        """The whole body of one response."""
        peer = Peer("direct")
        try:
            life = await self._person.stream(peer)(no_send)
        except Problem as problem:  # ended before it had begun
            return closing_response(problem, PASSING[problem.code], retry=1500).body
        await life()
        return peer.body


async def test_eleven_tabs_do_not_chase_each_other(autojump_clock):
    """Bound: in ten minutes at most six of them are ended, the first one included, and none of
    them twice."""
    person = Person()
    tabs = [Tab(person) for _ in range(11)]
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(person.clock.run)
        for tab in tabs:
            nursery.start_soon(tab.run)
        for minute in range(1, 11):
            await trio.sleep_until(began + 60 * minute)
            assert person.hub.streams == 10, "one is away at any time, and no more"
        nursery.cancel_scope.cancel()
    ended = [reason for tab in tabs for _, reason in tab.ended]
    assert set(ended) == {"too_many_streams"}
    assert 3 <= len(ended) <= 6, "one at once, then one each time that somebody comes back"
    assert max(len(tab.ended) for tab in tabs) == 1


async def test_one_stream_more_than_allowed_ends_the_oldest(autojump_clock):
    person = Person(allowed=2)
    peers = [Peer("direct") for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for peer in peers:
            life = await person.stream(peer)(no_send)
            nursery.start_soon(life)
            await trio.sleep(0.1)
        await trio.sleep(1)
        assert [peer.ended for peer in peers] == [True, True, False, False]
        assert len(person.hub.streams_of(1)) == 2
        assert person.notes.count("stream_closed too_many_streams") == 2
        for peer in peers:
            peer.leave()


async def test_an_attempt_that_fails_costs_nobody_their_stream(autojump_clock):
    person = Person(allowed=1)
    peer = Peer("direct")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(await person.stream(peer)(no_send))
        person.hub.drop(42)
        person.store.down = True
        person.hub._openings.forget(42)
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await person.stream(Peer("direct"))(no_send)
        assert not peer.ended
        peer.leave()


async def test_a_stream_that_is_ended_as_the_oldest_while_it_opens_comes_back_later(autojump_clock):
    person = Person(allowed=1)
    slow = person.stream(Peer("direct"))
    person.store.takes = 1
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def opens() -> None:
            with pytest.raises(Problem) as refused:
                await slow(no_send)
            assert (refused.value.code, refused.value.retry_after) == ("TOO_MANY_STREAMS", 120)

        await trio.sleep(0.5)
        person.store.takes = 0
        peer = Peer("direct")
        nursery.start_soon(await person.stream(peer)(no_send))
        await trio.sleep(1)
        assert not peer.ended
        peer.leave()
