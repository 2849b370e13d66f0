"""`sottovoce serve`, two of them, on a Redis Cluster."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.storage.clusters import Cluster, running_cluster
from tests.support.chat import Chat, Pair, environment, eventually
from tests.support.running import running_serve
from tests.support.services import Database
from tests.support.tokens import Signer

CANDIDATES = 20
"""Pairs, of which each node has some."""


@contextmanager
def serving(database: Database, redis_url: str, signer: Signer, log: Path) -> Iterator[Chat]:
    environ = environment(database, redis_url, signer) | {"SOTTOVOCE_RECONCILE_SECONDS": "60"}
    with running_serve(environ, log) as url:
        port = httpx.URL(url).port
        assert port is not None
        chat = Chat(database, signer, port, log)
        with chat.client:
            yield chat


def is_ready(chat: Chat) -> bool:
    return bool(chat.client.get("/readyz").json()["status"] == "ready")


@pytest.mark.once
def test_a_send_to_one_server_is_at_the_other_at_once_whichever_node_has_its_channel(
    database: Database, folder: Path
):
    with ExitStack() as stack:
        cluster: Cluster = stack.enter_context(running_cluster(folder))
        signer = Signer()
        one, two = (
            stack.enter_context(serving(database, cluster.url, signer, folder / name))
            for name in ("one", "two")
        )
        pairs: dict[int, Pair] = {}
        for _ in range(CANDIDATES):
            pair = one.pair()
            pairs[pair.channel_id] = pair
        rooms = [pairs[channel_id] for channel_id in cluster.channels(database, list(pairs))]
        streams = [
            stack.enter_context(two.stream(room.channel_id, room.therapist)).connected()
            for room in rooms
        ]

        def took(number: int, text: str) -> float:
            room, stream = rooms[number], streams[number]
            started = time.monotonic()
            one.send(room.prospect, room.channel_id, text)
            assert stream.message(seconds=5)["text"] == text
            return time.monotonic() - started

        for turn in range(5):
            times = [took(number, f"hello {turn}") for number in range(3)]
        assert max(times) < 0.5, times

        os.kill(cluster.nodes[0].pid, signal.SIGKILL)
        assert took(0, "without its node") < 2, "by a look at PostgreSQL"
        eventually(lambda: not is_ready(two))
        for turn in range(5):
            times = [took(number, f"without one {turn}") for number in range(3)]
        assert times[0] < 1, times
        assert max(times[1:]) < 0.2, times

        cluster.nodes[0].stop()
        cluster.nodes[0].start()
        eventually(lambda: is_ready(one) and is_ready(two))
        assert took(0, "with it again") < 0.5
        for name in ("one", "two"):
            log = (folder / name).read_text()
            assert cluster.nodes[0].password not in log
            assert "task_failed" not in log
