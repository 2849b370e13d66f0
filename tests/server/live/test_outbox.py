"""An outbox is bounded in bytes and in time, and wakes its writer."""

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from server.live.outbox import Outbox
from tests.server.live.fakes import frame, frames


def test_what_was_offered_is_taken_in_one_write_and_once():
    outbox = Outbox(limit=1000, stall=5)
    first, second = frames(1, 2)
    assert outbox.take() == b""
    assert outbox.offer(first)
    assert outbox.take() is first.plain, "a lone frame is not copied"
    assert outbox.offer(first) and outbox.offer(second)
    assert len(outbox) == len(first.plain) + len(second.plain)
    assert outbox.take() == first.plain + second.plain
    assert len(outbox) == 0
    assert outbox.take() == b""


def test_it_holds_up_to_its_limit_in_bytes():
    one = frame(1)
    outbox = Outbox(limit=3 * len(one.plain), stall=5)
    assert [outbox.offer(one) for _ in range(5)] == [True, True, True, False, False]
    assert len(outbox) == 3 * len(one.plain), "what is refused is not taken"
    outbox.take()
    assert outbox.offer(one)


def test_clearing_it_forgets_everything():
    outbox = Outbox(limit=1000, stall=5)
    outbox.offer(frame(1))
    outbox.clear()
    assert len(outbox) == 0
    assert outbox.take() == b""


async def test_a_write_over_its_time_refuses_more(autojump_clock):
    outbox = Outbox(limit=1000, stall=5)
    outbox.write_begins()
    await trio.sleep(5)
    assert not outbox.stalled
    assert outbox.offer(frame(1))
    await trio.sleep(0.1)
    assert outbox.stalled
    assert not outbox.offer(frame(2))
    outbox.write_ended()
    assert not outbox.stalled
    assert outbox.offer(frame(2))


async def test_its_writer_is_woken_by_a_frame_or_a_call_or_the_time(autojump_clock):
    outbox = Outbox(limit=1000, stall=5)
    woken: list[float] = []

    async def wait() -> None:
        await outbox.wait(trio.current_time() + 10)
        woken.append(trio.current_time() - started)

    for action, after in ((lambda: outbox.offer(frame(1)), 3), (outbox.wake, 4), (None, 10)):
        started = trio.current_time()
        outbox.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            if action is not None:
                await trio.sleep(after)
                with assert_no_checkpoints():
                    action()
        assert woken.pop() == pytest.approx(after)


async def test_waiting_with_something_there_or_no_time_left_is_over_at_once(autojump_clock):
    outbox = Outbox(limit=1000, stall=5)
    started = trio.current_time()
    await outbox.wait(started - 1)
    await outbox.wait(started)
    outbox.offer(frame(1))
    await outbox.wait(started + 100)
    assert trio.current_time() == started
    outbox.wake()  # nobody waits
    await wait_all_tasks_blocked()
