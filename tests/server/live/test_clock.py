"""Every stream is ticked when it asked to be, at most one tick late, whatever others do."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
from trio.testing import assert_no_checkpoints

from server.live.clock import SLICE, SLOTS, Clock, Ticking

TICK = 0.125
"""A power of two, so that slots are where they are said to be."""


class Stream:
    """Notes when it was ticked.

    Args:
        then: what it answers: when to tick it next.
    """

    def __init__(self, then: Callable[[float], float] = lambda _: math.inf) -> None:
        self.slot: dict[Ticking, None] | None = None
        self.then = then
        self.at: list[float] = []

    def tick(self, now: float) -> float:
        assert now == trio.current_time()
        assert self.slot is None
        self.at.append(now)
        return self.then(now)


async def run_for(clock: Clock, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await clock.run()


@pytest.mark.parametrize("tick", [TICK, 0.1, 0.07])
async def test_a_stream_is_ticked_when_it_asked_or_one_tick_later(autojump_clock, tick: float):
    chance = random.Random(3)
    clock, started = Clock(tick=tick), trio.current_time()
    asked: dict[Stream, list[float]] = {}

    def again(stream: Stream) -> float:
        asked[stream].append(trio.current_time() + chance.uniform(1.5 * tick, 50 * tick))
        return asked[stream][-1]

    for _ in range(200):
        stream = Stream()
        stream.then = lambda now, stream=stream: again(stream)  # type: ignore[misc]
        asked[stream] = [started + chance.uniform(0.01, 50 * tick)]
        with assert_no_checkpoints():
            clock.set(stream, asked[stream][0])
    await run_for(clock, 300 * tick)
    for stream, times in asked.items():
        assert len(stream.at) > 4
        for wish, got in zip(times, stream.at, strict=False):
            assert wish - 1e-6 <= got <= wish + tick + 1e-6


@pytest.mark.parametrize("tick", [TICK, 0.1, 0.07])
async def test_a_stream_may_ask_for_every_tick(autojump_clock, tick: float):
    clock = Clock(tick=tick)
    late, soon = Stream(lambda now: now - 100), Stream(lambda now: now + tick / 2)
    clock.set(late, 0)
    clock.set(soon, 0)
    await run_for(clock, 20.5 * tick)
    for stream in (late, soon):
        assert len(stream.at) == 20, "once in each, and never twice in one"
        assert len(set(stream.at)) == 20


async def test_a_time_in_the_past_is_the_next_tick(autojump_clock):
    clock, stream = Clock(tick=TICK), Stream()
    started = trio.current_time()
    clock.set(stream, started - 5)
    await run_for(clock, 10)
    assert stream.at == [started + TICK]


async def test_beyond_its_horizon_a_stream_is_asked_at_the_horizon(autojump_clock):
    clock, started = Clock(tick=TICK), trio.current_time()
    wish = started + 3.5 * SLOTS * TICK
    stream = Stream(lambda now: wish if now < wish else math.inf)
    clock.set(stream, wish)
    await run_for(clock, 6 * SLOTS * TICK)
    *asked, last = [at - started for at in stream.at]
    assert started + last == wish
    assert len(asked) == 3
    pauses = [after - before for before, after in pairwise([0.0, *asked])]
    assert all((SLOTS - 2) * TICK <= pause <= (SLOTS - 1) * TICK for pause in pauses)
    assert stream.slot is None


async def test_a_stream_that_has_no_next_time_is_ticked_no_more(autojump_clock):
    clock, stream = Clock(tick=TICK), Stream()
    clock.set(stream, trio.current_time() + 1)
    await run_for(clock, 3 * SLOTS * TICK)
    assert len(stream.at) == 1
    assert stream.slot is None
    assert not any(clock._slots)


async def test_set_again_a_stream_stands_in_one_place_only(autojump_clock):
    clock, stream = Clock(tick=TICK), Stream()
    started = trio.current_time()
    for after in (1, 7, 3):
        clock.set(stream, started + after)
    assert sum(map(len, clock._slots)) == 1
    await run_for(clock, 20)
    assert stream.at == [started + 3]


async def test_a_forgotten_stream_is_not_ticked_and_not_kept(autojump_clock):
    clock, one, two = Clock(tick=TICK), Stream(), Stream()
    clock.set(one, trio.current_time() + 1)
    clock.set(two, trio.current_time() + 1)
    with assert_no_checkpoints():
        clock.forget(one)
        clock.forget(one)
    clock.forget(Stream())
    await run_for(clock, 5)
    assert one.at == []
    assert len(two.at) == 1
    assert not any(clock._slots)


async def test_a_tick_may_forget_and_set_others(autojump_clock):
    clock, started = Clock(tick=TICK), trio.current_time()
    others = [Stream() for _ in range(10)]
    moved, fresh = others[0], Stream()

    def act(now: float) -> float:
        for other in others:
            clock.forget(other)
        clock.set(moved, now + 1)
        clock.set(fresh, now)
        return math.inf

    acting = [Stream(act), Stream(act)]  # one is taken before the others, wherever it stands
    for stream in (acting[0], *others, acting[1]):
        clock.set(stream, started + 1)
    await run_for(clock, 5)
    assert [other.at for other in others[1:]] == [[]] * 9
    assert moved.at == [started + 2]
    assert started + 1 <= fresh.at[0] <= started + 1 + TICK


async def test_a_stream_that_ends_in_its_tick_is_let_go(autojump_clock):
    clock = Clock(tick=TICK)
    stream = Stream()

    def end(_: float) -> float:
        clock.forget(stream)
        return math.inf

    stream.then = end
    clock.set(stream, trio.current_time() + 1)
    await run_for(clock, 5)
    assert len(stream.at) == 1
    assert not any(clock._slots)


async def test_thousands_of_streams_leave_others_their_turn(autojump_clock):
    clock, started = Clock(tick=TICK), trio.current_time()
    streams = [Stream() for _ in range(5000)]
    for stream in streams:
        clock.set(stream, started + 1)
    seen: list[int] = []

    async def other() -> None:
        await trio.sleep_until(started + 1)
        while not seen or seen[-1] < 5000:
            seen.append(sum(len(stream.at) for stream in streams))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await run_for(clock, 2)
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= 2 * SLICE
    assert [len(stream.at) for stream in streams] == [1] * 5000
    assert {at for stream in streams for at in stream.at} == {started + 1}


async def test_after_the_process_stood_still_everybody_has_their_turn(mock_clock):
    clock, started = Clock(tick=TICK), trio.current_time()
    streams = [Stream(lambda now: now + 5) for _ in range(10)]
    for number, stream in enumerate(streams):
        clock.set(stream, started + number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert all(stream.at and set(stream.at) == {started + 1000} for stream in streams)
        for stream in streams:
            stream.at.clear()
        mock_clock.jump(5 + TICK)
        await trio.testing.wait_all_tasks_blocked()
        assert [len(stream.at) for stream in streams] == [1] * 10
        nursery.cancel_scope.cancel()
