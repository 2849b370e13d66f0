"""The measuring client, against sockets of the test's own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.client import Page, Posts, Refused, Streams, stamp

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
SECONDS = 10.0


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A listener, with `serve` in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                serve(listener)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            thread.join(SECONDS)
            assert not thread.is_alive() and not failures


def accept(listener: socket.socket) -> socket.socket:
    """A connection whose request has been read."""
    sock, _ = listener.accept()
    sock.settimeout(SECONDS)
    assert sock.recv(4096).endswith(b"\r\n\r\n")
    return sock


def read_until(streams: Streams, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        streams.read_stamps(0.05)


REQUEST = b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n"


def test_events_are_counted_however_they_are_split():
    data = b"".join(b"data: ~%d\n\n" % number for number in range(100))
    is_open = threading.Event()

    def serve(listener):
        with accept(listener) as sock:
            sock.sendall(HEAD)
            assert is_open.wait(SECONDS)
            for at in range(0, len(data), 7):
                sock.sendall(data[at : at + 7])

    with serving(serve) as address, Streams([address]) as streams:
        streams.open([REQUEST], page=Page())
        is_open.set()
        read_until(streams, lambda: streams.lost == 1)
        assert (streams.events, streams.bytes) == (100, len(data))


def test_a_time_is_found_where_a_read_ends_within_it():
    is_open = threading.Event()
    text = b"data: " + stamp(time.perf_counter() - 2.0).encode() + b"\n\n"

    def serve(listener):
        with accept(listener) as sock:
            sock.sendall(HEAD)
            assert is_open.wait(SECONDS)
            for part in (text[:12], text[12:] + text[:9], text[9:]):
                sock.sendall(part)
                time.sleep(0.1)

    with serving(serve) as address, Streams([address]) as streams:
        streams.open([REQUEST], page=Page())
        is_open.set()
        read_until(streams, lambda: streams.lost == 1)
        assert streams.events == 2
        assert [2.0 < latency < 2.0 + SECONDS for latency in streams.latencies] == [True, True]


def test_a_stream_is_complete_with_its_whole_page():
    def serve(listener):
        with accept(listener) as sock:
            for part in (
                HEAD[:20],
                HEAD[20:] + b"data: hello\n\n",
                b"data: ~1\n\n",
                b"data: ~2\n\n",
            ):
                sock.sendall(part)
                time.sleep(0.1)

    with serving(serve) as address, Streams([address]) as streams:
        (took,) = streams.open([REQUEST], page=Page(b"hello", 2))
        assert took >= 0.3
        assert len(streams) == 1


@pytest.mark.parametrize(
    "turned_away", [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"", HEAD[:-1], HEAD + b"data: ~"]
)
def test_who_is_turned_away_comes_back_and_is_timed_from_the_first_attempt(turned_away):
    def serve(listener):
        with accept(listener) as sock:
            time.sleep(0.3)
            sock.sendall(turned_away)
        with accept(listener) as sock:
            sock.sendall(HEAD + b"data: ~1\n\ndata: ~2\n\n")

    with serving(serve) as address, Streams([address]) as streams:
        (took,) = streams.open([REQUEST], page=Page(b"", 2))
        assert streams.turned_away == 1
        assert took >= 1.3


def test_a_stream_that_is_refused_is_said():
    def serve(listener):
        with accept(listener) as sock:
            sock.sendall(b"HTTP/1.1 401 Unauthorized\r\n\r\n")

    with (
        serving(serve) as address,
        Streams([address]) as streams,
        pytest.raises(Refused, match="401"),
    ):
        streams.open([REQUEST], page=Page())


def test_a_stream_that_never_opens_is_said():
    def serve(listener):
        with accept(listener) as sock:
            sock.sendall(HEAD)
            assert ended.wait(SECONDS)

    ended = threading.Event()
    with serving(serve) as address, Streams([address]) as streams:
        with pytest.raises(Refused, match="1 of 1"):
            streams.open([REQUEST], page=Page(b"hello"), seconds=0.3)
        ended.set()


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok\n\r\n0\r\n\r\n",
    ],
)
def test_an_answer_is_counted_once_it_is_whole(answer):
    """Split anywhere in a body of a known length; the others come as they are."""
    parts = [answer[:30], answer[30:-1], answer[-1:]] if answer is ANSWER else [answer]

    def serve(listener):
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(SECONDS)
            for _ in range(2):
                assert sock.recv(4096)
                for part in parts:
                    sock.sendall(part)
                    time.sleep(0.05)

    with serving(serve) as address, Posts(address, 1) as posts:
        for expected in (1, 2):
            posts.post(b"POST / HTTP/1.1\r\n\r\n")
            assert (posts.free, posts.waiting) == (0, 1)
            wait_for(posts, expected)
            assert (posts.free, posts.waiting) == (1, 0)


def test_a_refused_post_is_said():
    def serve(listener):
        with accept(listener) as sock:
            sock.sendall(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")

    with serving(serve) as address, Posts(address, 1) as posts:
        posts.post(REQUEST)
        with pytest.raises(Refused, match="429"):
            wait_for(posts, 1)


def test_a_connection_that_the_server_closed_is_made_again():
    """While it is idle, and after an answer that announces it."""

    def serve(listener):
        listener.accept()[0].close()
        with accept(listener) as sock:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        with accept(listener) as sock:
            sock.sendall(ANSWER)

    with serving(serve) as address, Posts(address, 1) as posts:
        posts.read(SECONDS)
        began = time.monotonic()
        posts.read(0.2)
        assert time.monotonic() - began >= 0.2, "the closed one is still looked at"
        for expected in (1, 2):
            posts.post(REQUEST)
            wait_for(posts, expected)


def wait_for(posts: Posts, answered: int) -> None:
    deadline = time.monotonic() + SECONDS
    while posts.answered < answered:
        assert time.monotonic() < deadline
        posts.read(0.05)
