"""Two thousand streams of one worker, cut at once and opened again at once."""

import re
import resource
import selectors
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from storage.embedded import EmbeddedPostgres
from tests.storage.stores import make_channels
from tests.support.chat import Chat, Person, own_valkey, run_chat
from tests.support.running import wait_until
from tests.support.services import fresh_database

STREAMS = 2000
MESSAGES = 3
WAIT_SECONDS = 40.0

# What 2,000 streams cause behind the server is the same whatever they speak.
pytestmark = pytest.mark.once


class Caller(NamedTuple):
    channel_id: int
    token: str


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def open_streams(
    chat: Chat, callers: Sequence[Caller], *, cursor: int | None
) -> Iterator[list[bytes]]:
    """A stream for each, all asked for at once; what each has said first. They are cut off."""
    said: list[bytes] = [b""] * len(callers)
    opened: list[socket.socket] = []
    deadline = time.monotonic() + WAIT_SECONDS
    waiting = len(callers)
    try:
        with selectors.DefaultSelector() as selector:
            for index, caller in enumerate(callers):
                sock = socket.socket()
                opened.append(sock)
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", chat.port))
                selector.register(sock, selectors.EVENT_WRITE, (index, caller))
            while waiting:
                assert time.monotonic() < deadline, f"{waiting} streams have not opened"
                for key, event in selector.select(1):
                    index, caller = key.data
                    sock = opened[index]
                    if event & selectors.EVENT_WRITE:
                        sock.send(_request(caller, cursor))
                        selector.modify(sock, selectors.EVENT_READ, key.data)
                        continue
                    data = sock.recv(65536)
                    said[index] += data
                    assert data, said[index]
                    if b"\nid: %d\n" % MESSAGES in said[index] or (
                        cursor == MESSAGES and b'"connected"' in said[index]
                    ):
                        selector.unregister(sock)
                        waiting -= 1
        yield said
    finally:
        for sock in opened:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def _request(caller: Caller, cursor: int | None) -> bytes:
    last = "" if cursor is None else f"last-event-id: {cursor}\r\n"
    return (
        f"GET /api/chat/{caller.channel_id} HTTP/1.1\r\nhost: localhost\r\n"
        f"authorization: Bearer {caller.token}\r\n{last}\r\n"
    ).encode()


def metric(chat: Chat, name: str) -> dict[str, float]:
    """A metric's values by their labels."""
    lines = re.findall(rf"^{name}(\S*) (\S+)$", chat.client.get("/metrics").text, re.MULTILINE)
    return {labels: float(value) for labels, value in lines}


class RoundTrips:
    NAMES = ("sottovoce_postgres_statements_total", "sottovoce_redis_round_trips_total")

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        return {
            kind: value
            for name in self.NAMES
            for kind, value in metric(self._chat, name).items()
            if "ping" not in kind and "probe" not in kind
        }

    def __call__(self) -> dict[str, int]:
        now = self._now()
        changed = {kind: int(now[kind] - self._before.get(kind, 0)) for kind in now}
        self._before = now
        return changed


@pytest.mark.usefixtures("many_files")
def test_two_thousand_streams_that_are_cut_and_come_back_are_few_round_trips(
    postgres: EmbeddedPostgres, migrated_template: str, services_folder: Path
):
    with (
        fresh_database(postgres, migrated_template) as database,
        own_valkey(services_folder) as valkey,
        run_chat(database, valkey.url, services_folder) as chat,
    ):
        callers = [
            Caller(channel_id, chat.token(Person(0, clerk_id, "", "", "")))
            for clerk_id, channel_id in make_channels(database, STREAMS, messages=MESSAGES)
        ]

        def streams() -> float:
            return sum(metric(chat, "sottovoce_streams_open").values())

        trips = RoundTrips(chat)
        for cursor in (None, 1, MESSAGES):
            with open_streams(chat, callers, cursor=cursor) as said:
                assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in said)
                seqs = [[int(n) for n in re.findall(rb"\nid: (\d+)\n", answer)] for answer in said]
                expected = list(range((cursor or 0) + 1, MESSAGES + 1))
                assert seqs == [expected] * STREAMS
                assert streams() == STREAMS
            wait_until(lambda: streams() == 0, what="the end of all streams")
            counted = trips()
            # A batch is what arrives during one round trip, and here the accepting is the slow
            # part: the more so on the stock engine. All at once: tests/storage/test_storm.py.
            assert max(counted.values()) <= STREAMS / 3, counted
