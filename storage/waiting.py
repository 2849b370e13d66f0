"""Tasks that wait for an answer or a moment, thousands at a time, with one timer for all.

A cancel scope for each would cost 10 us of CPU and, while it lasts, a kilobyte.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import outcome
import trio

T = TypeVar("T")


class Waiter(Generic[T]):
    """A task that waits for its outcome; nobody, once it has it, was too late or has left."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    async def wait(self) -> T:
        """The outcome. Once, and right after this was made: by the task that made it."""
        result: T = await trio.lowlevel.wait_task_rescheduled(self._leave)
        return result

    def answer(self, result: outcome.Outcome[T]) -> None:
        """Plain; only the first answer counts."""
        if self.task is not None:
            trio.lowlevel.reschedule(self.task, result)
            self.task = None

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Deadlines(Generic[T]):
    """Answers waiters whose time is over.

    Args:
        late: makes the outcome of one that was too late.
    """

    def __init__(self, late: Callable[[], outcome.Outcome[T]]) -> None:
        self._late = late
        self._heap: list[tuple[float, int, Waiter[T]]] = []
        self._numbers = itertools.count()
        self._sooner = trio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, waiter: Waiter[T], at: float) -> None:
        """Answer it at a time, on Trio's clock, unless it was answered before. Plain."""
        if not self._heap or at < self._heap[0][0]:
            self._sooner.set()
        heapq.heappush(self._heap, (at, next(self._numbers), waiter))

    def clear(self) -> None:
        self._heap.clear()

    async def serve(self) -> None:
        """Until cancelled."""
        heap: list[Any] = self._heap
        while True:
            self._sooner = trio.Event()
            now = trio.current_time()
            while heap and (heap[0][0] <= now or heap[0][2].task is None):
                heapq.heappop(heap)[2].answer(self._late())
            with trio.move_on_at(heap[0][0] if heap else math.inf):
                await self._sooner.wait()
