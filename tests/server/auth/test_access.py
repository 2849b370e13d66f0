"""The gate's memory: what it keeps, for how long, and what an eviction takes from it."""

from typing import Any

import pytest
import trio

from server.auth.access import MAX_EVICTED, STALE_SECONDS, Gate
from server.auth.evictions import TICK_SECONDS, Evictions
from server.web.problems import Problem
from storage.contract import Access, ChannelAccess, Eviction, StoreUnavailable, User

CACHE = 5.0


def user(number: int = 7, **changes: Any) -> User:
    fields: dict[str, Any] = {
        "id": number,
        "clerk_id": f"user_{number}",
        "email": "a@example.com",
        "first_name": "A",
        "last_name": "B",
        "is_active": True,
        "subscription_status": "active",
        "sponsored": False,
        "therapist_id": None,
    }
    return User(**fields | changes)


class Answers:
    """A store that knows one user in one channel."""

    def __init__(self) -> None:
        self.asked = 0
        self.takes = 0.0
        self.down = False
        self.user: User | None = user()
        self.is_prospect = True

    async def access(self, subject: str, channel_id: int | None) -> Access:
        self.asked += 1
        found = self.user if self.user and self.user.clerk_id == subject else None
        is_prospect = self.is_prospect
        await trio.sleep(self.takes)  # after it has seen the rows
        if self.down:
            raise StoreUnavailable
        channel = None if channel_id is None else ChannelAccess(channel_id, 0, False, is_prospect)
        return Access(found, channel)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def gate(answers: Any) -> Gate:
    return Gate(answers, cache=CACHE, trials=False)


async def test_what_lets_somebody_in_is_asked_once_while_it_is_believed(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    for _ in range(5):
        gate.permit(await gate.look("user_7", 12))
        await trio.sleep(0.9)
    assert answers.asked == 1
    await trio.sleep(CACHE)
    gate.permit(await gate.look("user_7", 12))
    assert answers.asked == 2


@pytest.mark.parametrize(
    "refused",
    [
        {"user": None},
        {"user": user(is_active=False)},
        {"user": user(subscription_status="canceled")},
        {"is_prospect": False},
    ],
)
async def test_a_refusal_is_never_remembered(gate: Gate, answers: Answers, refused: dict[str, Any]):
    good = {name: getattr(answers, name) for name in refused}
    for name, value in refused.items():
        setattr(answers, name, value)
    with pytest.raises(Problem):
        gate.permit(await gate.look("user_7", 12))
    for name, value in good.items():
        setattr(answers, name, value)
    gate.permit(await gate.look("user_7", 12))


async def test_while_the_store_is_gone_what_it_said_is_believed_and_not_for_ever(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    await gate.look("user_7", 12)
    answers.down = True
    await trio.sleep(STALE_SECONDS - 1)
    gate.permit(await gate.look("user_7", 12))
    await trio.sleep(2)
    with pytest.raises(StoreUnavailable):
        await gate.look("user_7", 12)


CONCERNED = [
    Eviction(user_id=7),
    Eviction(clerk_id="user_7"),
    Eviction(channel_id=12),
    Eviction(all=True),
    Eviction(user_id=1, channel_id=12),
]
OTHERS = [Eviction(user_id=8), Eviction(clerk_id="user_8"), Eviction(channel_id=13)]


@pytest.mark.parametrize("eviction", CONCERNED)
async def test_what_was_cached_is_not_used_after_an_eviction(
    autojump_clock: Any, gate: Gate, answers: Answers, eviction: Eviction
):
    gate.permit(await gate.look("user_7", 12))
    await trio.sleep(0.1)
    answers.user = user(subscription_status="canceled")
    gate.permit(await gate.look("user_7", 12))  # cached
    gate.forget(eviction)
    with pytest.raises(Problem):
        gate.permit(await gate.look("user_7", 12))


@pytest.mark.parametrize("eviction", CONCERNED)
async def test_an_evicted_answer_is_not_believed_while_the_store_is_gone_either(
    autojump_clock: Any, gate: Gate, answers: Answers, eviction: Eviction
):
    await gate.look("user_7", 12)
    await trio.sleep(0.1)
    gate.forget(eviction)
    answers.down = True
    with pytest.raises(StoreUnavailable):
        await gate.look("user_7", 12)


@pytest.mark.parametrize("eviction", OTHERS)
async def test_an_eviction_of_others_costs_no_look(
    autojump_clock: Any, gate: Gate, answers: Answers, eviction: Eviction
):
    await gate.look("user_7", 12)
    await trio.sleep(0.1)
    gate.forget(eviction)
    await gate.look("user_7", 12)
    assert answers.asked == 1


@pytest.mark.parametrize("eviction", CONCERNED)
async def test_a_look_up_in_flight_when_the_eviction_comes_is_asked_again(
    autojump_clock: Any, gate: Gate, answers: Answers, eviction: Eviction
):
    """What it read may be from before the change."""
    answers.takes = 1.0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def looks() -> None:
            with pytest.raises(Problem):
                gate.permit(await gate.look("user_7", 12))

        await trio.sleep(0.5)
        answers.is_prospect = False
        gate.forget(eviction)
    assert answers.asked == 2
    answers.takes = 0.0
    with pytest.raises(Problem):
        gate.permit(await gate.look("user_7", 12))


async def test_evictions_without_end_hold_nobody_up_and_let_nothing_be_remembered(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.takes = 1.0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def evicts() -> None:
            while True:
                await trio.sleep(0.3)
                gate.forget(Eviction(user_id=7))

        with trio.fail_after(10):
            await gate.look("user_7", 12)
        nursery.cancel_scope.cancel()
    asked = answers.asked
    await gate.look("user_7", 12)
    assert answers.asked == asked + 1


async def test_more_evictions_than_are_kept_evict_everything_and_are_let_go(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    await gate.look("user_7", 12)
    await trio.sleep(0.1)
    for number in range(MAX_EVICTED + 1):
        gate.forget(Eviction(user_id=1000 + number))
    assert len(gate._evicted) <= MAX_EVICTED
    await trio.sleep(0.1)
    await gate.look("user_7", 12)
    assert answers.asked == 2


class Stream:
    def __init__(self, user_id: int, channel_id: int = 12) -> None:
        self.user_id = user_id
        self.subject = f"user_{user_id}"
        self.channel_id = channel_id
        self.looks: list[float] = []


async def look(streams: list[Stream]) -> None:
    for stream in streams:
        stream.looks.append(trio.current_time())
    await trio.sleep(0.01)


@pytest.mark.parametrize("eviction", CONCERNED[:4])
async def test_the_streams_of_those_evicted_are_looked_at_at_once_and_no_others(
    autojump_clock: Any, gate: Gate, eviction: Eviction
):
    mine, other = Stream(7), Stream(8, 13)
    evictions = Evictions(gate, lambda: [mine, other], look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(evictions.serve)
        await trio.sleep(1)
        started = trio.current_time()
        evictions.take([eviction, Eviction(user_id=99)])
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert mine.looks == [started]
    assert other.looks == ([started] if eviction.all else [])


async def test_evictions_that_come_together_are_one_pass(autojump_clock: Any, gate: Gate):
    streams = [Stream(number, number) for number in range(1000)]
    passes: list[float] = []

    def all_streams() -> list[Stream]:
        passes.append(trio.current_time())
        return streams

    evictions = Evictions(gate, all_streams, look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(evictions.serve)
        await trio.sleep(1)
        for number in range(100):
            evictions.take([Eviction(user_id=number)])
        evictions.missed()
        await trio.lowlevel.checkpoint()
        for _ in range(10):
            evictions.missed()
            await trio.lowlevel.checkpoint()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [len(stream.looks) for stream in streams] == [2] * len(streams)
    assert len(passes) == 2
    assert passes[1] - passes[0] >= TICK_SECONDS


async def test_evictions_are_obeyed_again_after_nobody_could_tell(autojump_clock: Any, gate: Gate):
    mine, down = Stream(7), True

    async def look_if_up(streams: list[Stream]) -> None:
        if down:
            raise StoreUnavailable
        await look(streams)

    evictions = Evictions(gate, lambda: [mine], look_if_up)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(evictions.serve)
        evictions.missed()
        await trio.sleep(1)
        assert mine.looks == []
        down = False
        evictions.missed()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert len(mine.looks) == 1
