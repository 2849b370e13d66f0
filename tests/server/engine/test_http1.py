"""The engine's HTTP/1.1, on a loopback port, around applications made for one promise each."""

import gc
import re
import socket
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any

import httpx
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.http1 import Connection, Limits, _Request
from server.engine.wire import Wire
from tests.support.raw_http import Client, Cut, Recorder, Seen, Served, respond, serving

HELLO = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
OURS = (Connection, Wire, _Request)
CLOSED = (Cut, trio.BrokenResourceError)
"""How an answer shows that is not whole."""


def get(path: bytes, *, version: bytes = b"1.1", headers: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/" + version + b"\r\nHost: x\r\n" + headers + b"\r\n"


def post(path: bytes, body: bytes, *, headers: bytes = b"") -> bytes:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    return head + headers + b"\r\n" + body


@asynccontextmanager
async def talking(app: Any, limits: Limits | None = None) -> AsyncIterator[Client]:
    """One connection to an engine of its own."""
    async with serving(app, limits or Limits(connections=10)) as served, served.connect() as client:
        yield client


@pytest.fixture
def patient_clock(autojump_clock):
    """Jumps when nothing happens, but not while loopback is only slow."""
    autojump_clock.autojump_threshold = 0.02
    return autojump_clock


# Requests on one connection


async def test_a_connection_is_kept_for_the_next_request():
    app = Recorder()
    async with talking(app) as client:
        for body in (b"one", b"two", b""):
            await client.send(post(b"/p", body))
            answer = await client.answer()
            assert answer.body == b"POST /p " + body
            assert b"connection" not in answer.headers
    assert len(app.seen) == 3


async def test_requests_that_come_together_are_answered_in_their_order():
    app = Recorder()
    async with talking(app) as client:
        await client.send(get(b"/1") + post(b"/2", b"body") + get(b"/3") + post(b"/4", b""))
        bodies = [(await client.answer()).body for _ in range(4)]
    assert bodies == [b"GET /1 ", b"POST /2 body", b"GET /3 ", b"POST /4 "]


async def test_one_request_is_answered_before_the_next_begins():
    running = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await trio.sleep(0.001)
        await respond(send, scope["raw_path"])
        running -= 1

    async with talking(app) as client:
        await client.send(b"".join(get(b"/%d" % number) for number in range(50)))
        assert [(await client.answer()).body for _ in range(50)] == [b"/%d" % n for n in range(50)]


async def test_what_is_wrong_behind_good_requests_is_refused_after_their_answers():
    app = Recorder()
    async with talking(app) as client:
        await client.send(get(b"/1") + get(b"/2") + get(b"/3", headers=b"no header\r\n"))
        assert [(await client.answer()).body for _ in range(2)] == [b"GET /1 ", b"GET /2 "]
        refused = await client.answer()
        assert (refused.status, refused.headers[b"connection"]) == (400, b"close")
        assert refused.headers[b"content-type"] == b"application/problem+json"
        await client.ended()


async def test_a_request_after_close_is_not_answered():
    app = Recorder()
    async with talking(app) as client:
        await client.send(get(b"/1", headers=b"Connection: close\r\n") + get(b"/2"))
        assert (await client.answer()).headers[b"connection"] == b"close"
        await client.ended()
    assert [seen.path for seen in app.seen] == ["/1"]


async def test_an_application_may_end_the_connection():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, headers=[(b"connection", b"close")])

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).headers[b"connection"] == b"close"
        await client.ended()


async def test_who_stops_sending_behind_a_request_gets_its_answer():
    async with talking(Recorder()) as client:
        await client.send(post(b"/p", b"x"))
        await client.stream.send_eof()
        assert (await client.answer()).body == b"POST /p x"
        await client.ended()


CHUNKS = b"5;ext\r\nhello\r\n1\r\n!\r\n0\r\nTrailer: x\r\n\r\n"
SEQUENCE = [
    (get(b"/a?b=c%20d"), Seen("GET", "/a", b"", b"b=c%20d")),
    (post(b"/p", b"hello"), Seen("POST", "/p", b"hello")),
    (
        b"PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
        Seen("PUT", "/c", b"hello!"),
    ),
    (b"HEAD /h HTTP/1.1\r\nHost: x\r\nA:\r\n\r\n", Seen("HEAD", "/h", b"")),
    (b"\r\nOPTIONS * HTTP/1.1\r\nHost:\r\n\r\n", Seen("OPTIONS", "*", b"")),
    (b"GET http://y/z HTTP/1.1\r\nHost: x\r\n\r\n", Seen("GET", "/z", b"")),
    (post(b"/long", b"x" * 300), Seen("POST", "/long", b"x" * 300)),
]
WHOLE = b"".join(sent for sent, _ in SEQUENCE)


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, len(WHOLE) - 1), max_size=12, unique=True).map(sorted))
async def test_bytes_mean_the_same_in_whatever_pieces_they_come(cuts: list[int]):
    """Each piece is read before the next is sent."""
    app = Recorder()
    async with talking(app) as client:
        for start, end in pairwise([0, *cuts, len(WHOLE)]):
            await client.send(WHOLE[start:end])
            await trio.testing.wait_all_tasks_blocked(0.0005)
        for _, seen in SEQUENCE:
            await client.answer(to=seen.method)
    assert app.seen == [seen for _, seen in SEQUENCE]


async def test_bytes_mean_the_same_one_by_one():
    app = Recorder()
    async with talking(app) as client:
        for index in range(len(WHOLE)):
            await client.send(WHOLE[index : index + 1])
        for _, seen in SEQUENCE:
            await client.answer(to=seen.method)
    assert app.seen == [seen for _, seen in SEQUENCE]


# What an application is told


async def test_the_scope_says_what_was_asked():
    app = Recorder()
    async with serving(app) as served:
        await served.ask(get(b"/a%2Fb%C3%A4?c=%20", headers=b"X-Two: 1\r\nx-two:  2 \t\r\n"))
    scope = app.scopes[0]
    assert (scope["type"], scope["scheme"], scope["http_version"]) == ("http", "http", "1.1")
    assert (scope["path"], scope["raw_path"]) == ("/a/bä", b"/a%2Fb%C3%A4")
    assert (scope["query_string"], scope["root_path"]) == (b"c=%20", "")
    assert scope["headers"] == [(b"host", b"x"), (b"x-two", b"1"), (b"x-two", b"2")]
    assert scope["client"][0] == scope["server"][0] == "127.0.0.1"
    assert scope["server"][1] == served.port


async def test_bytes_that_are_no_utf_8_in_a_path_are_no_error():
    app = Recorder()
    async with serving(app) as served:
        await served.ask(get(b"/%ff%zz%"))
    assert app.begun == ["/\ufffd%zz%"]


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://y.example:80/a?b", "/a", b"b"),
        (b"HTTP://y.example:80/a?b", "/a", b"b"),
        (b"https://y.example:80/a", "/a", b""),
        (b"http://y.example:80", "/", b""),
        (b"http://y.example:80?b", "/", b"b"),
    ],
)
async def test_the_host_of_an_absolute_target_counts(target: bytes, path: str, query: bytes):
    """RFC 9112 §3.2.2"""
    app = Recorder()
    async with serving(app) as served:
        await served.ask(get(target, headers=b"A: b\r\n"))
    scope = app.scopes[0]
    assert (scope["path"], scope["query_string"]) == (path, query)
    assert scope["headers"] == [(b"host", b"y.example:80"), (b"a", b"b")]


async def test_options_of_the_server_reach_the_application():
    """RFC 9112 §3.2.4"""
    app = Recorder()
    async with serving(app) as served:
        answer = await served.ask(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.body == b"OPTIONS * "


async def test_an_upgrade_is_ignored():
    """RFC 9110 §7.8"""
    app = Recorder()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\n"
    async with talking(app) as client:
        await client.send(get(b"/ws", headers=upgrade) + b"\xff" * 500)
        answer = await client.answer()
        assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
        await client.ended()
    assert app.begun == ["/ws"]


@pytest.mark.parametrize("target", [b"x:443", b"/hello", b"x"])
async def test_a_tunnel_is_not_to_be_had(target: bytes):
    app = Recorder()
    async with talking(app) as client:
        await client.send(b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n" + HELLO)
        assert (await client.answer()).status == 501
        await client.ended()
    assert app.begun == []


async def test_a_method_that_nobody_knows_is_501():
    app = Recorder()
    async with talking(app) as client:
        await client.send(b"BREW /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer()).status == 501
        await client.ended()
    assert app.begun == []


# Bodies


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with each part as it comes."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        message = await receive()
        more = message["more_body"]
        await send({"type": "http.response.body", "body": message["body"], "more_body": more})


async def test_a_body_is_given_as_it_comes_and_answered_in_chunks():
    async with talking(echo) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (b"one", b"two"):
            await client.send(b"%x\r\n" % len(part) + part + b"\r\n")
            if part == b"one":
                await client.read(b"\r\n\r\n")
            assert await client.chunk() == part
        await client.send(b"0\r\n\r\n")
        assert await client.chunk() == b""


async def test_a_body_of_some_megabytes_is_read_whole():
    app = Recorder()
    body = bytes(range(256)) * 12_000
    async with serving(app) as served, served.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, post(b"/p", body))
        assert (await client.answer()).body == b"POST /p " + body


def shrink_buffers(served: Served) -> None:
    """Else loopback takes megabytes before a writer must wait."""
    served.listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)


async def push(client: Client, data: bytes) -> int:
    """How much of `data` the other side lets us write; then it takes nothing for a while, or has
    closed."""
    sock = client.stream.socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
    pushed = 0
    while pushed < len(data):
        before = pushed
        with trio.move_on_after(0.3), suppress(OSError):
            pushed += await sock.send(data[pushed : pushed + 16 * 1024])
        if pushed == before:
            break
    return pushed


SOCKETS_HOLD = 256 * 1024
"""What the kernel doubles of the buffers on both sides, and a half of that for its own."""


async def test_a_body_that_is_not_asked_for_is_not_read():
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        size, more = 0, True
        while more:
            message = await receive()
            assert len(message["body"]) <= 64 * 1024
            size, more = size + len(message["body"]), message["more_body"]
        await respond(send, b"%d" % size)

    body = b"x" * 4_000_000
    async with serving(app) as served:
        shrink_buffers(served)
        async with served.connect() as client:
            request = post(b"/p", body)
            pushed = await push(client, request)
            assert pushed <= SOCKETS_HOLD + 64 * 1024
            go.set()
            await client.send(request[pushed:])
            assert (await client.answer()).body == b"4000000"


async def test_later_requests_are_not_read_while_one_is_answered():
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await go.wait()
        await respond(send)

    async with serving(app) as served:
        shrink_buffers(served)
        async with served.connect() as client:
            assert await push(client, HELLO * 100_000) <= SOCKETS_HOLD + 64 * 1024
            go.set()
            assert (await client.answer()).status == 200


async def test_who_sends_requests_without_end_while_one_is_answered_has_left():
    """The application waits for the peer to leave, so what comes has to be read."""
    left = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with talking(app) as client:
        await push(client, HELLO * 100_000)
        with trio.fail_after(5):
            await left.wait()


async def test_what_came_while_one_was_answered_is_answered_next():
    waiting = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with trio.move_on_after(0.05):
            waiting.set()
            assert (await receive())["type"] == "never"
        await respond(send, scope["raw_path"])

    async with talking(app) as client:
        await client.send(get(b"/1"))
        await waiting.wait()
        await client.send(get(b"/2"))
        assert [(await client.answer()).body for _ in range(2)] == [b"/1", b"/2"]


async def test_a_disconnect_is_seen_behind_bytes_of_later_requests():
    seen = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect", "from now on, at once"
        seen.set()

    async with serving(app) as served:
        async with served.connect() as client:
            await client.send(HELLO)
            await client.read(b"first")
            await client.send(HELLO * 3)
        with trio.fail_after(5):
            await seen.wait()


async def test_after_its_answer_an_application_waits_for_nobody():
    """ASGI: `http.disconnect` once the response is complete."""

    told = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await respond(send)
        told.append((await receive())["type"])

    async with talking(app) as client:
        for _ in range(2):
            await client.send(HELLO)
            assert (await client.answer()).status == 200
    assert told[0] == "http.disconnect"


async def test_a_disconnect_in_the_middle_of_a_body_is_one():
    app = Recorder()
    async with serving(app) as served:
        async with served.connect() as client:
            await client.send(post(b"/p", b"hello")[:-2])
        await trio.testing.wait_all_tasks_blocked(0.02)
    assert (app.lost, app.seen) == (["/p"], [])


async def test_a_body_that_makes_no_sense_is_refused_without_waiting_for_the_rest():
    app = Recorder()
    async with talking(app) as client:
        head = b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        await client.send(head + b"5\r\nhello\r\n5\r\nhelloXX")
        assert (await client.answer()).status == 400
        await client.ended()
    assert (app.lost, app.seen) == (["/p"], [])


async def test_an_early_answer_reaches_a_client_that_is_still_sending():
    """RFC 9112 §9.6: no reset takes it away."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"no", status=403)

    async with talking(app) as client:
        await client.send(post(b"/p", b"x" * 1_000_000)[:200_000])
        await trio.testing.wait_all_tasks_blocked(0.02)
        await client.send(b"x" * 200_000)
        answer = await client.answer()
        assert (answer.status, answer.body) == (403, b"no")
        assert answer.headers[b"connection"] == b"close"
        await client.ended()


# Expect: 100-continue (RFC 9110 §10.1.1)

EXPECTING = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-Continue\r\n\r\n"


async def test_who_expects_to_be_told_to_continue_is_told_when_the_body_is_asked_for():
    go, asked = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await go.wait()
        await Recorder()(scope, receive, send)

    async with talking(app) as client:
        await client.send(EXPECTING)
        await asked.wait()
        with trio.move_on_after(0.05) as nothing:
            await client.stream.receive_some(1)
        assert nothing.cancelled_caught
        go.set()
        assert await client.read(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"he")
        await client.send(b"llo")
        assert (await client.answer()).body == b"POST /p hello", "and not told again"


async def test_who_does_not_wait_is_not_told_to_continue():
    async with talking(Recorder()) as client:
        await client.send(EXPECTING + b"hello")
        assert (await client.answer()).body == b"POST /p hello"


async def test_nobody_is_told_to_continue_after_the_answer():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"no", "more_body": True})
        await receive()

    async with talking(app) as client:
        await client.send(EXPECTING)
        assert (await client.read(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
        assert await client.chunk() == b"no"
        await client.send(b"hello")
        await client.ended()


async def test_http_1_0_is_never_told_to_continue():
    async with talking(Recorder()) as client:
        await client.send(EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await trio.testing.wait_all_tasks_blocked(0.02)
        await client.send(b"hello")
        assert (await client.answer()).body == b"POST /p hello"


# Answers


async def test_every_answer_has_a_date():
    async with talking(Recorder()) as client:
        for sent in (HELLO, b"junk\r\n\r\n"):
            await client.send(sent)
            date = (await client.answer()).headers[b"date"].decode()
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", date)
            assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 3


async def test_head_is_answered_as_get_without_the_body():
    async with talking(Recorder()) as client:
        await client.send(b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n" + HELLO)
        head = await client.answer(to="HEAD")
        assert head.headers[b"content-length"] == b"%d" % len("HEAD /h ")
        assert (await client.answer()).body == b"GET /hello "


async def test_head_of_what_comes_in_parts_has_no_parts():
    async with talking(parts) as client:
        await client.send(b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n" + HELLO)
        head = await client.answer(to="HEAD")
        assert head.headers[b"transfer-encoding"] == b"chunked"
        assert (await client.answer()).body == b"onetwo"


async def parts(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def test_a_body_in_parts_goes_out_in_chunks_and_an_empty_part_is_no_end():
    async with talking(parts) as client:
        for _ in range(2):
            await client.send(HELLO)
            answer = await client.answer()
            assert (answer.body, answer.headers[b"transfer-encoding"]) == (b"onetwo", b"chunked")


async def test_a_body_whose_length_is_known_is_not_chunked():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"6"), (b"transfer-encoding", b"chunked")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async with talking(app) as client:
        for _ in range(2):
            await client.send(HELLO)
            answer = await client.answer()
            assert (answer.body, answer.headers[b"content-length"]) == (b"onetwo", b"6")
            assert b"transfer-encoding" not in answer.headers


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_can_have_no_body_has_none(status: int):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"not to be seen", status=status)

    async with talking(app) as client:
        for _ in range(2):
            await client.send(HELLO)
            answer = await client.answer()
            assert answer.status == status
            assert not {b"content-length", b"transfer-encoding"} & answer.headers.keys()


async def test_an_odd_status_is_sent_as_it_is():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, status=299)

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).status == 299


# HTTP/1.0


async def test_http_1_0_ends_the_connection_with_the_answer():
    async with talking(Recorder()) as client:
        await client.send(get(b"/a", version=b"1.0"))
        answer = await client.answer()
        assert (answer.body, answer.headers[b"connection"]) == (b"GET /a ", b"close")
        await client.ended()


async def test_http_1_0_may_keep_the_connection():
    async with talking(Recorder()) as client:
        for _ in range(2):
            await client.send(get(b"/a", version=b"1.0", headers=b"Connection: keep-alive\r\n"))
            answer = await client.answer()
            assert (answer.body, answer.headers[b"connection"]) == (b"GET /a ", b"keep-alive")


async def test_http_1_0_gets_no_chunks_and_the_body_ends_with_the_connection():
    async with talking(parts) as client:
        await client.send(get(b"/a", version=b"1.0", headers=b"Connection: keep-alive\r\n"))
        answer = await client.answer()
        assert (answer.body, answer.headers[b"connection"]) == (b"onetwo", b"close")
        assert b"transfer-encoding" not in answer.headers


async def test_http_1_0_needs_no_host():
    async with talking(Recorder()) as client:
        await client.send(b"GET /a HTTP/1.0\r\n\r\n")
        assert (await client.answer()).status == 200


# Applications that go wrong


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_an_application_that_raises_before_its_answer_has_a_500(version: bytes):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("canary")

    async with talking(app) as client:
        await client.send(get(b"/a", version=version) + HELLO)
        answer = await client.answer()
        assert (answer.status, answer.headers[b"connection"]) == (500, b"close")
        assert b"canary" not in answer.body
        await client.ended()


async def test_an_application_that_raises_is_not_blamed_for_what_follows_its_request():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("canary")

    async with talking(app) as client:
        await client.send(HELLO + b"\xff\xff\r\n\r\n")
        assert (await client.answer()).status == 500
        await client.ended()


async def test_an_application_that_says_nothing_has_a_500():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).status == 500
        await client.ended()


START = {"type": "http.response.start", "status": 200, "headers": []}
SIZED = {**START, "headers": [(b"content-length", b"10")]}
PART = {"type": "http.response.body", "body": b"hello", "more_body": True}
LAST = {"type": "http.response.body", "body": b"hello"}

BROKEN: dict[str, list[dict[str, Any]]] = {
    "raises behind the start": [START],
    "raises in the body": [START, PART],
    "raises in a body with a length": [SIZED, PART],
    "starts twice": [START, START],
    "starts again in the body": [START, PART, START],
    "says something else": [START, {"type": "http.response.pathsend"}],
    "sends less than it said": [SIZED, LAST],
    "sends less than it said, in parts": [SIZED, PART, {**LAST, "body": b""}],
    "sends more than it said": [SIZED, {**LAST, "body": b"hello, hello"}],
    "sends more than it said, in parts": [SIZED, {**PART, "body": b"hello, hello"}],
    "has LF in a header": [{**START, "headers": [(b"a", b"b\nc: d")]}, LAST],
    "has CR in a header": [{**START, "headers": [(b"a", b"b\rc: d")]}, LAST],
    "has CRLF in a name": [{**START, "headers": [(b"a: b\r\nc", b"d")]}, LAST],
    "has an answer in a header": [{**START, "headers": [(b"a", b"\r\n\r\nHTTP/1.1 200 ")]}, LAST],
}


@pytest.mark.parametrize("stubborn", [False, True], ids=["gives up", "goes on"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("messages", BROKEN.values(), ids=BROKEN.keys())
async def test_an_answer_that_broke_never_looks_whole(
    messages: list[dict[str, Any]], version: bytes, stubborn: bool
):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            for message in messages:
                await send(message)
        except RuntimeError:
            if stubborn:
                with suppress(RuntimeError):
                    await send({**PART, "body": b"!"})
            raise
        raise RuntimeError("canary")

    async with talking(app) as client:
        await client.send(get(b"/a", version=version) + HELLO)
        with pytest.raises(CLOSED):
            await client.answer()


async def test_messages_after_the_end_of_an_answer_are_refused_and_the_answer_is_whole():
    refused = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, b"whole")
        for message in (START, LAST):
            with pytest.raises(RuntimeError):
                await send(message)
            refused.append(message)

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).body == b"whole"
        with trio.move_on_after(0.05):
            assert not await client.stream.receive_some(1)
    assert len(refused) == 2


async def test_a_body_before_the_start_is_refused():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(LAST)

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).status == 500


# Readers that do not read


async def test_an_answer_that_nobody_reads_is_given_up(patient_clock):
    ended = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for _ in range(1000):
            await send({**PART, "body": b"x" * 100_000})
        ended.set()

    limits = Limits(connections=10, stall_seconds=3.0)
    async with serving(app, limits) as served, served.connect() as client:
        await client.send(HELLO)
        began, really = trio.current_time(), time.monotonic()
        with trio.fail_after(60):
            await ended.wait()
        assert time.monotonic() - really < 15, "100 MB were kept, and copied 1,000 times"
        assert 3 <= trio.current_time() - began < 5
        with pytest.raises(CLOSED):
            await client.answer()


async def test_a_slow_reader_gets_all_of_its_answer():
    body = bytes(range(256)) * 20_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, body)

    async with talking(app) as client:
        await client.send(HELLO)
        await trio.sleep(0.05)
        assert (await client.answer()).body == body


# Streams that the application writes itself: `sottovoce.direct`


def direct(scope: Any, *, status: int = 200) -> Any:
    return scope["extensions"]["sottovoce.direct"]["open"](status, [(b"content-type", b"a/b")])


async def test_a_direct_stream_is_a_chunked_answer():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope, status=201)
        assert stream.chunked
        assert stream.write(b"3\r\none\r\n") is True
        assert stream.write(b"3\r\ntwo\r\n") is True
        stream.end()

    async with talking(app) as client:
        await client.send(HELLO + HELLO)
        answer = await client.answer()
        assert (answer.status, answer.body) == (201, b"onetwo")
        assert answer.headers[b"content-type"] == b"a/b"
        assert (answer.headers[b"connection"], b"date" in answer.headers) == (b"close", True)
        await client.ended()


async def test_a_direct_stream_over_http_1_0_is_plain_and_ends_with_the_connection():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        assert not stream.chunked
        stream.write(b"one")
        stream.write(b"two")
        stream.end()

    async with talking(app) as client:
        await client.send(get(b"/a", version=b"1.0"))
        answer = await client.answer()
        assert (answer.body, b"transfer-encoding" in answer.headers) == (b"onetwo", False)


async def test_the_head_of_a_direct_stream_goes_out_with_its_first_bytes():
    go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        await go.wait()
        stream.write(b"3\r\none\r\n")
        stream.end()

    async with talking(app) as client:
        await client.send(HELLO)
        with trio.move_on_after(0.05) as nothing:
            await client.stream.receive_some(1)
        assert nothing.cancelled_caught
        go.set()
        first = await client.stream.receive_some(65536)
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\n\r\n3\r\none\r\n" in first


async def test_what_a_direct_stream_could_not_write_comes_before_what_is_written_next():
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    kept = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal kept
        stream = direct(scope)
        for _ in range(200):
            if not stream.write(chunk):
                kept += 1
                if kept % 2:
                    await stream.flush(seconds=5)
        stream.end()
        await stream.flush(seconds=5)

    async with talking(app) as client:
        await client.send(HELLO)
        await trio.sleep(0.05)
        assert (await client.answer()).body == b"x" * 65536 * 200
    assert kept > 2


async def test_a_direct_stream_sees_its_peer_leave_behind_bytes_that_it_sent():
    left = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        stream.write(b"3\r\none\r\n")
        await stream.closed()
        assert stream.gone
        assert stream.write(b"3\r\ntwo\r\n") is True, "as if it were written"
        await stream.flush(seconds=5)
        left.set()

    for leaves in ("fin", "reset"):
        left = trio.Event()
        async with serving(app) as served:
            async with served.connect() as client:
                await client.send(HELLO)
                await client.read(b"one\r\n")
                await client.send(HELLO * 100)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not left.is_set()
                if leaves == "reset":
                    client.reset()
            with trio.fail_after(5):
                await left.wait()


async def test_who_talks_without_end_on_a_direct_stream_has_left():
    left = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        stream.write(b"3\r\none\r\n")
        await stream.closed()
        left.set()

    async with talking(app) as client:
        await client.send(HELLO)
        await client.read(b"one\r\n")
        with suppress(trio.BrokenResourceError):
            await client.send(HELLO * 5000)
        with trio.fail_after(5):
            await left.wait()


class Marker:
    """What can be referred to weakly; dicts and lists cannot."""


async def test_nothing_of_its_request_lives_as_long_as_a_direct_stream():
    opened, go = trio.Event(), trio.Event()
    markers: list[weakref.ref[Marker]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["marker"] = Marker()
        scope["headers"].append((b"marker", Marker()))
        markers.extend(map(weakref.ref, (scope["marker"], scope["headers"][-1][1])))
        stream = direct(scope)
        del scope, receive, send
        stream.write(b"3\r\none\r\n")
        opened.set()
        await go.wait()
        stream.end()

    async with talking(app) as client:
        await client.send(HELLO + b"POST /half HTTP/1.1\r\nHost")
        await opened.wait()
        gc.collect()
        assert [marker() for marker in markers] == [None, None]
        assert [thing for thing in gc.get_objects() if isinstance(thing, _Request)] == []
        go.set()
        assert (await client.answer()).body == b"one"


async def test_a_direct_stream_takes_the_place_of_send():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        stream.write(b"3\r\none\r\n")
        for message in (START, LAST):
            with pytest.raises(RuntimeError):
                await send(message)
        with pytest.raises(RuntimeError):
            direct_again(200, [])
        assert (await receive())["type"] == "http.disconnect"
        stream.end()

    direct_again: Any

    async def remembering(scope: Any, receive: Any, send: Any) -> None:
        nonlocal direct_again
        direct_again = scope["extensions"]["sottovoce.direct"]["open"]
        await app(scope, receive, send)

    async with talking(remembering) as client:
        await client.send(HELLO)
        assert (await client.answer()).body == b"one"


async def test_only_a_get_may_be_answered_directly():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        has = "sottovoce.direct" in scope.get("extensions", {})
        await respond(send, headers=[(b"has", b"%d" % has)])

    async with talking(app) as client:
        for method, has in ((b"GET", b"1"), (b"POST", b"0"), (b"HEAD", b"0")):
            await client.send(method + b" / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert (await client.answer(to=method.decode())).headers[b"has"] == has


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_direct_stream_that_broke_never_looks_whole(version: bytes):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = direct(scope)
        stream.write(b"3\r\none\r\n")
        raise RuntimeError("canary")

    async with talking(app) as client:
        await client.send(get(b"/a", version=version))
        with pytest.raises(CLOSED):
            await client.answer()


async def test_a_direct_head_with_a_line_break_is_refused():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"]["sottovoce.direct"]["open"](200, [(b"a", b"b\r\nc: d")])

    async with talking(app) as client:
        await client.send(HELLO)
        assert (await client.answer()).status == 500


# Bodies that came with their heads: `sottovoce.whole_body`


async def test_a_whole_body_is_given_once_and_without_a_wait_and_a_part_of_one_is_not():
    taken: list[bytes | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ask = scope["extensions"]["sottovoce.whole_body"]
        taken.append(ask())
        if taken[-1] is None:
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
            taken.append(body)
        taken.append(ask())
        await respond(send)

    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    async with talking(app) as client:
        await client.send(head + b"Content-Length: 5\r\n\r\nwhole")
        assert (await client.answer()).status == 200
        assert taken == [b"whole", None]
        taken.clear()
        await client.send(head + b"Content-Length: 4\r\n\r\npa")
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"rt")
        assert (await client.answer()).status == 200
        assert taken == [None, b"part", None]
        taken.clear()
        await client.send(
            head + b"\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nc\r\n0\r\n\r\n"
        )
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert taken == [b"", None, b"c", None]


# HTTP/2 with prior knowledge


async def test_http_2_is_handed_on():
    app = Recorder()
    async with serving(app) as served:
        base = f"http://127.0.0.1:{served.port}"
        async with httpx.AsyncClient(base_url=base, http1=False, http2=True) as client:
            for body in (b"one", b"two"):
                answer = await client.post("/p", content=body)
                assert (answer.http_version, answer.content) == ("HTTP/2", b"POST /p " + body)
        assert app.scopes[0]["http_version"] == "2"
        assert "sottovoce.direct" not in app.scopes[0].get("extensions", {})


async def test_a_preface_in_pieces_is_one_and_what_only_begins_like_it_is_not():
    app = Recorder()
    async with serving(app) as served:
        async with served.connect() as client:
            for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0":
                await client.send(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked(0.001)
            with trio.fail_after(5):
                frame = await client.stream.receive_some(9)
            assert frame[3] == 4, "SETTINGS"
        async with served.connect() as client:
            await client.send(b"P")
            await trio.testing.wait_all_tasks_blocked(0.01)
            await client.send(post(b"/p", b"x")[1:])
            assert (await client.answer()).body == b"POST /p x"


# Limits


def sized(**limits: Any) -> Limits:
    return Limits(**{"connections": 10, **limits})


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get(b"/" + b"a" * 8192), 414),
        (get(b"/" + b"a" * 200_000), 414),
        (get(b"/", headers=b"A: " + b"b" * 5000 + b"\r\n"), 431),
        (get(b"/", headers=b"A" * 5000 + b": b\r\n"), 431),
        (get(b"/", headers=b"A: b\r\n" * 40), 431),
        (get(b"/", headers=b"A: " + b"b" * 2_000_000), 431),
        (get(b"/", headers=b"A" * 2_000_000), 431),
        (get(b"/", headers=b"A: b\r\n" * 200_000), 431),
    ],
    ids=[
        "a target",
        "a long target",
        "a value",
        "a name",
        "their number",
        "a line without an end",
        "a name without an end",
        "lines without an end",
    ],
)
async def test_what_is_too_large_is_refused(sent: bytes, status: int):
    app = Recorder()
    async with talking(app, sized(head_bytes=4096, headers=32)) as client:
        with suppress(trio.BrokenResourceError):
            await client.send(sent)
        assert (await client.answer()).status == status
        await client.ended()
    assert app.begun == []


async def test_what_is_just_not_too_large_is_taken():
    async with talking(Recorder(), sized(headers=32)) as client:
        await client.send(get(b"/" + b"a" * 8191, headers=b"A: b\r\n" * 31))
        assert (await client.answer()).status == 200


async def test_a_head_that_does_not_end_in_time_is_408(patient_clock):
    app = Recorder()
    async with talking(app, sized(head_seconds=2.0)) as client:
        for sent in (HELLO, None):
            if sent:
                await client.send(sent)
                assert (await client.answer()).status == 200
            began = trio.current_time()
            await client.send(b"GET / HTTP/1.1\r\n")
            if sent:
                await trio.sleep(1)
                await client.send(b"Host: x\r\n\r\n")
                assert (await client.answer()).status == 200
        answer = await client.answer()
        assert (answer.status, answer.headers[b"connection"]) == (408, b"close")
        assert 2 <= trio.current_time() - began <= 3
        await client.ended()


async def test_a_head_that_comes_byte_by_byte_has_no_more_time(patient_clock):
    async with talking(Recorder(), sized(head_seconds=2.0)) as client:
        began = trio.current_time()
        with suppress(trio.BrokenResourceError):
            for _ in range(100):
                await client.send(b"A")
                await trio.sleep(0.1)
        assert (await client.answer()).status in (400, 408)
        assert trio.current_time() - began < 12
    async with talking(Recorder(), sized(head_seconds=2.0)) as client:
        began = trio.current_time()
        await client.send(b"GET / HTTP/1.1\r\nA: ")
        while trio.current_time() - began < 10:
            with suppress(trio.BrokenResourceError), trio.move_on_after(0.25):
                await client.send(b"b")
                if b"408" in await client.stream.receive_some(4096):
                    break
        assert 2 <= trio.current_time() - began <= 3.5


async def test_a_connection_that_says_nothing_is_closed(patient_clock):
    async with talking(Recorder(), sized(head_seconds=2.0, idle_seconds=50.0)) as client:
        began = trio.current_time()
        await client.ended()
        assert 2 <= trio.current_time() - began <= 3


async def test_of_too_many_that_say_nothing_those_end_that_had_time_to(patient_clock):
    limits = sized(head_seconds=30.0, silent=2)
    async with (
        serving(Recorder(), limits) as served,
        served.connect() as first,
        served.connect() as second,
        served.connect() as spoke,
    ):
        await spoke.send(HELLO)
        assert (await spoke.answer()).status == 200
        await trio.sleep(5)
        assert served.engine.connections == 3, "two that say nothing are not too many"
        async with served.connect() as third:
            began = trio.current_time()
            await first.ended()
            assert trio.current_time() - began <= 1
            await trio.sleep(5)
            assert served.engine.connections == 3
            for client in (second, third, spoke):
                await client.send(HELLO)
                assert (await client.answer()).status == 200


async def test_an_idle_connection_is_closed_after_its_time(patient_clock):
    async with talking(Recorder(), sized(head_seconds=1.0, idle_seconds=3.0)) as client:
        for _ in range(3):
            await trio.sleep(0.9)
            await client.send(HELLO)
            assert (await client.answer()).status == 200
        began = trio.current_time()
        await client.ended()
        assert 3 <= trio.current_time() - began <= 4


async def test_empty_lines_between_requests_keep_no_connection_and_no_others_behind_it(
    patient_clock,
):
    limits = sized(idle_seconds=3.0)
    async with (
        serving(Recorder(), limits) as served,
        served.connect() as noisy,
        served.connect() as quiet,
    ):
        for client in (noisy, quiet):
            await client.send(HELLO)
            assert (await client.answer()).status == 200
        for _ in range(8):
            with suppress(trio.BrokenResourceError):
                await noisy.send(b"\r\n")
            await trio.sleep(0.5)
        assert served.engine.connections == 0
        await quiet.ended()


async def test_a_body_and_an_answer_have_no_time_of_the_engines(patient_clock):
    """They are the application's."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(10)
        await Recorder()(scope, receive, send)

    async with talking(app, sized(head_seconds=1.0, idle_seconds=1.0)) as client:
        request = post(b"/p", b"hello")
        await client.send(request[:-1])
        await trio.sleep(10)
        await client.send(request[-1:])
        with trio.fail_after(30):
            await client.stream.wait_send_all_might_not_block()
            await trio.sleep(11)
        assert (await client.answer()).body == b"POST /p hello"


# Connections


async def hold(scope: Any, receive: Any, send: Any) -> None:
    """Answers, and goes on until the peer leaves; `/once` it just answers."""
    await receive()
    if scope["path"] == "/once":
        await respond(send)
        return
    await send(START)
    await send(PART)
    await receive()


async def test_the_longest_idle_connection_makes_room():
    limits = sized(connections=2)
    async with (
        serving(Recorder(), limits) as served,
        served.connect() as first,
        served.connect() as second,
    ):
        for client in (second, first):  # so that the second is idle longest
            await client.send(HELLO)
            assert (await client.answer()).status == 200
        async with served.connect() as third:
            await third.send(HELLO)
            assert (await third.answer()).status == 200
            await second.ended()
            await first.send(HELLO)
            assert (await first.answer()).status == 200
            assert served.engine.connections == 2


async def test_who_has_not_said_anything_yet_makes_room_after_the_idle_ones():
    limits = sized(connections=2)
    async with (
        serving(hold, limits) as served,
        served.connect() as silent,
        served.connect() as idle,
    ):
        await idle.send(get(b"/once"))
        assert (await idle.answer()).status == 200
        async with served.connect() as third, served.connect() as fourth:
            for busy, leaves in ((third, idle), (fourth, silent)):
                await busy.send(HELLO)
                await busy.read(b"hello\r\n")
                await leaves.ended()


async def test_who_had_time_to_speak_and_did_not_makes_room_before_the_idle_ones(patient_clock):
    limits = sized(connections=2)
    async with (
        serving(Recorder(), limits) as served,
        served.connect() as idle,
        served.connect() as silent,
    ):
        await idle.send(HELLO)
        assert (await idle.answer()).status == 200
        await trio.sleep(2)
        async with served.connect() as third:
            await third.send(HELLO)
            assert (await third.answer()).status == 200
            await silent.ended()
            await idle.send(HELLO)
            assert (await idle.answer()).status == 200


async def test_a_full_engine_says_so_and_lets_nobody_go_who_is_served():
    limits = sized(connections=2)
    async with (
        serving(hold, limits) as served,
        served.connect() as first,
        served.connect() as second,
    ):
        for client in (first, second):
            await client.send(HELLO)
            await client.read(b"hello\r\n")
        async with served.connect() as third:
            await third.send(HELLO)
            answer = await third.answer()
            assert (answer.status, answer.headers[b"connection"]) == (503, b"close")
            assert int(answer.headers[b"retry-after"]) >= 1
            await third.ended()
        assert served.engine.connections == 2
        first.reset()
        while served.engine.connections == 2:
            await trio.sleep(0.01)
        async with served.connect() as fourth:
            await fourth.send(HELLO)
            assert await fourth.read(b"hello\r\n")


async def test_connections_are_counted_down_however_they_end():
    async with serving(Recorder()) as served:
        for sent in (b"", b"GET", HELLO, post(b"/p", b"hello")[:-2], b"junk\r\n\r\n"):
            for end in ("close", "reset", "eof"):
                async with served.connect() as client:
                    await client.send(sent)
                    if end == "eof":
                        await client.stream.send_eof()
                        await trio.sleep(0.01)
                    elif end == "reset":
                        client.reset()
        with trio.fail_after(5):
            while served.engine.connections:
                await trio.sleep(0.01)
        assert served.engine.idle == served.engine.waiting_for_head == {}


async def test_a_connection_that_has_ended_needs_no_collector():
    """A worker has turned it off, nearly."""

    async def forgets(scope: Any, receive: Any, send: Any) -> None:
        await Recorder()(scope, receive, send)

    async with serving(forgets) as served:
        gc.collect()
        gc.disable()
        try:
            for sent in (b"", b"GET", HELLO, post(b"/p", b"hello")[:-2], b"junk\r\n\r\n"):
                async with served.connect() as client:
                    await client.send(sent)
                    await trio.testing.wait_all_tasks_blocked(0.005)
            await trio.testing.wait_all_tasks_blocked(0.02)
            left = [type(thing) for thing in gc.get_objects() if isinstance(thing, OURS)]
        finally:
            gc.enable()
    assert left == []


# Draining


async def test_while_draining_answers_end_their_connections():
    async with serving(Recorder()) as served, served.connect() as client:
        await client.send(HELLO)
        assert b"connection" not in (await client.answer()).headers
        served.engine.draining = True
        await client.send(HELLO)
        assert (await client.answer()).headers[b"connection"] == b"close"
        await client.ended()


async def test_idle_connections_end_when_draining_does_and_those_in_use_do_not():
    async with (
        serving(hold) as served,
        served.connect() as busy,
        served.connect() as silent,
    ):
        await busy.send(HELLO)
        await busy.read(b"hello\r\n")
        served.engine.close_idle()
        await silent.ended()
        with trio.move_on_after(0.05) as nothing:
            await busy.stream.receive_some(1)
        assert nothing.cancelled_caught
