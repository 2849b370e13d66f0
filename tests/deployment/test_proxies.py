"""What each recipe of docs/how-to/proxies does with single requests: passes, repeats, answers."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deployment.fronts import NEXT, PROXIES, front
from tests.deployment.servers import Servers
from tests.support.chat import Events
from tests.support.running import wait_until

pytestmark = pytest.mark.timeout(600)  # Next.js builds for a minute where others are at work

PASSES_WITHIN = 3.0
"""Seconds."""
SILENT_SECONDS = 6.0
"""Twice what a recipe, hurried for the tests, bears of silence."""
TRIES = 20
NEXT_TESTED = NEXT[-1:]
"""All of them have the same handler; the browsers' tests have them all."""
FRONTS = [*PROXIES, *NEXT_TESTED, "vite"]
WITH_TWO_SERVERS = [*PROXIES, *NEXT_TESTED]


@pytest.fixture(scope="module", params=FRONTS)
def url(
    request: pytest.FixtureRequest,
    running_servers: Servers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    running_servers.start()
    folder = tmp_path_factory.mktemp(request.param)
    with front(request.param, running_servers.ports, folder) as address:
        yield address


def test_events_pass_at_once_heartbeats_keep_the_stream_and_it_resumes(url: str, servers: Servers):
    chat = servers.chat
    pair = chat.pair()
    port = httpx.URL(url).port or 0
    target, who = f"/api/chat/{pair.channel_id}", chat.bearer(pair.prospect)
    with httpx.Client(base_url=url, timeout=5) as client:

        def send(text: str) -> None:
            answer = client.post(
                "/api/chat/send",
                json={"channelId": pair.channel_id, "content": text},
                headers=chat.bearer(pair.therapist),
            )
            assert answer.status_code == 200

        with Events(port, target, who) as stream:
            assert stream.status == 200
            assert '"connected"' in stream.next(seconds=PASSES_WITHIN).data
            send("first")
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "first"
            began = time.monotonic()
            while time.monotonic() - began < SILENT_SECONDS:  # but for heartbeats
                assert stream.next(seconds=PASSES_WITHIN, heartbeats=True).event == "heartbeat"
            send("second")
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "second"
            cursor = stream.parser.last_event_id
        send("third")
        with Events(port, target, {**who, "Last-Event-ID": cursor}) as stream:
            assert '"connected"' in stream.next(seconds=PASSES_WITHIN).data
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "third"


def test_a_stream_that_the_browser_leaves_ends_on_the_server(url: str, servers: Servers):
    chat = servers.chat
    pair = chat.pair()
    wait_until(lambda: _open_streams(servers) == 0, what="the end of other tests' streams")
    port = httpx.URL(url).port or 0
    with Events(port, f"/api/chat/{pair.channel_id}", chat.bearer(pair.prospect)) as stream:
        stream.connected()
        wait_until(lambda: _open_streams(servers) == 1, what="the stream")
    wait_until(lambda: _open_streams(servers) == 0, what="the stream's end")


def test_what_is_for_those_who_run_it_stays_inside(url: str):
    for path in ("/metrics", "/readyz", "/healthz"):
        answer = httpx.get(f"{url}{path}", timeout=5)
        assert b"sottovoce" not in answer.content
        assert b'"ready"' not in answer.content


# Recorded servers: they say what they were asked, and fail as they are told.


class Recorder:
    """A stand-in for a server on a port of its own.

    Attributes:
        requests: method, path and headers of each request but those for its health.
        status: what it answers with; None: it reads the request and closes the connection.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.status: int | None = 200
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status = recorder.status
                if self.path == "/api/chat/availability":
                    status = 401  # what `front` waits for
                elif self.path != "/readyz":
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    recorder.requests.append((self.command, self.path, headers))
                if status is None:
                    self.close_connection = True
                    return
                body = json.dumps({"status": status}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port

    @contextmanager
    def running(self) -> Iterator["Recorder"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextmanager
def recorded(name: str, folder: Path) -> Iterator[tuple[httpx.Client, Recorder, Recorder]]:
    """A client of a recipe whose two servers are stand-ins."""
    with ExitStack() as cleanup:
        one, two = (cleanup.enter_context(Recorder().running()) for _ in range(2))
        url = cleanup.enter_context(front(name, (one.port, two.port), folder))
        client = cleanup.enter_context(_client(url))
        yield client, one, two


STREAM = {"Accept": "text/event-stream"}


def assert_ends_and_comes_back(answer: httpx.Response) -> None:
    """A stream that says when to come back, as an `EventSource` understands it."""
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert "no-store" in answer.headers["cache-control"]
    retry, *event = answer.text.split("\n")
    assert 2000 <= int(retry.removeprefix("retry: ")) <= 6000
    closing = {"reason": "unavailable", "reconnect": True}
    assert event[0] == "event: closing"
    assert json.loads(event[1].removeprefix("data: ")) == closing
    assert event[2:] == ["", ""]


@pytest.mark.parametrize("name", FRONTS)
def test_what_a_browser_says_reaches_the_server(name: str, tmp_path: Path):
    said = {
        "cookie": "__session=abc; other=1",
        "last-event-id": "41",
        "sec-fetch-site": "same-origin",
        "origin": "http://app.example",
        "accept": "text/event-stream",
        "x-forwarded-for": "203.0.113.7",
    }
    with recorded(name, tmp_path) as (client, one, two):
        assert client.get("/api/chat/42?lastEventId=40", headers=said).status_code == 200
        sent = client.post("/api/chat/send", json={}, headers={**said, "idempotency-key": "k"})
        assert sent.status_code == 200
        requests = sorted(one.requests + two.requests)
    assert [request[:2] for request in requests] == [
        ("GET", "/api/chat/42?lastEventId=40"),
        ("POST", "/api/chat/send"),
    ]
    for _, _, headers in requests:
        heard = {name: headers.get(name) for name in said if name != "x-forwarded-for"}
        assert heard == {name: text for name, text in said.items() if name != "x-forwarded-for"}
        # An address that the client made up is never the last: the proxy appends what it saw.
        # Next.js passes the header on, and Caddy believes nobody unless told.
        forwarded = headers["x-forwarded-for"].replace(" ", "").split(",")
        assert forwarded[-1] == ("203.0.113.7" if name in NEXT else "127.0.0.1")
    assert requests[1][2]["idempotency-key"] == "k"


@pytest.mark.parametrize("name", WITH_TWO_SERVERS)
def test_what_a_server_is_too_busy_for_the_other_one_is_asked(name: str, tmp_path: Path):
    with recorded(name, tmp_path) as (client, one, _):
        one.status = 503
        time.sleep(3)  # HAProxy and Caddy look at /readyz once a second
        answers = [client.get("/api/chat/export") for _ in range(TRIES)]
        answers += [client.get("/api/chat/42", headers=STREAM) for _ in range(TRIES)]
    assert [answer.json() for answer in answers] == [{"status": 200}] * 2 * TRIES


@pytest.mark.parametrize("name", FRONTS)
def test_a_post_that_may_have_been_stored_is_not_sent_again(name: str, tmp_path: Path):
    with recorded(name, tmp_path) as (client, one, two):
        one.status = two.status = None
        assert _failed(client, "POST", "/api/chat/send")
        assert [request[:2] for request in one.requests + two.requests] == [
            ("POST", "/api/chat/send")
        ]


@pytest.mark.parametrize("name", FRONTS)
def test_streams_that_no_server_can_give_end_and_requests_fail(name: str, tmp_path: Path):
    """Whether the servers are busy, break in the middle, or are not there."""
    with recorded(name, tmp_path) as (client, one, two):
        for status in (503, None):
            one.status = two.status = status
            for _ in range(3):
                assert_ends_and_comes_back(client.get("/api/chat/42", headers=STREAM))
    with ExitStack() as cleanup:
        servers = [Recorder() for _ in range(2)]
        stopping = ExitStack()
        with stopping:
            for server in servers:
                stopping.enter_context(server.running())
            ports = (servers[0].port, servers[1].port)
            url = cleanup.enter_context(front(name, ports, tmp_path))
        client = cleanup.enter_context(_client(url))
        for _ in range(2):
            assert_ends_and_comes_back(client.get("/api/chat/42", headers=STREAM))
            assert_ends_and_comes_back(
                client.get("/api/chat/42/", headers=STREAM, follow_redirects=True)
            )
            for path in ("/api/chat/42", "/api/chat/export"):
                assert _failed(client, "GET", path)
            assert _failed(client, "POST", "/api/chat/send")


def _client(url: str) -> httpx.Client:
    """With a connection for each request: on one that was used before, HAProxy answers a server's
    broken connection with the end of it, which a browser repeats by itself."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, timeout=20, limits=limits)


def _failed(client: httpx.Client, method: str, path: str) -> bool:
    """With the status of a failure, whichever the proxy takes."""
    return client.request(method, path).status_code in (500, 502, 503, 504)


def _open_streams(servers: Servers) -> int:
    total = 0.0
    for port in servers.ports:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        for line in text.splitlines():
            if line.startswith("sottovoce_streams_open "):
                total += float(line.split()[1])
    return int(total)
