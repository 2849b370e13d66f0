"""Open streams' access is looked at together: how many statements that takes, and who is ended."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import assert_no_checkpoints

from protocol.closing import ClosingReason
from server.auth.access import MAX_LOOKS, Gate
from server.auth.rechecks import GATHER_SECONDS, MAX_TOGETHER, Rechecks
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


@asynccontextmanager
async def serving(gate: Gate) -> AsyncIterator[Rechecks]:
    rechecks = Rechecks(gate)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rechecks.serve)
        yield rechecks
        nursery.cancel_scope.cancel()


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


@pytest.mark.parametrize(("refusal", "reason"), REFUSALS)
async def test_who_has_lost_their_access_is_ended_and_nobody_else(
    autojump_clock: Any, gate: Gate, answers: Answers, refusal: Access, reason: ClosingReason
):
    answers.changed["user_3"] = refusal
    streams = [Stream(number) for number in range(1, 6)]
    async with serving(gate) as rechecks:
        for stream in streams:
            rechecks.add(stream)
        await trio.sleep(GATHER_SECONDS * 2)
    assert [stream.reasons for stream in streams] == [[], [], [reason], [], []]


async def test_those_that_are_due_together_are_one_statement_and_none_is_too_long(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    streams = [Stream(number) for number in range(MAX_TOGETHER + 7)]
    async with serving(gate) as rechecks:
        with assert_no_checkpoints():
            for stream in streams * 3:
                rechecks.add(stream)
        await trio.sleep(GATHER_SECONDS * 1.5)
        rechecks.add(streams[0])
        await trio.sleep(GATHER_SECONDS * 1.5)
    assert [len(statement) for statement in answers.statements] == [MAX_TOGETHER, 7, 1]


async def test_two_streams_of_one_person_in_one_channel_are_asked_for_once(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.changed["user_3"] = Access(None, None)
    tabs = [Stream(3), Stream(3)]
    async with serving(gate) as rechecks:
        for tab in tabs:
            rechecks.add(tab)
        await trio.sleep(GATHER_SECONDS * 2)
    assert answers.statements == [[("user_3", 3)]]
    assert [tab.reasons for tab in tabs] == [[ClosingReason.ACCESS_REVOKED]] * 2


async def test_while_nobody_can_tell_no_stream_ends_and_the_next_look_finds_out(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.changed["user_3"] = Access(None, None)
    answers.down = True
    stream = Stream(3)
    async with serving(gate) as rechecks:
        rechecks.add(stream)
        await trio.sleep(GATHER_SECONDS * 2)
        assert len(answers.statements) == 1
        assert stream.reasons == []
        answers.down = False
        rechecks.add(stream)
        await trio.sleep(GATHER_SECONDS * 2)
    assert stream.reasons == [ClosingReason.ACCESS_REVOKED]


async def test_one_that_becomes_due_during_a_statement_is_in_the_next(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    """What was read may be from before the change for which it is to be looked at again."""
    answers.takes = 1.0
    stream = Stream(3)
    async with serving(gate) as rechecks:
        rechecks.add(stream)
        await trio.sleep(GATHER_SECONDS + 0.5)
        answers.changed["user_3"] = Access(None, None)
        rechecks.add(stream)
        await trio.sleep(3)
    assert len(answers.statements) == 2
    assert stream.reasons == [ClosingReason.ACCESS_REVOKED]


async def test_what_is_evicted_on_its_way_is_asked_for_again_and_only_that(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    def revoke() -> None:
        if len(answers.statements) == 1:
            answers.changed["user_3"] = Access(None, None)
            gate.forget(Eviction(user_id=3))

    answers.takes, answers.before_answer = 0.1, revoke
    streams = [Stream(number) for number in range(1, 6)]
    async with serving(gate) as rechecks:
        for stream in streams:
            rechecks.add(stream)
        await trio.sleep(1)
    assert answers.statements[1:] == [[("user_3", 3)]]
    assert streams[2].reasons == [ClosingReason.ACCESS_REVOKED]


async def test_evictions_without_end_hold_nobody_up(
    autojump_clock: Any, gate: Gate, answers: Answers
):
    answers.before_answer = lambda: gate.forget(Eviction(all=True))
    async with serving(gate) as rechecks:
        for number in range(3):
            rechecks.add(Stream(number))
        await trio.sleep(1)
    assert len(answers.statements) == MAX_LOOKS
