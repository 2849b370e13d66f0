"""What the fast path lost is read from the store, and no more than that."""

import trio

from server.live.catch_up import GRACE_SECONDS, RETRY_SECONDS, WARY_SECONDS, CatchUp
from server.live.hub import QUIET_SECONDS, Hub
from tests.server.live.fakes import FakeStore, frame, record
from tests.server.live.test_hub import Stream, joined


class World:
    def __init__(self, newest: int = 0, *, reconcile: float = 10, poll: float = 1) -> None:
        self.hub = Hub()
        self.store = FakeStore(newest)
        self.stream = Stream()
        self.channel = joined(self.hub, self.stream, at=newest)
        self.catch_up = CatchUp(
            self.hub,
            self.store,  # type: ignore[arg-type]
            reconcile=reconcile,
            poll=poll,
        )


async def test_a_gap_is_read_after_its_grace(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(1)
        world.store.newest = 4
        world.hub.deliver([(42, record(4))])
        await trio.sleep(GRACE_SECONDS * 0.9)
        assert world.stream.seqs == []
        await trio.sleep(GRACE_SECONDS * 0.2)
        assert world.stream.seqs == [1, 2, 3, 4]
        assert [after for after, _ in world.store.reads] == [0]
        assert not world.channel.filling
        assert world.channel.held is None
        nursery.cancel_scope.cancel()


async def test_a_missing_frame_that_comes_by_itself_costs_no_read(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(1)
        world.store.newest = 2
        world.hub.deliver([(42, record(2))])
        await trio.sleep(GRACE_SECONDS / 2)
        world.hub.deliver([(42, record(1))])
        assert world.stream.seqs == [1, 2]
        await trio.sleep(1)
        assert world.store.reads == []
        world.store.newest = 4  # and the next gap is found again
        world.hub.deliver([(42, record(4))])
        await trio.sleep(1)
        assert world.stream.seqs == [1, 2, 3, 4]
        nursery.cancel_scope.cancel()


async def test_a_gap_is_read_again_until_the_store_is_back(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.store.down = True
        world.store.newest = 2
        world.hub.deliver([(42, record(2))])
        await trio.sleep(5)
        assert world.stream.seqs == []
        assert 5 < len(world.store.reads) < 50
        world.store.down = False
        await trio.sleep(0.5)
        assert world.stream.seqs == [1, 2]
        nursery.cancel_scope.cancel()


async def test_a_gap_without_streams_is_not_read(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.store.newest = 2
        world.hub.deliver([(42, record(2))])
        world.hub.detach(world.stream)
        await trio.sleep(1)
        assert world.store.reads == []
        assert not world.channel.filling
        nursery.cancel_scope.cancel()


async def test_word_of_what_is_not_there_is_believed_once(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.hub.deliver([(42, record(7))])  # of a past that was restored away
        await trio.sleep(5)
        assert len(world.store.reads) == 1
        assert world.stream.seqs == []
        world.store.newest = 1
        world.hub.publish(world.channel, [frame(1)])
        assert world.stream.seqs == [1]
        nursery.cancel_scope.cancel()


async def test_messages_that_were_deleted_are_passed_over_and_not_waited_for(autojump_clock):
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.store.newest, world.store.deleted = 7, frozenset({1, 2, 4, 5})
        world.hub.deliver([(42, record(7))])
        await trio.sleep(1)
        assert world.channel.head == 7
        assert len(world.store.reads) == 2  # one for each run of them
        assert world.channel.held is None
        world.hub.deliver([(42, record(8))])
        assert world.channel.head == 8
        nursery.cancel_scope.cancel()


async def test_a_channel_that_is_gone_is_left_alone(autojump_clock):
    world = World()
    world.store.gone = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.hub.deliver([(42, record(2))])
        await trio.sleep(5)
        assert len(world.store.reads) == 1
        nursery.cancel_scope.cancel()


async def test_messages_never_heard_of_are_found_at_the_next_look(autojump_clock):
    world = World(reconcile=10, poll=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(0)
        world.store.newest = 3
        await trio.sleep(8.9)
        assert world.store.looks == []
        await trio.sleep(1.3)
        assert world.store.looks == [{42: 0}]
        assert world.stream.seqs == [1, 2, 3]
        nursery.cancel_scope.cancel()


async def test_it_looks_at_once_when_told(autojump_clock):
    world = World(reconcile=100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(1)
        world.store.newest = 3
        world.catch_up.look_now()
        await trio.sleep(0.1)
        assert world.stream.seqs == [1, 2, 3]
        assert len(world.store.looks) == 1
        nursery.cancel_scope.cancel()


async def test_it_looks_more_often_while_nobody_brings_news(autojump_clock):
    for broken in ("redis", "feed"):
        world = World(reconcile=100, poll=1)
        async with trio.open_nursery() as nursery:
            if broken == "redis":
                world.store.redis.suspect = True
            else:
                world.store.feed.connected = False
            nursery.start_soon(world.catch_up.serve)
            await trio.sleep(10.5)
            assert 10 <= len(world.store.looks) <= 12
            world.store.redis.suspect, world.store.feed.connected = False, True
            await trio.sleep(WARY_SECONDS + 1)
            world.store.looks.clear()
            await trio.sleep(80)
            assert len(world.store.looks) <= 1
            nursery.cancel_scope.cancel()


async def test_it_is_wary_for_a_while_after_redis_is_back(autojump_clock):
    """Another server may have it back later, and what that one takes meanwhile it does not
    publish."""
    world = World(reconcile=100, poll=0.25)
    world.store.feed.connected = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(10)
        world.store.feed.connected = True
        world.catch_up.look_now()  # as the feed says
        await trio.sleep(WARY_SECONDS - 0.5)
        world.store.newest = 1
        await trio.sleep(0.25 + GRACE_SECONDS + 0.01)
        assert world.stream.seqs == [1]
        nursery.cancel_scope.cancel()


async def test_a_channel_that_nobody_has_read_yet_is_not_looked_at(autojump_clock):
    world = World(reconcile=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        world.hub.attach(Stream(7))
        await trio.sleep(10)
        assert world.store.looks
        assert all(look == {42: 0} for look in world.store.looks)
        nursery.cancel_scope.cancel()


async def test_a_quiet_channel_is_looked_at_not_read_and_then_forgotten(autojump_clock):
    """Otherwise somebody who comes back would be told from memory that nothing was missed."""
    world = World(reconcile=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        nursery.start_soon(world.hub.serve)
        world.hub.detach(world.stream)
        assert world.hub.recall(world.channel, 0, head=0) == []
        world.store.newest = 2
        await trio.sleep(2)
        assert world.hub.recall(world.channel, 0, head=0) is None
        assert world.store.reads == []
        await trio.sleep(QUIET_SECONDS + 5)
        world.store.looks.clear()
        await trio.sleep(10)
        assert world.store.looks == []
        nursery.cancel_scope.cancel()


async def test_a_look_that_fails_is_made_again(autojump_clock):
    world = World(reconcile=2)
    world.store.down = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(5)
        world.store.down = False
        world.store.newest = 1
        await trio.sleep(2.5)
        assert world.stream.seqs == [1]
        nursery.cancel_scope.cancel()


async def test_after_a_slow_look_it_waits_for_longer_and_twice_at_most(autojump_clock):
    """A look that is slow by chance must not keep from everybody what others have said."""
    world = World(reconcile=1000, poll=1)
    world.store.feed.connected = False
    heads, took = world.store.heads, 0.0

    async def slow(known: dict[int, int]) -> dict[int, int]:
        await trio.sleep(took)
        return await heads(known)

    world.store.heads = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        for seconds, least, most in ((0.0, 95, 115), (0.5, 48, 55), (10.0, 8, 9)):
            took = seconds
            await trio.sleep(20)
            before = len(world.store.looks)
            await trio.sleep(100)
            assert least <= len(world.store.looks) - before <= most
        nursery.cancel_scope.cancel()


async def test_a_look_that_failed_is_made_again_soon(autojump_clock):
    """And not a whole pause later: what is missing is missing for longer already."""
    world = World(reconcile=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.catch_up.serve)
        await trio.sleep(1)
        world.store.down = True
        await trio.sleep(5)
        world.store.newest, world.store.down = 1, False
        await trio.sleep(RETRY_SECONDS * 1.5 + GRACE_SECONDS + 0.1)
        assert world.stream.seqs == [1]
        nursery.cancel_scope.cancel()
