"""Open streams' access is looked at together: how many statements that takes, and who is ended."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

from protocol.closing import ClosingReason
from server.auth.access import MAX_LOOKS, Gate
from server.auth.rechecks import MAX_TOGETHER, Rechecks
from storage.contract import Access, ChannelAccess, Eviction, StoreUnavailable
from tests.server.auth.test_access import user


class Answers:
    """A store in which each user N is the prospect of channel N, but for what a test changes."""

    def __init__(self) -> None:
        self.statements: list[list[tuple[str, int]]] = []
        self.takes = 0.0
        self.down = False
        self.changed: dict[str, Access] = {}
        self.before_answer: Callable[[], None] = lambda: None

    async def accesses(self, asked_for: Sequence[tuple[str, int]]) -> list[Access]:
        self.statements.append(list(asked_for))
        answers = [
            self.changed.get(subject)
            or Access(user(channel_id), ChannelAccess(channel_id, 0, False, True))
            for subject, channel_id in asked_for
        ]
        await trio.sleep(self.takes)  # after it has seen the rows
        self.before_answer()
        if self.down:
            raise StoreUnavailable
        return answers


class Stream:
    def __init__(self, number: int) -> None:
        self.channel_id = number
        self.subject = f"user_{number}"
        self.reasons: list[ClosingReason] = []

    def end(self, reason: ClosingReason) -> None:
        self.reasons.append(reason)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def gate(answers: Any) -> Gate:
    return Gate(answers, cache=5.0, trials=False)


REFUSALS = [
    (Access(None, None), ClosingReason.ACCESS_REVOKED),
    (Access(user(3, is_active=False), None), ClosingReason.ACCESS_REVOKED),
    (Access(user(3), None), ClosingReason.ACCESS_REVOKED),
    (Access(user(3), ChannelAccess(3, 0, False, False)), ClosingReason.ACCESS_REVOKED),
    (
        Access(user(3, subscription_status="canceled"), ChannelAccess(3, 0, False, True)),
        ClosingReason.SUBSCRIPTION_ENDED,
    ),
]


def rechecks(gate: Gate, streams: Sequence[Stream] = (), *, seconds: float = 30.0) -> Rechecks:
    return Rechecks(gate, lambda: streams, seconds=seconds)


@pytest.mark.parametrize(("refusal", "reason"), REFUSALS)
async def test_who_has_lost_their_access_is_ended_and_nobody_else(
    gate: Gate, answers: Answers, refusal: Access, reason: ClosingReason
):
    answers.changed["user_3"] = refusal
    streams = [Stream(number) for number in range(1, 6)]
    await rechecks(gate).look(streams)
    assert [stream.reasons for stream in streams] == [[], [], [reason], [], []]


async def test_many_are_looked_at_in_one_statement_and_none_is_too_long(
    gate: Gate, answers: Answers
):
    streams = [Stream(number) for number in range(MAX_TOGETHER + 7)]
    answers.changed[streams[-1].subject] = Access(None, None)
    await rechecks(gate).look(streams)
    assert [len(statement) for statement in answers.statements] == [MAX_TOGETHER, 7]
    assert streams[-1].reasons == [ClosingReason.ACCESS_REVOKED]


async def test_two_streams_of_one_person_in_one_channel_are_asked_for_once(
    gate: Gate, answers: Answers
):
    answers.changed["user_3"] = Access(None, None)
    tabs = [Stream(3), Stream(3)]
    await rechecks(gate).look(tabs)
    assert answers.statements == [[("user_3", 3)]]
    assert [tab.reasons for tab in tabs] == [[ClosingReason.ACCESS_REVOKED]] * 2


async def test_while_nobody_can_tell_no_stream_ends(gate: Gate, answers: Answers):
    answers.changed["user_3"] = Access(None, None)
    answers.down = True
    stream = Stream(3)
    with pytest.raises(StoreUnavailable):
        await rechecks(gate).look([stream])
    assert stream.reasons == []


@pytest.mark.parametrize("count", [1, 29, 30, 31, 1000])
async def test_a_round_looks_at_each_once_and_spreads_them_evenly(
    autojump_clock: Any, gate: Gate, answers: Answers, count: int
):
    streams = [Stream(number) for number in range(count)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rechecks(gate, streams).serve)
        await trio.sleep(30)  # in which the first round has begun
        answers.statements.clear()
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    asked = Counter(key for statement in answers.statements for key in statement)
    assert len(asked) == count
    assert set(asked.values()) <= {9, 10, 11}
    assert max(map(len, answers.statements)) <= -(-count // 30)


async def test_a_round_that_nobody_could_tell_about_is_made_up_for_by_the_next(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.changed["user_3"] = Access(None, None)
    answers.down = True
    streams = [Stream(3), Stream(4)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rechecks(gate, streams).serve)
        await trio.sleep(100)
        assert len(answers.statements) >= 4
        assert streams[0].reasons == []
        answers.down = False
        await trio.sleep(31)
        nursery.cancel_scope.cancel()
    assert set(streams[0].reasons) == {ClosingReason.ACCESS_REVOKED}
    assert streams[1].reasons == []


async def test_a_slow_store_makes_rounds_longer_and_no_look_meets_another(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    under_way, most = 0, 0
    accesses = answers.accesses

    async def counted(asked_for: Sequence[tuple[str, int]]) -> list[Access]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await accesses(asked_for)
        finally:
            under_way -= 1

    answers.accesses = counted  # type: ignore[method-assign]
    answers.takes = 1.5
    streams = [Stream(number) for number in range(100)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rechecks(gate, streams).serve)
        await trio.sleep(200)
        nursery.cancel_scope.cancel()
    assert most == 1
    assert len({key for statement in answers.statements for key in statement}) == 100


async def test_no_streams_are_no_statements(autojump_clock: Any, gate: Gate, answers: Answers):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rechecks(gate, seconds=0.4).serve)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert answers.statements == []


async def test_what_is_evicted_on_its_way_is_asked_for_again_and_only_that(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    def revoke() -> None:
        if len(answers.statements) == 1:
            answers.changed["user_3"] = Access(None, None)
            gate.forget(Eviction(user_id=3))

    answers.takes, answers.before_answer = 0.1, revoke
    streams = [Stream(number) for number in range(1, 6)]
    await rechecks(gate).look(streams)
    assert answers.statements[1:] == [[("user_3", 3)]]
    assert streams[2].reasons == [ClosingReason.ACCESS_REVOKED]


async def test_evictions_without_end_hold_nobody_up(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.before_answer = lambda: gate.forget(Eviction(all=True))
    await rechecks(gate).look([Stream(number) for number in range(3)])
    assert len(answers.statements) == MAX_LOOKS
