"""Batches of what waits: in order, each once, nobody held up, nobody forgotten."""

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from storage.batching import Batcher, Busy
from storage.contract import StoreUnavailable


class Item(NamedTuple):
    key: str
    number: int


Run = Callable[[list[Item]], Awaitable[list[Any]]]


def make(run: Run, **options: Any) -> Batcher[Item, Any]:
    defaults: dict[str, Any] = {"lanes": 2, "room": 100, "max_waiting": 1000}
    return Batcher("test", run, key=lambda item: item.key, **(defaults | options))


def forgotten(batcher: Batcher[Item, Any]) -> bool:
    return not batcher._keys and not batcher._ready and batcher._waiting == 0


@asynccontextmanager
async def served(batcher: Batcher[Item, Any]) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        await nursery.start(batcher.serve)
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


class Gate:
    """A `run` that waits until it is let through, and remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.open = trio.Event()

    async def __call__(self, items: list[Item]) -> list[Any]:
        self.batches.append(items)
        await self.open.wait()
        return [item.number for item in items]


async def submit_all(batcher: Batcher[Item, Any], items: list[Item], nursery: trio.Nursery) -> None:
    """In this order: Trio starts tasks in none of its own."""
    for item in items:
        nursery.start_soon(partial(batcher.submit, item, seconds=60))
        await wait_all_tasks_blocked()


async def test_a_lone_item_does_not_wait_for_company(autojump_clock):
    async def run(items: list[Item]) -> list[Any]:
        return [item.number for item in items]

    batcher = make(run)
    async with served(batcher):
        started = trio.current_time()
        assert await batcher.submit(Item("a", 7), seconds=60) == 7
        assert trio.current_time() == started
        assert forgotten(batcher)


async def test_what_comes_while_a_batch_is_in_flight_makes_the_next_one(autojump_clock):
    gate = Gate()
    batcher = make(gate, lanes=1)
    items = [Item(key, n) for n, key in enumerate("abcabc")]
    async with served(batcher) as nursery:
        await submit_all(batcher, items, nursery)
        assert gate.batches == [items[:1]]
        gate.open.set()
        await wait_all_tasks_blocked()
        # The key that was in flight comes last: it was not ready before.
        assert [sorted(batch) for batch in gate.batches] == [items[:1], sorted(items[1:])]
        assert forgotten(batcher)


async def test_items_of_a_key_keep_their_order_in_and_across_batches(autojump_clock):
    gate = Gate()
    batcher = make(gate, room=3)
    items = [Item("a", n) for n in range(8)]
    async with served(batcher) as nursery:
        await submit_all(batcher, items, nursery)
        gate.open.set()
        await wait_all_tasks_blocked()
    assert [item for batch in gate.batches for item in batch] == items
    assert [len(batch) for batch in gate.batches] == [1, 3, 3, 1]


async def test_a_batch_ends_with_the_item_that_fills_it(autojump_clock):
    gate = Gate()
    batcher = make(gate, room=10, lanes=1, weigh=lambda item: item.number)
    items = [Item("a", n) for n in (1, 4, 4, 4, 30, 9, 1, 1)]
    async with served(batcher) as nursery:
        await submit_all(batcher, items, nursery)
        gate.open.set()
        await wait_all_tasks_blocked()
    assert [[item.number for item in batch] for batch in gate.batches] == [
        *([1], [4, 4, 4], [30], [9, 1], [1])
    ]


async def test_a_key_is_never_in_two_batches_at_once(autojump_clock):
    gate = Gate()
    batcher = make(gate, lanes=3)
    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("a", 1), Item("a", 2), Item("b", 3)], nursery)
        assert gate.batches == [[Item("a", 1)], [Item("b", 3)]]


async def test_other_keys_go_on_while_one_is_busy(autojump_clock):
    free_at = trio.current_time() + 3

    async def run(items: list[Item]) -> list[Any]:
        await trio.sleep(0.001)
        busy = trio.current_time() < free_at
        answers.extend(item.number for item in items if item.key == "a" and not busy)
        return [Busy() if item.key == "a" and busy else item.number for item in items]

    batcher = make(run, lanes=1)
    answers: list[int] = []
    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("a", number) for number in range(3)], nursery)
        for number in range(50):
            started = trio.current_time()
            assert await batcher.submit(Item("b", number), seconds=60) == number
            assert trio.current_time() - started <= 0.003  # the batch under way, and its own
        await trio.sleep(5)
        assert answers == [0, 1, 2], "busy items keep their order"
        assert trio.current_time() >= free_at
        assert forgotten(batcher)


async def test_a_busy_key_is_asked_again_until_its_time_is_over(autojump_clock):
    tries: list[float] = []

    async def run(items: list[Item]) -> list[Any]:
        await trio.lowlevel.checkpoint()
        tries.append(trio.current_time())
        return [Busy() for _ in items]

    batcher = make(run)
    async with served(batcher):
        started = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await batcher.submit(Item("a", 1), seconds=3)
        assert trio.current_time() - started == pytest.approx(3)
        assert 15 <= len(tries) <= 60, "with pauses that grow to a fifth of a second"
        pauses = [b - a for a, b in itertools.pairwise(tries)]
        assert pauses[0] <= 0.01
        assert max(pauses) <= 0.2
        await trio.sleep(1)
        assert forgotten(batcher), "nobody waits for it any more"


async def test_the_pause_starts_small_again_after_success(autojump_clock):
    answers: list[Any] = []
    times: list[float] = []

    async def run(items: list[Item]) -> list[Any]:
        await trio.lowlevel.checkpoint()
        times.append(trio.current_time())
        return [answers.pop(0)]

    batcher = make(run)
    async with served(batcher):
        for _ in range(2):
            answers[:] = [*(Busy() for _ in range(7)), 1]
            times.clear()
            assert await batcher.submit(Item("a", 1), seconds=60) == 1
            assert times[1] - times[0] <= 0.01 < times[-1] - times[-2]


async def test_a_bad_item_fails_alone(autojump_clock):
    async def run(items: list[Item]) -> list[Any]:
        await trio.sleep(0.001)
        if any(item.number == 3 for item in items):
            raise LookupError("bad")
        return [item.number for item in items]

    batcher = make(run, lanes=1)
    outcomes: dict[int, Any] = {}

    async def ask(number: int) -> None:
        try:
            outcomes[number] = await batcher.submit(Item("ab"[number % 2], number), seconds=60)
        except LookupError as error:
            outcomes[number] = error

    async with served(batcher):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(ask, number)
        assert isinstance(outcomes.pop(3), LookupError)
        assert outcomes == {0: 0, 1: 1, 2: 2, 4: 4, 5: 5}
        assert forgotten(batcher)


async def test_items_tried_alone_wait_for_a_busy_one_before_them(autojump_clock):
    ran: list[int] = []
    was_busy: list[bool] = []
    gate = trio.Event()

    async def run(items: list[Item]) -> list[Any]:
        await gate.wait()
        if items == [Item("a", 1)] and not was_busy:
            was_busy.append(True)
            return [Busy()]
        if any(item.key == "bad" for item in items):
            raise LookupError
        ran.extend(item.number for item in items)
        return [item.number for item in items]

    batcher = make(run, lanes=1)

    async def ask_bad() -> None:
        with pytest.raises(LookupError):
            await batcher.submit(Item("bad", 9), seconds=60)

    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("x", 0)], nursery)
        nursery.start_soon(ask_bad)
        await submit_all(batcher, [Item("a", 1), Item("a", 2), Item("b", 3)], nursery)
        gate.set()
        await trio.sleep(1)
        assert was_busy
        assert ran == [0, 3, 1, 2]
        assert forgotten(batcher)


async def test_a_result_that_is_an_exception_is_raised_for_its_item(autojump_clock):
    async def run(items: list[Item]) -> list[Any]:
        return [KeyError() for _ in items]

    async with served(batcher := make(run)):
        with pytest.raises(KeyError):
            await batcher.submit(Item("a", 1), seconds=60)
        assert forgotten(batcher)


async def test_with_the_store_unavailable_all_are_told_and_nothing_is_tried_alone(autojump_clock):
    calls: list[int] = []

    async def run(items: list[Item]) -> list[Any]:
        calls.append(len(items))
        await trio.sleep(1)
        raise StoreUnavailable(4)

    batcher = make(run, lanes=1)
    told: list[float] = []

    async def ask(number: int) -> None:
        with pytest.raises(StoreUnavailable) as caught:
            await batcher.submit(Item("a", number), seconds=60)
        told.append(caught.value.retry_after)

    async with served(batcher):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, number)
        assert told == [4] * 5
        assert len(calls) <= 2
        assert forgotten(batcher)


async def test_too_many_waiting_is_told_at_once(autojump_clock):
    gate = Gate()
    batcher = make(gate, lanes=1, max_waiting=3)
    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("a", n) for n in range(4)], nursery)  # one is in flight
        started = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await batcher.submit(Item("b", 9), seconds=60)
        assert trio.current_time() == started
        gate.open.set()
        await wait_all_tasks_blocked()
        assert await batcher.submit(Item("b", 10), seconds=60) == 10
        assert forgotten(batcher)


async def test_whoever_stops_waiting_disturbs_nobody(autojump_clock):
    gate = Gate()
    batcher = make(gate, lanes=1)
    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("a", 0)], nursery)  # in flight
        answers: list[int] = []

        async def ask(number: int) -> None:
            answers.append(await batcher.submit(Item("a", number), seconds=60))

        gone = trio.CancelScope()

        async def ask_and_go() -> None:
            with gone:
                await batcher.submit(Item("a", 2), seconds=60)

        nursery.start_soon(ask, 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask_and_go)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask, 3)
        await wait_all_tasks_blocked()
        gone.cancel()
        await wait_all_tasks_blocked()
        gate.open.set()
        await wait_all_tasks_blocked()
        assert sorted(answers) == [1, 3]
        assert gate.batches == [[Item("a", 0)], [Item("a", 1), Item("a", 3)]]
        assert forgotten(batcher)


async def test_whoever_leaves_in_mid_flight_leaves_the_others_their_answers(autojump_clock):
    gate = Gate()
    batcher = make(gate, lanes=1)
    answers: list[int] = []

    async def ask(number: int, scope: trio.CancelScope) -> None:
        with scope:
            answers.append(await batcher.submit(Item("a", number), seconds=60))

    async with served(batcher) as nursery:
        await submit_all(batcher, [Item("a", 0)], nursery)
        gone = trio.CancelScope()
        nursery.start_soon(ask, 1, gone)
        nursery.start_soon(ask, 2, trio.CancelScope())
        await wait_all_tasks_blocked()
        gate.open.set()
        gate.open = trio.Event()
        await wait_all_tasks_blocked()
        assert len(gate.batches[1]) == 2
        gone.cancel()
        gate.open.set()
        await wait_all_tasks_blocked()
        assert answers == [2]
        assert forgotten(batcher)


@pytest.mark.parametrize("busy", [False, True])
async def test_the_end_of_the_service_tells_everyone_who_waits(autojump_clock, busy: bool):
    async def run(items: list[Item]) -> list[Any]:
        if not busy:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return [Busy() for _ in items]

    batcher = make(run, room=2)
    told: list[str] = []

    async def ask(key: str) -> None:
        with pytest.raises(StoreUnavailable):
            await batcher.submit(Item(key, 1), seconds=60)
        told.append(key)

    async with trio.open_nursery() as nursery:
        for key in "aaabbbcccddd":
            nursery.start_soon(ask, key)
        async with served(batcher):
            await trio.sleep(1)
            assert told == []
            ended = trio.current_time()
    assert trio.current_time() == ended
    assert sorted(told) == list("aaabbbcccddd")
    assert forgotten(batcher)
    with pytest.raises(StoreUnavailable):
        await batcher.submit(Item("e", 1), seconds=60)
    assert trio.current_time() == ended


async def test_each_item_waits_for_its_own_time_and_no_longer(autojump_clock):
    """One timer serves all of them."""
    batcher = make(Gate(), lanes=1)
    chance = random.Random(7)
    limits = [chance.uniform(0.1, 10) for _ in range(200)]
    late: list[float] = []

    async def ask(number: int, start: float) -> None:
        await trio.sleep(start)
        began = trio.current_time()
        with pytest.raises(StoreUnavailable):
            await batcher.submit(Item(str(number % 7), number), seconds=limits[number])
        late.append(trio.current_time() - began - limits[number])

    async with served(batcher):
        async with trio.open_nursery() as askers:
            for number in range(len(limits)):
                askers.start_soon(ask, number, chance.uniform(0, 5))
        assert len(late) == len(limits)
        assert max(map(abs, late)) < 1e-6
        await trio.sleep(20)
        assert len(batcher._deadlines) == 0, "nothing is remembered of them"


@pytest.mark.parametrize("seed", range(40))
async def test_any_interleaving_keeps_the_promises(autojump_clock, seed: int):
    """Random items, keys, pauses, errors, busy spells and leavers against a model."""
    chance = random.Random(seed)
    in_flight: set[str] = set()
    done: dict[str, list[int]] = {}
    times_run: dict[Item, int] = {}
    bad = {number for number in range(150) if chance.random() < 0.03}
    max_items, lanes = chance.randint(1, 12), chance.randint(1, 3)
    running = 0

    async def run(items: list[Item]) -> list[Any]:
        nonlocal running
        keys = {item.key for item in items}
        assert not keys & in_flight, "a key is in two batches"
        assert len(items) <= max_items
        running += 1
        assert running <= lanes
        in_flight.update(keys)
        try:
            await trio.sleep(chance.random() * 0.02)
        finally:
            in_flight.difference_update(keys)
            running -= 1
        what = chance.random()
        if what < 0.05:
            raise StoreUnavailable
        if any(item.number in bad for item in items):
            raise LookupError
        busy = {key for key in keys if chance.random() < 0.15}
        for item in items:
            if item.key not in busy:
                done.setdefault(item.key, []).append(item.number)
                times_run[item] = times_run.get(item, 0) + 1
        return [Busy() if item.key in busy else item.number for item in items]

    batcher = make(run, lanes=lanes, room=max_items)
    outcomes: dict[int, str] = {}

    async def ask(item: Item, patience: float) -> None:
        outcomes[item.number] = "left"
        with trio.move_on_after(patience):
            try:
                assert await batcher.submit(item, seconds=1) == item.number
                outcomes[item.number] = "answered"
            except StoreUnavailable:
                outcomes[item.number] = "unavailable"
            except LookupError:
                assert item.number in bad, "a good item failed"
                outcomes[item.number] = "bad"

    async with served(batcher):
        async with trio.open_nursery() as nursery:
            for number in range(150):
                patience = 0.03 if chance.random() < 0.1 else 10
                nursery.start_soon(ask, Item(chance.choice("abcdef"), number), patience)
                await wait_all_tasks_blocked()
                if chance.random() < 0.5:
                    await trio.sleep(chance.random() * 0.01)
        await trio.sleep(1)  # what was left behind is taken
        assert forgotten(batcher)
    for numbers in done.values():
        assert numbers == sorted(numbers), "the order within a key"
    assert set(times_run.values()) <= {1}, "an item ran again after it had its answer"
    ran = {item.number for item in times_run}
    assert ran >= {number for number, what in outcomes.items() if what == "answered"}
    assert len(outcomes) == 150
    assert "answered" in outcomes.values()
