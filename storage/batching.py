"""Batches made of what is already waiting.

While one round trip is in flight, new items gather; the next one takes them all. No timer, no
added delay when idle. Items of one key keep their order and are never in two batches at once,
so a key that has to wait (a locked channel) holds up no other.
"""

import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import outcome
import structlog
import trio

from storage.contract import StoreUnavailable
from storage.failures import describe
from storage.waiting import Deadlines, Waiter

Item = TypeVar("Item")
Result = TypeVar("Result")

log = structlog.get_logger("storage")


class Busy(Exception):
    """An item's result that means: not now, try this item again until its time is over."""


BUSY_PAUSE_SECONDS = 0.01
"""Before a busy key is tried again; doubled each time up to `BUSY_PAUSE_LIMIT`, with jitter.
A lock on a channel's row is held for one commit, a millisecond or a few."""
BUSY_PAUSE_LIMIT = 0.2


class _Entry(Generic[Item]):
    __slots__ = ("item", "waiter")

    def __init__(self, item: Item, waiter: Waiter[Any]) -> None:
        self.item = item
        self.waiter = waiter


class _Lane(Generic[Item]):
    """The items of one key that wait, and for how long the key has been busy."""

    __slots__ = ("entries", "pause")

    def __init__(self) -> None:
        self.entries: deque[_Entry[Item]] = deque()
        self.pause = 0.0


class Batcher(Generic[Item, Result]):
    """Gathers items and runs them together.

    Args:
        name: for logs.
        run: takes items, gives back a result or an exception for each, in order. If it raises
            `StoreUnavailable` all items get that; if it raises anything else and there were
            several items, each is tried alone, so that a bad one fails alone.
        key: items with the same key keep their order.
        lanes: batches in flight at once, at most.
        room: of one batch, in whatever `weigh` counts.
        weigh: how much of a batch an item takes.
        max_waiting: items that may wait; one more gets `StoreUnavailable` at once.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        key: Callable[[Item], Hashable],
        lanes: int,
        room: int,
        max_waiting: int,
        weigh: Callable[[Item], int] = lambda _: 1,
    ) -> None:
        self.name = name
        self._run = run
        self._key = key
        self._lanes = lanes
        self._room = room
        self._weigh = weigh
        self._max_waiting = max_waiting
        self._waiting = 0
        self._keys: dict[Hashable, _Lane[Item]] = {}
        """Every key that has items waiting, or a batch in flight."""
        self._ready: deque[Hashable] = deque()
        """Keys with items waiting and no batch in flight: each at most once."""
        self._idle = trio.lowlevel.ParkingLot()
        self._deadlines: Deadlines[Result] = Deadlines(lambda: outcome.Error(StoreUnavailable()))
        self._nursery: trio.Nursery | None = None
        self._ended = False

    async def submit(self, item: Item, *, seconds: float) -> Result:
        """Run `item` in the next batch.

        Raises:
            StoreUnavailable: the store is down, too many wait, or `seconds` are over. In the
                last case the outcome is unknown.
            Exception: what `run` gave for this item.
        """
        if self._waiting >= self._max_waiting or self._ended:
            raise StoreUnavailable
        waiter: Waiter[Result] = Waiter()
        key = self._key(item)
        lane = self._keys.get(key)
        if lane is None:
            lane = self._keys[key] = _Lane()
            self._make_ready(key)
        lane.entries.append(_Entry(item, waiter))
        self._waiting += 1
        self._deadlines.add(waiter, trio.current_time() + seconds)
        return await waiter.wait()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run batches until cancelled; what waits then gets `StoreUnavailable`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._deadlines.serve)
                for _ in range(self._lanes):
                    nursery.start_soon(self._serve_lane)
                task_status.started()
        finally:
            self._nursery = None
            self._ended = True
            for lane in self._keys.values():
                for entry in lane.entries:
                    entry.waiter.answer(outcome.Error(StoreUnavailable()))
            self._keys.clear()
            self._deadlines.clear()
            self._ready.clear()
            self._waiting = 0

    async def _serve_lane(self) -> None:
        while True:
            while not self._ready:
                await self._idle.park()
            # Whoever is about to ask in this turn of the event loop comes along.
            await trio.lowlevel.checkpoint()
            taken = self._take()
            if taken:
                await self._run_batch(taken)

    def _take(self) -> dict[Hashable, list[_Entry[Item]]]:
        """Whole keys from the front, until the batch is full. Plain: nothing can come between."""
        taken: dict[Hashable, list[_Entry[Item]]] = {}
        room = self._room
        while self._ready and room > 0:
            key = self._ready.popleft()
            lane = self._keys[key]
            entries: list[_Entry[Item]] = []
            while lane.entries and room > 0:
                entry = lane.entries.popleft()
                self._waiting -= 1
                if entry.waiter.task is not None:
                    entries.append(entry)
                    room -= self._weigh(entry.item)
            if entries:
                taken[key] = entries
            else:
                del self._keys[key]
        return taken

    async def _run_batch(self, taken: dict[Hashable, list[_Entry[Item]]]) -> None:
        entries = [entry for group in taken.values() for entry in group]
        busy: set[_Entry[Item]] = set()
        finished = False
        try:
            await self._resolve(entries, busy)
            finished = True
        finally:
            if not finished:  # cancelled
                busy.clear()
                for entry in entries:
                    entry.waiter.answer(outcome.Error(StoreUnavailable()))
            for key, group in taken.items():
                self._release(key, [entry for entry in group if entry in busy])

    async def _resolve(self, entries: list[_Entry[Item]], busy: set[_Entry[Item]]) -> None:
        try:
            results = await self._run([entry.item for entry in entries])
        except StoreUnavailable as error:
            for entry in entries:
                entry.waiter.answer(outcome.Error(error))
        except Exception as error:
            log.error("batch_failed", batch=self.name, items=len(entries), **describe(error))
            if len(entries) == 1:
                entries[0].waiter.answer(outcome.Error(error))
                return
            waits: set[Hashable] = set()
            for entry in entries:
                key = self._key(entry.item)
                if key in waits:  # behind one that is busy
                    busy.add(entry)
                    continue
                await self._resolve([entry], busy)
                if entry in busy:
                    waits.add(key)
        else:
            for entry, result in zip(entries, results, strict=True):
                if isinstance(result, Busy):
                    busy.add(entry)
                elif isinstance(result, Exception):
                    entry.waiter.answer(outcome.Error(result))
                else:
                    entry.waiter.answer(outcome.Value(result))

    def _release(self, key: Hashable, busy: list[_Entry[Item]]) -> None:
        """The key may run again: at once, or after a pause if it was busy."""
        lane = self._keys[key]
        if busy:
            lane.entries.extendleft(reversed(busy))
            self._waiting += len(busy)
            lane.pause = min(max(lane.pause * 2, BUSY_PAUSE_SECONDS), BUSY_PAUSE_LIMIT)
            if self._nursery is not None:
                self._nursery.start_soon(self._ready_after, key, lane.pause)
            return
        lane.pause = 0.0
        if lane.entries:
            self._make_ready(key)
        else:
            del self._keys[key]

    async def _ready_after(self, key: Hashable, seconds: float) -> None:
        await trio.sleep(seconds * random.uniform(0.5, 1.0))
        self._make_ready(key)

    def _make_ready(self, key: Hashable) -> None:
        self._ready.append(key)
        self._idle.unpark()
