"""What is kept of how streams began: bounded in bytes and in time."""

import trio

from server.live.openings import KEPT_SECONDS, MAX_BYTES, Openings


async def test_an_opening_is_found_for_its_head_alone():
    openings = Openings()
    openings.keep(1, 5, b"events")
    assert openings.find(1, 5) == b"events"
    assert openings.find(1, 6) is openings.find(1, 4) is openings.find(2, 5) is None
    openings.keep(1, 6, b"more")
    assert (openings.find(1, 5), openings.find(1, 6), len(openings)) == (None, b"more", 4)
    openings.forget(1)
    openings.forget(1)
    assert (openings.find(1, 6), len(openings)) == (None, 0)


async def test_the_oldest_go_first_when_their_bytes_are_too_many():
    openings = Openings()
    for channel in range(5):
        openings.keep(channel, 1, bytes(MAX_BYTES // 4))
    assert [openings.find(channel, 1) is not None for channel in range(5)] == [False, *[True] * 4]
    openings.keep(9, 1, bytes(MAX_BYTES + 1))
    assert len(openings) == 0


async def test_their_time_is_short(autojump_clock):
    openings = Openings()
    openings.keep(1, 1, b"old")
    await trio.sleep(KEPT_SECONDS / 2)
    openings.keep(2, 1, b"new")
    openings.keep(3, 1, b"kept again")
    await trio.sleep(KEPT_SECONDS / 2)
    openings.keep(3, 1, b"kept again")
    openings.forget_old()
    assert [openings.find(channel, 1) for channel in (1, 2, 3)] == [None, b"new", b"kept again"]
