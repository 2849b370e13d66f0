"""Clients that use up what a server has: connections, time, memory. One real worker, with its
limits as they come; each test says its figures.

Everyone else must hardly notice: while it lasts, a crowd of ours talks, and its messages arrive
about as fast as before. When it is over, the memory is back.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import trio

from server.engine.http1 import Limits
from tests.support.chat import Chat, Pair, own_valkey, run_chat
from tests.support.flood import Flood, flood
from tests.support.keep_alive import KeepAlive
from tests.support.sse import BROKEN, open_stream

pytestmark = pytest.mark.once

MAX_CONNECTIONS = 19_000  # the setting, as it comes
MAX_SILENT = Limits._field_defaults["silent"]
HEAD_SECONDS = 10.0
BODY_SECONDS = 3.0
STALL_SECONDS = 3.0
FLOOR = 1.0
"""Seconds: a p99 under this fails no test, whatever it was before. The machine is shared, also
with the attackers and with other tests; the figures are what to look at on a quiet one."""
BACK_SECONDS = 20.0
"""At most, for the engine to give back memory, which it tries when a crowd has been gone for two
and its loop has nothing better to do."""
KEPT_MB = 40
"""In pages that the next crowd takes again; that no object lives on is a test of the engine's."""
MEGABYTE = 1e6


@pytest.fixture(scope="module")
def server(chat: Chat, services_folder: Path) -> Iterator[Chat]:
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database,
            valkey.url,
            services_folder,
            SOTTOVOCE_MAX_CONNECTIONS=str(MAX_CONNECTIONS),
            SOTTOVOCE_BODY_SECONDS=str(BODY_SECONDS),
            SOTTOVOCE_STALL_SECONDS=str(STALL_SECONDS),
            SOTTOVOCE_HEARTBEAT_SECONDS="15",
            SOTTOVOCE_RECHECK_SECONDS="30",
            SOTTOVOCE_ACCESS_CACHE_SECONDS="5",
            SOTTOVOCE_LOG_LEVEL="warning",
        ) as running,
    ):
        yield running


class Crowd:
    """People of ours who talk all the time.

    Attributes:
        delays: seconds from a send to each of its deliveries, since `measure` began.
        lost: sends that failed, and were made again.
    """

    def __init__(self, chat: Chat, *, pairs: int = 4, each: float = 10.0) -> None:
        self._chat = chat
        self._pairs = [chat.pair() for _ in range(pairs)]
        self._every = 1 / each
        self._open = 0
        self.delays: list[float] = []
        self.lost = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            for pair in self._pairs:
                for person in (pair.therapist, pair.prospect):
                    await nursery.start(self._read, pair.channel_id, self._chat.token(person))
                nursery.start_soon(self._talk, pair)
            task_status.started()

    async def measure(self, seconds: float) -> float:
        """The p99 of so many seconds."""
        self.delays = []
        await trio.sleep(seconds)
        assert len(self.delays) > 5 * seconds, "hardly anything arrived"
        return statistics.quantiles(self.delays, n=100)[98]

    async def _read(
        self, channel_id: int, token: str, *, task_status: trio.TaskStatus[None]
    ) -> None:
        async with open_stream(self._chat.base, channel_id, token) as client:
            task_status.started()
            while (batch := await client.read()) is not None:
                now = time.perf_counter()
                for event in batch:
                    if event.event == "message" and "text" in (data := json.loads(event.data)):
                        self.delays.append(now - float(data["text"]))
        raise AssertionError("a stream of the crowd was ended")

    async def _talk(self, pair: Pair) -> None:
        client = KeepAlive(self._chat.base, self._chat.token(pair.prospect))
        try:
            while True:
                body = {"channelId": pair.channel_id, "content": repr(time.perf_counter())}
                try:
                    status, _ = await client.post("/api/chat/send", body)
                    assert status == 200, status
                except BROKEN:
                    self.lost += 1  # its idle connection made room
                await trio.sleep(self._every)
        finally:
            await client.aclose()


class Figures:
    """What one test saw, of the worker and of the crowd."""

    def __init__(self, server: Chat, record: Callable[[str, object], None]) -> None:
        self._process = psutil.Process(server.process.pid)
        self._server = server
        self._record = record
        self._seen: dict[str, object] = {}
        self.connections = 0
        self.memory = 0.0

    async def memory_is_back(self, before: float) -> None:
        """Some of what it took: Python keeps pages in which anything lives that was made
        meanwhile. A second crowd takes those again, and no more."""
        gave_up_at = time.monotonic() + BACK_SECONDS
        while (after := self.rss()) > before + KEPT_MB and time.monotonic() < gave_up_at:
            await trio.sleep(0.2)
        self.say(
            rss_before_mb=round(before), rss_most_mb=round(self.memory), rss_after_mb=round(after)
        )
        assert after <= before + KEPT_MB

    def say(self, **figures: object) -> None:
        for name, value in figures.items():
            self._seen[name] = value
            self._record(name, value)

    def print(self) -> None:
        print(json.dumps(self._seen))

    def rss(self) -> float:
        """MB"""
        return float(self._process.memory_info().rss) / MEGABYTE

    async def watch(self) -> None:
        """The most of connections and memory, until cancelled."""
        while True:
            self.connections = max(self.connections, self._process.num_fds())
            self.memory = max(self.memory, self.rss())
            await trio.sleep(0.1)

    async def gauge(self, name: str) -> float:
        text = await trio.to_thread.run_sync(lambda: self._server.get("/metrics", None).text)
        lines = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1]) if lines else 0.0

    async def settle(self, name: str, at_most: float, *, seconds: float) -> float:
        """Seconds until the gauge is down."""
        began = time.monotonic()
        while await self.gauge(name) > at_most:
            assert time.monotonic() - began < seconds, f"{name} stays up"
            await trio.sleep(0.1)
        return round(time.monotonic() - began, 1)


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def assert_unharmed(figures: Figures, before: float, during: float) -> None:
    figures.say(p99_before_ms=milliseconds(before), p99_during_ms=milliseconds(during))
    assert during <= max(2 * before, FLOOR)


@pytest.fixture
def figures(
    server: Chat, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> Iterator[Figures]:
    figures = Figures(server, record_property)
    yield figures
    print(request.node.name, end=": ")
    figures.print()


async def test_two_thousand_heads_that_come_byte_by_byte(server: Chat, figures: Figures):
    """A slow loris: each has ten seconds for its head, whatever it sends."""
    count = 2000
    async with trio.open_nursery() as nursery:
        crowd = Crowd(server)
        await nursery.start(crowd.run)
        nursery.start_soon(figures.watch)
        before = await crowd.measure(3)
        memory = figures.rss()
        with flood(
            server.port, count, "--drip", "0.5", sent=["GET / HTTP/1.1\r\nHost: x\r\nX: "]
        ) as lorises:
            await trio.to_thread.run_sync(lorises.wait_open)
            assert_unharmed(figures, before, await crowd.measure(5))
            assert await figures.gauge("sottovoce_connections_open") >= count
            gone = await figures.settle("sottovoce_connections_open", 40, seconds=15)
            told = await trio.to_thread.run_sync(lorises.finish)
        figures.say(
            clients=count,
            held_at_most_seconds=told["longest"],
            statuses=told["statuses"],
            gone_after_seconds=gone,
            sends_retried=crowd.lost,
        )
        assert told["statuses"] == {"408": count}
        assert told["longest"] <= HEAD_SECONDS + 5
        await figures.memory_is_back(memory)
        nursery.cancel_scope.cancel()


async def test_five_hundred_bodies_that_come_a_byte_a_second(server: Chat, figures: Figures):
    """Each has the time that the setting gives to a body; then 408."""
    count = 500
    pair = server.pair()
    head = (
        "POST /api/chat/send HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.token(pair.prospect)}\r\nContent-Length: 100\r\n\r\n"
    )
    async with trio.open_nursery() as nursery:
        crowd = Crowd(server)
        await nursery.start(crowd.run)
        nursery.start_soon(figures.watch)
        before = await crowd.measure(3)
        memory = figures.rss()
        with flood(server.port, count, "--drip", "1", sent=[head]) as clients:
            assert_unharmed(figures, before, await crowd.measure(4))
            await trio.to_thread.run_sync(clients.wait_open)
            gone = await figures.settle("sottovoce_connections_open", 40, seconds=15)
            told = await trio.to_thread.run_sync(clients.finish)
        figures.say(
            clients=count,
            held_at_most_seconds=told["longest"],
            statuses=told["statuses"],
            gone_after_seconds=gone,
            sends_retried=crowd.lost,
        )
        assert told["statuses"] == {"408": count}
        assert told["longest"] <= BODY_SECONDS + 4
        await figures.memory_is_back(memory)
        assert server.stored(pair.channel_id) == 0
        nursery.cancel_scope.cancel()


async def test_twenty_thousand_connections_that_say_nothing(server: Chat, figures: Figures):
    """Far more than are let be: each has a second, and the first four thousand have ten.

    With SOTTOVOCE_TEST_ROUNDS=5 before and meanwhile alternate, the medians of five rounds are
    judged, and there is no floor under them: for a machine that has nothing else to do.
    """
    count = 10_000  # of each of two processes: one may have 20,000 files
    rounds = int(os.environ.get("SOTTOVOCE_TEST_ROUNDS", "1"))
    floor = FLOOR if rounds == 1 else 0.0

    @contextmanager
    def attack(port: int) -> Iterator[tuple[Flood, Flood]]:
        with (
            flood(port, count, "--rate", "1250", "--source", "127.0.0.2") as one,
            flood(port, count, "--rate", "1250", "--source", "127.0.0.3") as two,
        ):
            yield one, two

    p99s: dict[str, list[float]] = {"before": [], "opened": [], "held": []}
    told = []
    async with trio.open_nursery() as nursery:
        crowd = Crowd(server, pairs=10)
        await nursery.start(crowd.run)
        nursery.start_soon(figures.watch)
        memory = 0.0
        for _ in range(rounds):
            p99s["before"].append(await crowd.measure(6))
            memory = memory or figures.rss()
            with attack(server.port) as attackers:
                p99s["opened"].append(await crowd.measure(8))
                # Those that were let be, and their ends.
                p99s["held"].append(await crowd.measure(HEAD_SECONDS))
                for clients in attackers:
                    await trio.to_thread.run_sync(clients.wait_open)
                gone = await figures.settle("sottovoce_connections_open", 60, seconds=20)
                told += [await trio.to_thread.run_sync(clients.finish) for clients in attackers]
        figures.say(
            rounds=rounds,
            clients=2 * count,
            descriptors_most=figures.connections,
            held_at_most_seconds=max(some["longest"] for some in told),
            gone_after_seconds=gone,
            sends_retried=crowd.lost,
            **{f"p99_{name}_ms": [milliseconds(p99) for p99 in p99s[name]] for name in p99s},
        )
        before, opened, held = map(statistics.median, p99s.values())
        assert max(opened, held) <= max(2 * before, floor)
        assert MAX_SILENT < figures.connections <= 3 * MAX_SILENT
        await figures.memory_is_back(memory)
        nursery.cancel_scope.cancel()


async def test_a_thousand_readers_that_do_not_read(server: Chat, figures: Figures):
    """Streams whose clients have gone to sleep, on channels where there is talk."""
    pairs = [server.pair() for _ in range(50)]
    people = [(pair.channel_id, person) for pair in pairs for person in pair[1:]]
    heads = [
        f"GET /api/chat/{channel_id} HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {server.token(person)}\r\n\r\n"
        for channel_id, person in people
    ]
    count = 10 * len(heads)

    async def talk(pair: Pair) -> None:
        client = KeepAlive(server.base, server.token(pair.prospect))
        try:
            while True:
                body = {"channelId": pair.channel_id, "content": "x" * 8000}
                with suppress(*BROKEN):
                    await client.post("/api/chat/send", body)
                await trio.sleep(0.3)
        finally:
            await client.aclose()

    async with trio.open_nursery() as nursery:
        crowd = Crowd(server)
        await nursery.start(crowd.run)
        nursery.start_soon(figures.watch)
        for pair in pairs:
            nursery.start_soon(talk, pair)
        before = await crowd.measure(3)
        memory = figures.rss()
        with flood(server.port, count, "--rate", "500", "--small", sent=heads) as sleepers:
            await trio.to_thread.run_sync(sleepers.wait_open)
            opened = await figures.gauge("sottovoce_streams_open")
            assert_unharmed(figures, before, await crowd.measure(6))
            gone = await figures.settle("sottovoce_streams_open", 8, seconds=25)
            told = await trio.to_thread.run_sync(sleepers.finish)
        figures.say(
            clients=count,
            statuses=told["statuses"],
            streams_open_at_once=opened,
            ended_as_slow=await figures.gauge("sottovoce_slow_streams_ended_total"),
            gone_after_seconds=gone,
            sends_retried=crowd.lost,
        )
        # Each wants 400 kB of history at once; on a busy machine some are told to come again.
        assert told["statuses"].get("200", 0) >= 0.9 * count
        assert sum(told["statuses"].values()) == count
        await figures.memory_is_back(memory)
        nursery.cancel_scope.cancel()
