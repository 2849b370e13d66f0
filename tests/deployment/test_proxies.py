"""The proxies' files of docs/tuning.md, as they stand there, before a real server."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.deployment.parts import program
from tests.support.chat import Chat, Events

PAGE = Path(__file__).parents[2] / "docs" / "tuning.md"
PASSES_WITHIN = 1.0
"""Seconds."""
GRACE_SECONDS = 0.5
IDLE = "1s"
"""In place of the files' 60 s: the server of these tests sends a heartbeat each half second."""
PROXIES = {
    "nginx": lambda file: ["nginx", "-p", str(file.parent), "-c", str(file), "-g",
                           f"daemon off; pid {file.parent}/pid; error_log stderr;"],
    "haproxy": lambda file: ["haproxy", "-db", "-f", str(file)],
    "caddyfile": lambda file: ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)],
}  # fmt: skip


def snippet(language: str) -> str:
    page = PAGE.read_text("utf-8")
    (found,) = re.finditer(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return found[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(language: str, upstream: int, folder: Path) -> Iterator[int]:
    """The proxy's port."""
    port = free_port()
    text = snippet(language)
    for ours, theirs in (
        ("127.0.0.1:8000", f"127.0.0.1:{upstream}"),
        ("8080", str(port)),
        ("60s", IDLE),
        ("200000", "1000"),  # more than this machine may allow
        ("100000", "500"),
    ):
        assert ours in text or ours.endswith("00000"), ours
        text = text.replace(ours, theirs)
    file = folder / "proxy.conf"
    file.write_text(text)
    name, *arguments = PROXIES[language](file)
    command = [program(name), *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=folder
        )
    try:
        deadline = time.monotonic() + 10
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/api/chat/availability", timeout=1)
            except httpx.HTTPError:
                time.sleep(0.05)
                continue
            if answer.status_code == 401:  # the server's own answer: the proxy has found it
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()  # nginx ends its workers
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # Caddy waits for those who are connected
            process.kill()
            process.wait()


@pytest.fixture(params=PROXIES)
def proxy(request: pytest.FixtureRequest, chat: Chat, tmp_path: Path) -> Iterator[int]:
    with running(request.param, chat.port, tmp_path) as port:
        yield port


def test_events_pass_at_once_heartbeats_keep_the_stream_and_it_resumes(proxy: int, chat: Chat):
    pair = chat.pair()
    target, who = f"/api/chat/{pair.channel_id}", chat.bearer(pair.prospect)
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy}", timeout=5) as client:

        def send(text: str) -> None:
            answer = client.post(
                "/api/chat/send",
                json={"channelId": pair.channel_id, "content": text},
                headers=chat.bearer(pair.therapist),
            )
            assert answer.status_code == 200

        with Events(proxy, target, who) as stream:
            assert stream.status == 200
            assert '"connected"' in stream.next(seconds=PASSES_WITHIN).data
            send("first")
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "first"
            began = time.monotonic()
            while time.monotonic() - began < 1.8:  # of silence, but for heartbeats
                assert stream.next(seconds=PASSES_WITHIN, heartbeats=True).event == "heartbeat"
            send("second")
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "second"
            cursor = stream.parser.last_event_id
        send("third")
        with Events(proxy, target, {**who, "Last-Event-ID": cursor}) as stream:
            assert '"connected"' in stream.next(seconds=PASSES_WITHIN).data
            assert stream.message(seconds=PASSES_WITHIN)["text"] == "third"


def test_what_is_for_those_who_run_it_stays_inside(proxy: int):
    for path in ("/metrics", "/readyz"):
        answer = httpx.get(f"http://127.0.0.1:{proxy}{path}", timeout=5)
        assert answer.status_code in (403, 404)
        assert b"sottovoce" not in answer.content


def test_the_page_has_one_file_for_each_proxy():
    for language in PROXIES:
        assert "127.0.0.1:8000" in snippet(language)
