"""npm's `eventsource` under Node, which reconnects by itself, while the servers fail.

It gives up for good at any status but 200, as a browser does. After each trouble every client is
back, and has seen each message once and in order.
"""

import json
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage.embedded import EmbeddedPostgres
from tests.deployment.fronts import front
from tests.deployment.parts import npm_folder, program
from tests.deployment.servers import Servers, family, frozen
from tests.support.chat import Pair
from tests.support.running import wait_until

SCRIPT = Path(__file__).parent / "npm" / "eventsource" / "clients.mjs"
CLIENTS = 9
DOWN_SECONDS = 5.0
"""Long enough for everybody to ask in vain, some twice."""
HUNG_SECONDS = 8.0
"""Several times what a request's storage work may take."""
SEND_SECONDS = 60.0
CONNECT_SECONDS = 30.0
ALL_BACK_SECONDS = 60.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=["directly", "nginx"])
def url(
    request: pytest.FixtureRequest,
    running_servers: Servers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    running_servers.start()
    if request.param == "directly":
        yield f"http://127.0.0.1:{running_servers.one.port}"
        return
    folder = tmp_path_factory.mktemp(request.param)
    with front(request.param, running_servers.ports, folder) as address:
        yield address


class Crowd:
    """`CLIENTS` people in a Node process, each with a stream of their channel, and who writes to
    them until `check`."""

    def __init__(self, servers: Servers, url: str, process: subprocess.Popen[str]) -> None:
        self._servers = servers
        self._url = url
        self._process = process
        self._lines: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._refusals: list[str] = []
        self._sent: list[str] = []
        self.pairs: list[Pair] = []
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._write)]

    def begin(self) -> None:
        """Return when each of them has heard something."""
        self._threads[0].start()
        wait_until(self._all_open, seconds=CONNECT_SECONDS, what="every stream's opening")
        with httpx.Client(base_url=self._url, timeout=5) as client:
            for pair in self.pairs:
                self._send(client, pair)
        wait_until(self._all_served, seconds=CONNECT_SECONDS, what="every stream's first message")
        self._threads[1].start()

    def check(self) -> None:
        """Everybody is back by themselves, and has seen each message once and in order."""
        self._stop.set()
        self._threads[1].join()
        with httpx.Client(base_url=self._url, timeout=5) as client:
            for pair in self.pairs:  # who hears this one is there
                self._send(client, pair)
        assert self._refusals == []
        deadline = time.monotonic() + ALL_BACK_SECONDS
        while not self._all_served():
            assert self.dead() == []
            assert time.monotonic() < deadline, self._lines
            time.sleep(0.1)
        stored = [message for pair in self.pairs for message, _ in self._stored(pair)]
        assert sorted(stored) == sorted(self._sent), "what was acknowledged is not what is stored"

    def end(self) -> None:
        self._stop.set()
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def dead(self) -> list[dict[str, Any]]:
        """Who has given up for good."""
        return [line for line in self._lines if line.get("dead")]

    def errors(self) -> int:
        return sum(line["kind"] == "error" for line in self._lines)

    def _all_open(self) -> bool:
        opened = {line["channel"] for line in self._lines if line["kind"] == "open"}
        return len(opened) == CLIENTS

    def _all_served(self) -> bool:
        """Each has seen exactly what is stored, in its order."""
        return all(self._seen(pair) == self._stored(pair) for pair in self.pairs)

    def _seen(self, pair: Pair) -> list[tuple[str, int]]:
        return [
            (line["id"], line["seq"])
            for line in self._lines
            if line["channel"] == pair.channel_id and line["kind"] == "message" and line["seq"]
        ]

    def _stored(self, pair: Pair) -> list[tuple[str, int]]:
        return self._servers.stored(pair.channel_id)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(json.loads(line))

    def _write(self) -> None:
        with httpx.Client(base_url=self._url, timeout=5) as client:
            while not self._stop.is_set():
                for pair in self.pairs:
                    self._send(client, pair)
                    self._stop.wait(0.02)

    def _send(self, client: httpx.Client, pair: Pair) -> None:
        """One message, and again with the same clientMessageId until it is taken."""
        body = {
            "channelId": pair.channel_id,
            "content": "hello",
            "clientMessageId": str(uuid.uuid4()),
        }
        headers = self._servers.chat.bearer(pair.therapist)
        deadline = time.monotonic() + SEND_SECONDS
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                answer = client.post("/api/chat/send", json=body, headers=headers)
                if answer.status_code == 200:
                    self._sent.append(answer.json()["messageId"])
                    return
                if answer.status_code < 500 and answer.status_code != 429:
                    self._refusals.append(answer.text)
                    return
            time.sleep(0.2)
        self._refusals.append("it took too long")


@contextmanager
def listening(servers: Servers, url: str) -> Iterator[Crowd]:
    folder = npm_folder("eventsource")
    shutil.copy(SCRIPT, folder)
    pairs = [servers.chat.pair() for _ in range(CLIENTS)]
    channels = [(pair.channel_id, servers.chat.token(pair.prospect)) for pair in pairs]
    with subprocess.Popen(
        [program("node"), SCRIPT.name, url, json.dumps(channels)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        crowd = Crowd(servers, url, process)
        crowd.pairs = pairs
        try:
            crowd.begin()
            yield crowd
        finally:
            crowd.end()


def test_all_come_back_when_a_server_is_restarted(url: str, servers: Servers):
    with listening(servers, url) as crowd:
        servers.one.stop()
        servers.one.start()
        crowd.check()
        assert crowd.errors()


def test_all_come_back_when_workers_are_killed(url: str, servers: Servers):
    with listening(servers, url) as crowd:
        for worker in servers.workers():
            worker.kill()
        crowd.check()
        assert crowd.errors() >= CLIENTS


def test_all_come_back_when_both_servers_were_down(url: str, servers: Servers):
    with listening(servers, url) as crowd:
        for server in servers:
            server.kill()
        time.sleep(DOWN_SECONDS)
        servers.start()
        crowd.check()
        assert crowd.errors() > CLIENTS


def test_all_come_back_after_a_roll_with_postgresql_hung(
    url: str, servers: Servers, postgres: EmbeddedPostgres
):
    with listening(servers, url) as crowd:
        with frozen(family(postgres.pid)):
            for server in servers:
                server.roll()
            time.sleep(HUNG_SECONDS)
        crowd.check()
