"""Request smuggling: bytes that we and a proxy before us might take for different requests.

Each attack hides a request for `/smuggled` behind what is wrong. It is refused, what it hides is
not executed, and its connection ends, so that no later byte can be taken for a request either:
in one piece, and byte by byte. The sections are RFC 9112's unless they say otherwise.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import pytest
import trio

from server.engine.http1 import Limits
from tests.support.raw_http import Recorder, Seen, Served, respond, serving

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
GET = b"GET /attack HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /attack HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Attack(NamedTuple):
    section: str
    sent: bytes
    status: int = 400


def length(value: bytes) -> bytes:
    return POST + b"Content-Length: " + value + b"\r\n\r\nhello" + HIDDEN


def coding(line: bytes) -> bytes:
    return POST + line + b"\r\n\r\n0\r\n\r\n" + HIDDEN


def line(head: bytes) -> bytes:
    """A head with one odd line."""
    return b"GET /attack HTTP/1.1\r\n" + head + b"\r\nHost: x\r\n\r\n" + HIDDEN


def chunks(body: bytes) -> bytes:
    return CHUNKED + body + HIDDEN


def target(raw: bytes) -> bytes:
    return b"GET " + raw + b" HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN


ATTACKS = {
    # Two ways to say where a body ends
    "a length and chunks": Attack(
        "6.3", POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN
    ),
    "chunks and a length": Attack(
        "6.3", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN
    ),
    "a length and chunks in a GET": Attack(
        "6.3", GET + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN
    ),
    "two lengths": Attack("6.3", length(b"5\r\nContent-Length: 40")),
    "the same length twice": Attack("6.3", length(b"5\r\nContent-Length: 5")),
    "a list of two lengths": Attack("6.3", length(b"5, 40")),
    "a list of the same length": Attack("6.3", length(b"5, 5")),
    # Lengths that are none
    "a length with a plus": Attack("6.2", length(b"+5")),
    "a length with a minus": Attack("6.2", length(b"-5")),
    "a length of minus zero": Attack("6.2", length(b"-0")),
    "a hexadecimal length": Attack("6.2", length(b"0x5")),
    "a length with a fraction": Attack("6.2", length(b"5.0")),
    "a length with an exponent": Attack("6.2", length(b"5e0")),
    "a length with an underscore": Attack("6.2", length(b"1_0")),
    "a length with a space in it": Attack("6.2", length(b"5 5")),
    "a length with a tab in it": Attack("6.2", length(b"5\t5")),
    "a length in other digits": Attack("6.2", length("٥".encode())),
    "a length over 64 bits": Attack("6.2", length(b"18446744073709551621")),
    "an endless length": Attack("6.2", length(b"9" * 400)),
    "an empty length": Attack("6.2", length(b"")),
    "a length with a NUL": Attack("6.2", length(b"5\0")),
    "a length with a form feed": Attack("6.2", length(b"\x0c5")),
    # Transfer codings
    "chunked twice": Attack("6.1", coding(b"Transfer-Encoding: chunked, chunked")),
    "two transfer codings": Attack(
        "6.1", coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")
    ),
    "chunked and identity": Attack(
        "6.1", coding(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity")
    ),
    "identity and chunked": Attack(
        "6.1", coding(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked")
    ),
    "a coding before chunked": Attack("6.1", coding(b"Transfer-Encoding: gzip, chunked")),
    "a coding after chunked": Attack("6.1", coding(b"Transfer-Encoding: chunked, gzip")),
    "another coding": Attack("6.1", coding(b"Transfer-Encoding: gzip")),
    "identity": Attack("6.1", coding(b"Transfer-Encoding: identity")),
    "a coding that ends as chunked does": Attack("6.1", coding(b"Transfer-Encoding: xchunked")),
    "a coding that begins as chunked does": Attack("6.1", coding(b"Transfer-Encoding: chunkedx")),
    "chunked in quotes": Attack("6.1", coding(b'Transfer-Encoding: "chunked"')),
    "chunked with a parameter": Attack("6.1", coding(b"Transfer-Encoding: chunked;q=1")),
    "chunked after a comma": Attack("6.1", coding(b"Transfer-Encoding: ,chunked")),
    "chunked before a comma": Attack("6.1", coding(b"Transfer-Encoding: chunked,")),
    "chunked after a vertical tab": Attack("6.1", coding(b"Transfer-Encoding: \x0bchunked")),
    "chunked before a vertical tab": Attack("6.1", coding(b"Transfer-Encoding: chunked\x0b")),
    "chunked before a NUL": Attack("6.1", coding(b"Transfer-Encoding: chunked\0")),
    "chunked before a no-break space": Attack("6.1", coding(b"Transfer-Encoding: chunked\xa0")),
    "an empty coding": Attack("6.1", coding(b"Transfer-Encoding:")),
    "an empty coding and a length": Attack(
        "6.1", POST + b"Transfer-Encoding:\r\nContent-Length: 5\r\n\r\nhello" + HIDDEN
    ),
    "chunks in HTTP/1.0": Attack(
        "6.1",
        b"POST /attack HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" + HIDDEN,
    ),
    # Line ends
    "bare LF after the request line": Attack(
        "2.2", b"GET /attack HTTP/1.1\nHost: x\r\n\r\n" + HIDDEN
    ),
    "bare LF after a header": Attack("2.2", b"GET /attack HTTP/1.1\r\nHost: x\n\r\n" + HIDDEN),
    "bare LF between two headers": Attack("2.2", line(b"A: b\nContent-Length: 40")),
    "bare LF at the end of the head": Attack("2.2", GET + b"\n" + HIDDEN),
    "two bare LFs": Attack("2.2", b"GET /attack HTTP/1.1\r\nHost: x\n\n" + HIDDEN),
    "bare CR in a value": Attack("2.2", line(b"A: b\rContent-Length: 40")),
    "bare CR after a value": Attack("2.2", line(b"A: b\r\r")),
    "bare CR in a name": Attack("2.2", line(b"A\rB: b")),
    "bare CR as the line end": Attack("2.2", b"GET /attack HTTP/1.1\rHost: x\r\r" + HIDDEN),
    "a folded line": Attack("5.2", line(b"A: b\r\n c")),
    "a folded line by a tab": Attack("5.2", line(b"A: b\r\n\tc")),
    "a folded transfer coding": Attack("5.2", coding(b"Transfer-Encoding:\r\n chunked")),
    "a folded length": Attack("5.2", length(b"5\r\n 0")),
    "a first line that is folded": Attack("2.2", line(b" A: b")),
    # Names and values
    "a space before the colon": Attack("5.1", line(b"Content-Length : 40")),
    "a tab before the colon": Attack("5.1", line(b"Content-Length\t: 40")),
    "a space before the colon of a coding": Attack("5.1", coding(b"Transfer-Encoding : chunked")),
    "a space in a name": Attack("5.1", line(b"A B: c")),
    "a NUL in a name": Attack("5.1", line(b"A\0B: c")),
    "a NUL after a name": Attack("5.1", line(b"Content-Length\0: 40")),
    "an empty name": Attack("5.1", line(b": c")),
    "a line without a colon": Attack("5.1", line(b"Content-Length 40")),
    "a name in parentheses": Attack("5.1", line(b"(A): b")),
    "a name that is not ASCII": Attack("5.1", line("Å: b".encode())),
    "a NUL in a value": Attack("5.5 of RFC 9110", line(b"A: b\0c")),
    "a control character in a value": Attack("5.5 of RFC 9110", line(b"A: b\x01c")),
    "DEL in a value": Attack("5.5 of RFC 9110", line(b"A: b\x7fc")),
    # Chunks
    "a chunk size with a minus": Attack("7.1", chunks(b"-1\r\na\r\n0\r\n\r\n")),
    "a chunk size with a plus": Attack("7.1", chunks(b"+1\r\na\r\n0\r\n\r\n")),
    "a chunk size with 0x": Attack("7.1", chunks(b"0x1\r\na\r\n0\r\n\r\n")),
    "a chunk size with an underscore": Attack("7.1", chunks(b"1_0\r\na\r\n0\r\n\r\n")),
    "a chunk size that is no number": Attack("7.1", chunks(b"g\r\na\r\n0\r\n\r\n")),
    "an empty chunk size": Attack("7.1", chunks(b"\r\n0\r\n\r\n")),
    "a chunk size after a space": Attack("7.1", chunks(b" 1\r\na\r\n0\r\n\r\n")),
    "a chunk size before a space": Attack("7.1", chunks(b"1 \r\na\r\n0\r\n\r\n")),
    "a chunk size over 64 bits": Attack("7.1", chunks(b"10000000000000001\r\na\r\n0\r\n\r\n")),
    "a chunk size of a hundred digits": Attack("7.1", chunks(b"f" * 100 + b"\r\na\r\n")),
    "a chunk that is longer than its size": Attack("7.1", chunks(b"1\r\nab\r\n0\r\n\r\n")),
    "a chunk without CRLF after it": Attack("7.1", chunks(b"1\r\na0\r\n\r\n")),
    "a chunk with LF after it": Attack("7.1", chunks(b"1\r\na\n0\r\n\r\n")),
    "a chunk with CR after it": Attack("7.1", chunks(b"1\r\na\r0\r\n\r\n")),
    "a chunk size with LF": Attack("7.1", chunks(b"1\na\r\n0\r\n\r\n")),
    "a chunk size with CR": Attack("7.1", chunks(b"1\ra\r\n0\r\n\r\n")),
    "a last chunk with LF": Attack("7.1", chunks(b"0\n\r\n")),
    "a last chunk with LFs": Attack("7.1", chunks(b"0\r\n\n")),
    "a chunk extension with LF": Attack("7.1.1", chunks(b"1;a\nb\r\na\r\n0\r\n\r\n")),
    "a chunk extension with CR": Attack("7.1.1", chunks(b"1;a\rb\r\na\r\n0\r\n\r\n")),
    "a chunk extension with a NUL": Attack("7.1.1", chunks(b"1;a\0\r\na\r\n0\r\n\r\n")),
    "a huge chunk extension": Attack("7.1.1", chunks(b"1;" + b"a" * 200_000)),
    "very many chunk extensions": Attack("7.1.1", chunks(b"1;aaaaaaaaaaaaaaaa\r\na\r\n" * 20_000)),
    "a trailer with LF": Attack("7.1.2", chunks(b"0\r\nA: b\n\r\n")),
    "a trailer with a space in its name": Attack("7.1.2", chunks(b"0\r\nA B: c\r\n\r\n")),
    "a folded trailer": Attack("7.1.2", chunks(b"0\r\nA: b\r\n c\r\n\r\n")),
    "a length in the trailers": Attack("6.5.1", chunks(b"0\r\nContent-Length: 40\r\n\r\n")),
    "a coding in the trailers": Attack("6.5.1", chunks(b"0\r\nTransfer-Encoding: chunked\r\n\r\n")),
    # Versions
    "HTTP/0.9": Attack("2.3", b"GET /attack\r\n" + HIDDEN),
    "HTTP/0.9, and it says so": Attack("2.3", b"GET /attack HTTP/0.9\r\n\r\n" + HIDDEN, 505),
    "HTTP/2.0 in words": Attack("2.3", b"GET /attack HTTP/2.0\r\nHost: x\r\n\r\n" + HIDDEN, 505),
    "HTTP/1.2": Attack("2.3", b"GET /attack HTTP/1.2\r\nHost: x\r\n\r\n" + HIDDEN),
    "HTTP/3.0": Attack("2.3", b"GET /attack HTTP/3.0\r\nHost: x\r\n\r\n" + HIDDEN),
    "HTTP/1": Attack("2.3", b"GET /attack HTTP/1\r\nHost: x\r\n\r\n" + HIDDEN),
    "HTTP/1.10": Attack("2.3", b"GET /attack HTTP/1.10\r\nHost: x\r\n\r\n" + HIDDEN),
    "HTTP/01.1": Attack("2.3", b"GET /attack HTTP/01.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "http/1.1": Attack("2.3", b"GET /attack http/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "another protocol": Attack("2.3", b"GET /attack FTP/1.0\r\nHost: x\r\n\r\n" + HIDDEN),
    # Host
    "no host": Attack("3.2", b"GET /attack HTTP/1.1\r\n\r\n" + HIDDEN),
    "two hosts": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + HIDDEN),
    "the same host twice": Attack("3.2", GET + b"Host: x\r\n\r\n" + HIDDEN),
    "a host with a path": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: x/y\r\n\r\n" + HIDDEN),
    "a host with a user": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: a@x\r\n\r\n" + HIDDEN),
    "a host with a space": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: x y\r\n\r\n" + HIDDEN),
    "two hosts in one": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: x, y\r\n\r\n" + HIDDEN),
    "a host with a query": Attack("3.2", b"GET /attack HTTP/1.1\r\nHost: x?y\r\n\r\n" + HIDDEN),
    "a host that is not ASCII": Attack(
        "3.2", "GET /attack HTTP/1.1\r\nHost: ö\r\n\r\n".encode() + HIDDEN
    ),
    # Targets
    "a space in the target": Attack("3", target(b"/attack /smuggled")),
    "a version in the target": Attack("3", target(b"/attack HTTP/1.1")),
    "a tab in the target": Attack("3", target(b"/attack\t/smuggled")),
    "a tab after the method": Attack("3", b"GET\t/attack HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "a space after the version": Attack("3", b"GET /attack HTTP/1.1 \r\nHost: x\r\n\r\n" + HIDDEN),
    "a NUL in the target": Attack("3", target(b"/attack\0")),
    "a bare CR in the target": Attack("3", target(b"/attack\r/")),
    "a target that is not ASCII": Attack("3.2", target("/ättack".encode())),
    "DEL in the target": Attack("3.2", target(b"/attack\x7f")),
    "a fragment in the target": Attack("3.2", target(b"/attack#a")),
    "a target without a slash": Attack("3.2", target(b"attack")),
    "a backslash for a slash": Attack("3.2", target(b"\\attack")),
    "an asterisk for a GET": Attack("3.2.4", target(b"*")),
    "an authority for a GET": Attack("3.2.3", target(b"x:80")),
    "an absolute target of another scheme": Attack("3.2.2", target(b"ftp://x/attack")),
    "an absolute target without a host": Attack("3.2.2", target(b"http:///attack")),
    "an absolute target with a user": Attack("3.2.2", target(b"http://a@x/attack")),
    "an empty method": Attack("3.1", b" /attack HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "a method with a colon": Attack("3.1", b"GET: /attack HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
    "a method in lower case": Attack("3.1", b"get /attack HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN),
}

PIECES: dict[str, Callable[[bytes], list[bytes]]] = {
    "in one piece": lambda sent: [sent],
    # A body that is never read byte by byte would take a long time, and say nothing new.
    "byte by byte": lambda sent: (
        [sent[i : i + 1] for i in range(min(len(sent), 1000))] + [sent[1000:]]
    ),
}


async def attack(served: Served, sent: list[bytes]) -> int:
    """What the attack was answered with; the connection has ended behind the answer."""
    async with served.connect() as client:
        with suppress(trio.BrokenResourceError):  # the answer came before the end
            await client.send(*sent)
        answer = await client.answer()
        await client.ended()
    assert answer.headers[b"connection"] == b"close"
    return answer.status


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", ATTACKS)
async def test_what_is_ambiguous_is_refused_and_hides_nothing(name: str, pieces: str):
    _, sent, status = ATTACKS[name]
    app = Recorder()
    async with serving(app) as served:
        got = await attack(served, PIECES[pieces](sent))
    expected = {status, 400, 501} if "method" in name else {status}
    assert got in expected
    assert "/smuggled" not in app.begun
    assert app.seen == [], "nor is the attack itself executed"


@pytest.mark.parametrize("name", ATTACKS)
async def test_what_came_before_an_attack_is_answered_before_it(name: str):
    """On one connection, in one write: an answer of ours must not be taken for another's."""
    _, sent, _ = ATTACKS[name]
    app = Recorder()
    async with serving(app) as served, served.connect() as client:
        with suppress(trio.BrokenResourceError):
            await client.send(b"GET /honest HTTP/1.1\r\nHost: x\r\n\r\n" + sent)
        assert (await client.answer()).body == b"GET /honest "
        assert (await client.answer()).status >= 400
        await client.ended()
    assert app.seen == [Seen("GET", "/honest", b"")]
    assert "/smuggled" not in app.begun


# What looks odd, and has one meaning only

GOOD = {
    "chunk extensions (7.1.1)": (
        CHUNKED + b'2;a\r\nhe\r\n3;a=b;c="d;e"\r\nllo\r\n0;f\r\n\r\n',
        b"hello",
    ),
    "trailers, which count for nothing (7.1.2)": (
        CHUNKED + b"5\r\nhello\r\n0\r\nA: b\r\nHost: y\r\n\r\n",
        b"hello",
    ),
    "zeros before a chunk size (7.1)": (CHUNKED + b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    "a chunk size in capitals (7.1)": (CHUNKED + b"A\r\nhellohello\r\n0\r\n\r\n", b"hellohello"),
    "another spelling of chunked (7)": (
        POST + b"tRANSFER-eNCODING:  Chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"hello",
    ),
    "spaces around a length (5.1)": (POST + b"Content-Length: \t 5 \r\n\r\nhello", b"hello"),
    "zeros before a length (6.2)": (POST + b"Content-Length: 0005\r\n\r\nhello", b"hello"),
    "no space after the colon (5.1)": (
        b"POST /attack HTTP/1.1\r\nHost:x\r\nContent-Length:5\r\n\r\nhello",
        b"hello",
    ),
    "empty lines before the request (2.2)": (
        b"\r\n\r\n" + POST + b"Content-Length: 5\r\n\r\nhello",
        b"hello",
    ),
    "bytes over ASCII in a value (5.5 of RFC 9110)": (
        POST + b"A: \xe4\xff\r\nContent-Length: 5\r\n\r\nhello",
        b"hello",
    ),
    "a request in a body (6.2)": (
        POST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        HIDDEN,
    ),
    "a request in a chunk (7.1)": (
        CHUNKED + b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
        HIDDEN,
    ),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", GOOD)
async def test_what_has_one_meaning_is_read_so_and_the_next_request_after_it(
    name: str, pieces: str
):
    sent, body = GOOD[name]
    app = Recorder()
    async with serving(app) as served, served.connect() as client:
        await client.send(*PIECES[pieces](sent))
        assert (await client.answer()).body == b"POST /attack " + body
        await client.send(b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer()).body == b"GET /next "
    assert [seen.path for seen in app.seen] == ["/attack", "/next"]


async def test_a_trailer_reaches_no_header():
    app = Recorder()
    async with serving(app) as served:
        sent = CHUNKED + b"0\r\nAuthorization: Bearer x\r\nHost: y\r\n\r\n"
        assert (await served.ask(sent)).status == 200
    assert app.scopes[0]["headers"] == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(
    "end",
    [b"A: " + b"b" * 200_000, b"A: b\r\n" * 20_000],
    ids=["one line", "very many"],
)
async def test_trailers_without_an_end_are_refused(end: bytes):
    app = Recorder()
    async with serving(app) as served:
        status = await attack(served, [CHUNKED + b"0\r\n", end])
    assert status in (400, 431)
    assert app.seen == []


async def test_a_body_that_ends_the_connection_hides_nothing():
    """An answer before the body has come: where that body ends, nobody may know (6.3)."""

    async def answers_at_once(scope: object, receive: object, send: object) -> None:
        seen.append(scope["path"])  # type: ignore[index]
        await respond(send, b"no")

    seen: list[str] = []
    async with serving(answers_at_once) as served, served.connect() as client:
        await client.send(POST + b"Content-Length: 1000\r\n\r\n")
        assert (await client.answer()).headers[b"connection"] == b"close"
        await client.send(HIDDEN)
        await client.ended()
    assert seen == ["/attack"]


async def test_what_follows_connection_close_is_no_request():
    """9.6: not parsed, not answered, and it does not spoil the answer before it."""
    app = Recorder()
    for after in (HIDDEN, b"\xff" * 100):
        async with serving(app, Limits(connections=10)) as served, served.connect() as client:
            await client.send(GET + b"Connection: close\r\n\r\n" + after)
            assert (await client.answer()).status == 200
            await client.ended()
    assert [seen.path for seen in app.seen] == ["/attack", "/attack"]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["a length", "chunks"],
)
async def test_an_upgrade_that_we_do_not_speak_hides_nothing_behind_its_body(
    pieces: str, body: bytes
):
    """7.8 of RFC 9110: ignored, with its body read. Who believes in it sends no HTTP after it."""
    app = Recorder()
    sent = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    async with serving(app) as served, served.connect() as client:
        await client.send(*PIECES[pieces](sent + body + HIDDEN))
        answer = await client.answer()
        assert answer.body == b"POST /attack hello"
        assert answer.headers[b"connection"] == b"close"
        await client.ended()
    assert app.seen == [Seen("POST", "/attack", b"hello")]
