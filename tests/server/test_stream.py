"""How many streams open at one time, how long the others wait for their turn, and where a stream
resumes."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from protocol.cursors import MAX_SEQ, Cursor
from server.handlers.stream import TURN_SECONDS, EventStream
from server.web.problems import Problem


def stream(*, turns: int, **about: Any) -> tuple[EventStream, trio.Semaphore]:
    """One that would open next, and what it waits for."""
    opening = trio.Semaphore(turns)
    service: Any = SimpleNamespace(
        opening=opening,
        draining=about.get("draining", False),
        settings=SimpleNamespace(max_streams=2, max_streams_per_user=2),
        hub=SimpleNamespace(streams=about.get("streams", 0), streams_of=lambda _: 0),
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
