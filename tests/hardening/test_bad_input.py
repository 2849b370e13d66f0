"""Bad input over real HTTP: one named attack a test. Each gets a clear problem that repeats none
of it, and neither stores nor publishes anything."""

import contextlib
import json
import re
import select
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support.chat import Chat, Events, Pair, eventually
from tests.support.wire import WIRE

CANARY = "cAnArY7f3e9"
"""In every bad input, and in no answer."""
MAX_CHARACTERS = 8000
MAX_BODY = 128 * 1024

SEND = "/api/chat/send"
MESSAGING = "/api/chat/messaging"


class Target(NamedTuple):
    """A channel whose stream is open while it is attacked."""

    chat: Chat
    pair: Pair
    events: Events

    def post(
        self, body: bytes, path: str = SEND, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        fields = {"content-type": "application/json", **(headers or {})}
        return self.chat.post(path, self.pair.prospect, body, fields)

    def body(self, **fields: Any) -> bytes:
        whole = {"channelId": self.pair.channel_id, "content": CANARY, **fields}
        return json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()

    def send(self, **fields: Any) -> httpx.Response:
        return self.post(self.body(**fields))

    def act(self, action: str, **fields: Any) -> httpx.Response:
        return self.post(
            json.dumps({"action": action, **fields}).encode(),
            MESSAGING,
        )


@pytest.fixture(scope="module")
def attacked(chat: Chat) -> Iterator[Target]:
    pair = chat.pair()
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        yield Target(chat, pair, events)


@pytest.fixture
def target(attacked: Target) -> Iterator[Target]:
    """Holds every test of this file to its promise: nothing stored, nothing published."""
    chat, pair, events = attacked
    before = chat.stored(pair.channel_id)
    yield attacked
    assert chat.stored(pair.channel_id) == before
    sent = chat.send(pair.prospect, pair.channel_id, "the next")
    assert sent["seq"] == before + 1
    published = []
    while sent["messageId"] not in published:
        published.append(events.message()["id"])
    assert published == [sent["messageId"]], "something else was published"
    assert chat.process.poll() is None


def assert_refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.json().get("code")) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    everything = response.text + repr(response.headers)
    assert CANARY.lower() not in everything.lower()
    body: dict[str, Any] = response.json()
    return body


# JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"}",
        b"cAnArY7f3e9",
        b'{"content":"cAnArY7f3e9"',
        b'{"content":"cAnArY7f3e9",}',
        b"{'content':'cAnArY7f3e9'}",
        b'{"channelId":1,"content":"cAnArY7f3e9"} {}',
        b'{"channelId":1,"content":"cAnArY7f3e9"}x',
        b'{"channelId":1x,"content":"cAnArY7f3e9"}',
        b'{"channelId":NaN,"content":"cAnArY7f3e9"}',
        b'{"channelId":01,"content":"cAnArY7f3e9"}',
        b'{"channelId":1,"content":"cAnArY7f3e9\n"}',
        b'{"channelId":1,"content":"\\x cAnArY7f3e9"}',
        b'\xef\xbb\xbf{"channelId":1,"content":"cAnArY7f3e9"}',
        b"--cAnArY7f3e9\r\nContent-Disposition: form-data",
    ],
)
@pytest.mark.parametrize("path", [SEND, MESSAGING])
def test_malformed_json(target: Target, path: str, body: bytes):
    """Some of it is noticed only behind a field that is wrong already."""
    response = target.post(body, path)
    assert response.json()["code"] in ("INVALID_JSON", "INVALID_BODY")
    assert_refused(response, 400, response.json()["code"])


@pytest.mark.parametrize("path", [SEND, MESSAGING])
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"content":[', b'{"cAnArY7f3e9":['])
def test_json_nested_a_hundred_thousand_deep(target: Target, path: str, opening: bytes):
    depth = min(100_000, (MAX_BODY - 1) // len(opening))
    response = target.post(opening * depth, path)
    assert response.status_code == 400
    assert_refused(response, 400, response.json()["code"])


@pytest.mark.parametrize("body", [b"[]", b"null", b'"cAnArY7f3e9"', b"1", b"true", b"{}"])
@pytest.mark.parametrize("path", [SEND, MESSAGING])
def test_json_of_another_shape(target: Target, path: str, body: bytes):
    assert_refused(target.post(body, path), 400, "INVALID_BODY")


def test_utf_16(target: Target):
    response = target.post(target.body().decode().encode("utf-16"))
    assert_refused(response, 400, "INVALID_JSON")


@pytest.mark.parametrize(
    "junk", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"]
)
@pytest.mark.parametrize("path", [SEND, MESSAGING])
def test_invalid_utf_8(target: Target, path: str, junk: bytes):
    body = target.body(content=f"{CANARY}HERE", action="send_message" if path == MESSAGING else ...)
    assert_refused(target.post(body.replace(b"HERE", junk), path), 400, "INVALID_JSON")


# Types and fields

NO_IDS = [
    "42",
    "",
    42.0,
    42.5,
    True,
    False,
    None,
    [42],
    {"id": 42},
    0,
    -1,
    -(2**63),
    2**63,
    2**64,
    10**30,
    1e400,
]


@pytest.mark.parametrize("value", NO_IDS, ids=repr)
def test_a_channel_id_that_is_none(target: Target, value: object):
    """`"42"` is no 42, and neither is 42.5."""
    value = str(target.pair.channel_id) if value == "42" else value
    response = target.post(target.body(channelId=value).replace(b"Infinity", b"1e400"))
    problem = assert_refused(response, 400, "INVALID_BODY")
    assert problem["detail"] == "The field `channelId` is missing, or not of its type or range."


@pytest.mark.parametrize("value", NO_IDS, ids=repr)
@pytest.mark.parametrize(
    ("action", "field"),
    [
        ("get_messages", "channelId"),
        ("get_messages", "maxResults"),
        ("mark_read", "channelId"),
        ("create_channel", "therapistId"),
        ("create_channel", "prospectUserId"),
    ],
)
def test_a_number_in_an_action_that_is_none(target: Target, action: str, field: str, value: object):
    whole: dict[str, Any] = {
        "get_messages": {"channelId": target.pair.channel_id},
        "mark_read": {},
        "create_channel": {"therapistId": 2**62, "prospectUserId": 2**62},
    }[action]
    body = json.dumps({"action": action, **whole, field: value}).replace("Infinity", "1e400")
    response = target.post(body.encode(), MESSAGING)
    problem = assert_refused(response, 400, "INVALID_BODY")
    assert f"`{field}`" in problem["detail"]


@pytest.mark.parametrize("value", [1, True, None, ["cAnArY7f3e9"], {"cAnArY7f3e9": 1}], ids=repr)
def test_content_that_is_no_text(target: Target, value: object):
    problem = assert_refused(target.send(content=value), 400, "INVALID_BODY")
    assert "`content`" in problem["detail"]


@pytest.mark.parametrize("value", [201, 10**9])
def test_more_results_than_a_page_holds(target: Target, value: int):
    response = target.act("get_messages", channelId=target.pair.channel_id, maxResults=value)
    problem = assert_refused(response, 400, "INVALID_BODY")
    assert "`maxResults`" in problem["detail"]


@pytest.mark.parametrize("value", [CANARY, "", 0, -1, 2**63, True, 1.5, ["x"], "1"], ids=repr)
def test_a_last_message_id_that_is_neither_id_nor_uuid(target: Target, value: object):
    response = target.act("get_messages", channelId=target.pair.channel_id, lastMessageId=value)
    assert_refused(response, 400, "INVALID_BODY")


@pytest.mark.parametrize(
    "value", [CANARY, "", 7, "7b2f1f0e", ["7b2f1f0e-4b1e-4c62-8a62-5e6b8f0a1a11"]]
)
def test_a_client_message_id_that_is_no_uuid(target: Target, value: object):
    problem = assert_refused(target.send(clientMessageId=value), 400, "INVALID_BODY")
    assert "`clientMessageId`" in problem["detail"]


@pytest.mark.parametrize("key", [CANARY, "", '"', "7b2f1f0e", f"{uuid.uuid4()}, {uuid.uuid4()}"])
def test_an_idempotency_key_that_is_no_uuid(target: Target, key: str):
    response = target.post(target.body(), headers={"idempotency-key": key})
    assert_refused(response, 400, "INVALID_BODY")


@pytest.mark.parametrize("value", [CANARY, "", "standard", "SYSTEM", 1, None])
def test_a_message_type_that_is_not_known(target: Target, value: object):
    problem = assert_refused(target.send(messageType=value), 400, "INVALID_BODY")
    assert "`messageType`" in problem["detail"]


@pytest.mark.parametrize(
    "action", [CANARY, "", "SEND_MESSAGE", "delete_channel", 1, None, ["send"]]
)
def test_an_unknown_action(target: Target, action: object):
    response = target.act(action, channelId=1)  # type: ignore[arg-type]
    assert_refused(response, 400, "INVALID_BODY")


@pytest.mark.parametrize("path", [SEND, MESSAGING])
@pytest.mark.parametrize("field", [CANARY, "senderId", "authorEmail", "channel_id", "seq"])
def test_an_unknown_field(target: Target, path: str, field: str):
    action = {"action": "send_message"} if path == MESSAGING else {}
    response = target.post(target.body(**action, **{field: CANARY}), path)
    problem = assert_refused(response, 400, "INVALID_BODY")
    assert problem["detail"] == "The body has a field that is not known here."


@pytest.mark.parametrize("field", ["channelId", "content"])
def test_a_missing_field(target: Target, field: str):
    problem = assert_refused(target.send(**{field: ...}), 400, "INVALID_BODY")
    assert f"`{field}`" in problem["detail"]


def test_an_action_that_is_missing(target: Target):
    response = target.post(json.dumps({"channelId": 1}).encode(), MESSAGING)
    problem = assert_refused(response, 400, "INVALID_BODY")
    assert "`action`" in problem["detail"]


@pytest.mark.parametrize("name", ["", " \n", "x" * 201, "a\0b", 7, "cAnArY7f3e9\0"])
def test_a_channel_name_that_is_none(target: Target, name: object):
    therapist = target.pair.therapist
    response = target.chat.act(
        therapist,
        "create_channel",
        therapistId=therapist.therapist_id,
        prospectUserId=target.chat.person().user_id,
        channelName=name,
    )
    assert response.status_code == 400
    assert_refused(response, 400, response.json()["code"])


# Text


@pytest.mark.parametrize("text", ["", " ", "\n\t \r", "\u00a0\u2003\u3000", "\x1f\x85"])
def test_text_with_nothing_to_read(target: Target, text: str):
    assert_refused(target.send(content=text), 400, "EMPTY_MESSAGE")


def test_text_over_the_limit_by_one(target: Target):
    text = CANARY + "x" * (MAX_CHARACTERS + 1 - len(CANARY))
    problem = assert_refused(target.send(content=text), 400, "MESSAGE_TOO_LONG")
    assert problem["limit"] == MAX_CHARACTERS
    assert str(MAX_CHARACTERS) in problem["detail"]


def test_astral_characters_over_the_limit_by_one(target: Target):
    problem = assert_refused(
        target.send(content="💬" * (MAX_CHARACTERS + 1)), 400, "MESSAGE_TOO_LONG"
    )
    assert problem["limit"] == MAX_CHARACTERS


@pytest.mark.parametrize("character", ["x", "é", "💬", "\n"])
def test_text_exactly_at_the_limit_is_taken(chat: Chat, character: str):
    """Characters are counted, not bytes and not UTF-16's halves."""
    pair = chat.pair()
    text = character * (MAX_CHARACTERS - 1) + "."
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        assert chat.send(pair.prospect, pair.channel_id, text)["content"] == text
        assert events.message()["text"] == text


def test_text_at_the_limit_with_every_character_escaped_fits_the_body(chat: Chat):
    pair = chat.pair()
    body = b'{"channelId":%d,"content":"%b"}' % (pair.channel_id, rb"\ud83d\udcac" * MAX_CHARACTERS)
    response = chat.post(SEND, pair.prospect, body)
    assert response.status_code == 200
    assert response.json()["message"]["content"] == "💬" * MAX_CHARACTERS


def test_a_nul_in_the_text(target: Target):
    assert_refused(target.send(content=f"{CANARY}\0"), 400, "INVALID_TEXT")


@pytest.mark.parametrize("escape", [rb"\ud800", rb"\udfff", rb"\udc00\ud800", rb"\ud83dx"])
def test_a_lone_surrogate(target: Target, escape: bytes):
    body = target.body(content=f"{CANARY}HERE").replace(b"HERE", escape)
    assert_refused(target.post(body), 400, "INVALID_JSON")


@pytest.mark.parametrize(
    "text",
    [
        "\u202etxet",
        "\ufeffx",
        "\ufffe",
        "x\x01\x1b[31m",
        "data: x\n\nevent: closing",
        "\r\n\r\n",
        "\u2028x",
    ],
    ids=ascii,
)
def test_text_that_only_looks_odd_arrives_as_it_is(chat: Chat, text: str):
    text = f"[{text}]"
    pair = chat.pair()
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, text)
        assert events.message()["text"] == text


# Bodies


@contextmanager
def raw(chat: Chat) -> Iterator[socket.socket]:
    with WIRE.connect(chat.port, timeout=10) as sock:
        yield sock


def head(target: Target, *lines: str, path: str = SEND) -> bytes:
    token = target.chat.token(target.pair.prospect)
    fields = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", *lines]
    return "\r\n".join([*fields, "", ""]).encode()


def read_answer(sock: socket.socket) -> httpx.Response:
    """The first response on a raw connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = httpx.Headers([(n, v) for n, _, v in (line.partition(": ") for line in lines)])
    length = int(headers.get("content-length", 0))
    while len(body) < length:
        body += sock.recv(65536)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body[:length])


@pytest.mark.http1
def test_a_content_length_over_the_limit(target: Target):
    """Said at once: none of the body has been sent."""
    with raw(target.chat) as sock:
        sock.sendall(
            head(target, "Content-Type: application/json", f"Content-Length: {MAX_BODY + 1}")
        )
        problem = assert_refused(read_answer(sock), 413, "BODY_TOO_LARGE")
    assert problem["limit"] == MAX_BODY


def test_a_whole_body_over_the_limit(target: Target):
    response = target.send(content=CANARY + "x" * MAX_BODY)
    assert_refused(response, 413, "BODY_TOO_LARGE")


def test_a_body_exactly_at_the_limit_is_read(target: Target):
    body = target.body(content="\0")
    body += b" " * (MAX_BODY - len(body))
    assert_refused(target.post(body), 400, "INVALID_TEXT")
    assert_refused(target.post(body + b" "), 413, "BODY_TOO_LARGE")


@pytest.mark.http1
def test_fifty_megabytes_in_chunks_are_answered_early(target: Target):
    piece = b"%x\r\n%b\r\n" % (16 * 1024, CANARY.encode().ljust(16 * 1024, b" "))
    sent = 0
    with raw(target.chat) as sock:
        sock.sendall(head(target, "Content-Type: application/json", "Transfer-Encoding: chunked"))
        sock.settimeout(0.5)
        answer = None
        deadline = time.monotonic() + 20
        while answer is None and sent < 50 * 2**20 and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.sendall(piece)
                sent += len(piece)
            with contextlib.suppress(TimeoutError):  # TLS has more to say than the answer
                if select.select([sock], [], [], 0.005)[0]:
                    answer = read_answer(sock)
    assert answer is not None, sent
    assert_refused(answer, 413, "BODY_TOO_LARGE")
    assert sent < 2 * 2**20, "it was read on and on"


@pytest.mark.parametrize("signed_in", [True, False])
def test_the_answer_to_a_body_that_is_still_coming_is_not_lost(target: Target, signed_in: bool):
    """A client that writes all of it before it reads must find the answer, and no reset."""
    chat = target.chat
    person = target.pair.prospect if signed_in else None
    for _ in range(15):
        answer = chat.post(SEND, person, CANARY.encode() * 60_000)
        if signed_in:
            assert_refused(answer, 413, "BODY_TOO_LARGE")
        else:
            assert_refused(answer, 401, "UNAUTHENTICATED")


@pytest.mark.http1
@pytest.mark.parametrize("length", ["-1", "+5", "1e3", "0x10", "5, 6", "", "9" * 30, "cAnArY7f3e9"])
def test_a_content_length_that_is_no_length(target: Target, length: str):
    with raw(target.chat) as sock:
        sock.sendall(
            head(target, "Content-Type: application/json", f"Content-Length: {length}") + b"{}"
        )
        answer = read_answer(sock)
    assert answer.status_code in (400, 413)
    assert CANARY not in answer.text


@pytest.mark.http1
def test_two_content_lengths_that_differ(target: Target):
    body = target.body()
    lines = [f"Content-Length: {length}" for length in (len(body), 2)]
    with raw(target.chat) as sock:
        sock.sendall(head(target, "Content-Type: application/json", *lines) + body)
        assert read_answer(sock).status_code == 400


@pytest.mark.http1
def test_a_length_and_chunks_at_once_smuggle_nothing(target: Target):
    """RFC 9112 §6.1: whoever reads the length and whoever reads the chunks must not disagree."""
    body = target.body()
    inner = b"0\r\n\r\n" + head(
        target, "Content-Type: application/json", f"Content-Length: {len(body)}"
    )
    with raw(target.chat) as sock:
        sock.sendall(
            head(
                target,
                "Content-Type: application/json",
                f"Content-Length: {len(inner + body)}",
                "Transfer-Encoding: chunked",
            )
            + inner
            + body
        )
        answer = b""
        try:
            while more := sock.recv(65536):
                answer += more
        except ConnectionError:
            pass
    # Stock Hypercorn sometimes closes before it has written; the connection ends either way.
    assert answer.count(b"HTTP/1.1 ") <= 1, "what stood in the body was taken for a request"
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.http1
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=cAnArY7f3e9",
        "application/json, text/plain",
        "cAnArY7f3e9",
    ],
)
@pytest.mark.parametrize("path", [SEND, MESSAGING])
def test_another_content_type(target: Target, path: str, content_type: str | None):
    body = target.body()
    lines = [] if content_type is None else [f"Content-Type: {content_type}"]
    with raw(target.chat) as sock:
        sock.sendall(head(target, *lines, f"Content-Length: {len(body)}", path=path) + body)
        assert_refused(read_answer(sock), 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_under_its_other_spellings_is_taken(chat: Chat, content_type: str):
    pair = chat.pair()
    body = json.dumps({"channelId": pair.channel_id, "content": "x"}).encode()
    response = chat.post(SEND, pair.prospect, body, {"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "cAnArY7f3e9"]
)
def test_a_compressed_body(target: Target, encoding: str):
    response = target.post(target.body(), headers={"content-encoding": encoding})
    assert_refused(response, 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.http1
def test_a_body_that_does_not_come(target: Target):
    with raw(target.chat) as sock:
        sock.sendall(head(target, "Content-Type: application/json", "Content-Length: 50"))
        sock.sendall(b'{"content":"cAnArY7f3e9"')
        began = time.monotonic()
        answer = read_answer(sock)
    assert_refused(answer, 408, "REQUEST_TIMEOUT")
    assert 0.5 < time.monotonic() - began < 5


@pytest.mark.http1
def test_a_body_that_comes_a_byte_at_a_time(target: Target):
    """The limit is on the whole body, not on each of its pieces."""
    body = target.body()
    with raw(target.chat) as sock:
        sock.sendall(
            head(target, "Content-Type: application/json", f"Content-Length: {len(body) + 900}")
        )
        sock.settimeout(0.1)
        answer = b""
        for number in range(100):
            try:
                sock.sendall(body[number : number + 1] or b" ")
                answer = sock.recv(65536)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.http1
def test_a_disconnect_in_the_middle_of_a_body(target: Target):
    before = len(target.chat.log_lines("request_failed"))
    with raw(target.chat) as sock:
        body = target.body()
        sock.sendall(
            head(target, "Content-Type: application/json", f"Content-Length: {len(body) + 1}")
        )
        sock.sendall(body)
        time.sleep(0.1)
    time.sleep(0.3)
    assert len(target.chat.log_lines("request_failed")) == before


def test_a_get_with_a_body(target: Target):
    token = target.chat.token(target.pair.prospect)
    response = target.chat.client.request(
        "GET",
        "/api/chat/availability",
        content=CANARY.encode() * 100,
        headers={"authorization": f"Bearer {token}"},
    )
    assert response.status_code == 200
    assert CANARY not in response.text


# Paths and methods

PATHS = [
    "/",
    "/api",
    "/api/chat",
    "/api/chat/",
    "/api/chat//1",
    "//api/chat/1",
    "/api/chat/042",
    "/api/chat/0",
    "/api/chat/-1",
    "/api/chat/+1",
    "/api/chat/4%202",
    "/api/chat/1.0",
    "/api/chat/1e1",
    "/api/chat/0x1",
    "/api/chat/1//",
    "/api/chat/1%00",
    "/api/chat/%D9%A3",
    "/api/chat/%C2%B2",
    "/api/chat/9223372036854775808",
    "/api/chat/" + "9" * 5000,
    "/api/chat/cAnArY7f3e9",
    "/api/chat/send//",
    "/api/chat/Send",
    "/API/chat/send",
    "/api/chat/../chat/send",
    "/api/chat/%2e%2e/send",
    "/api/chat/send%2f%2f",
    "/api/chat/send;x=cAnArY7f3e9",
    "/cAnArY7f3e9",
    "/.env",
    "/docs",
]


@pytest.mark.http1
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path(target: Target, method: str, path: str):
    token = target.chat.token(target.pair.prospect)
    with raw(target.chat) as sock:
        sock.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Length: 0\r\n\r\n".encode()
        )
        answer = read_answer(sock)
    assert_refused(answer, 404, "NOT_FOUND")


def test_a_percent_encoded_path_is_the_same_path(target: Target):
    """RFC 3986 §2.3: an encoded digit is that digit, and no way around any check."""
    outsider = target.chat.person()
    digits = "".join(f"%{ord(digit):x}" for digit in str(target.pair.channel_id))
    with target.chat.stream(digits, outsider) as events:
        assert (events.status, events.problem()["code"]) == (403, "NOT_YOUR_CHANNEL")
    with target.chat.stream(digits, target.pair.prospect) as events:
        events.connected()


@pytest.mark.http1
def test_a_path_that_is_no_path(target: Target):
    for line in (b"GET \xff HTTP/1.1", b"GET http:// HTTP/1.1", b"GET * HTTP/1.1", b"GET"):
        with raw(target.chat) as sock:
            sock.sendall(line + b"\r\nHost: x\r\n\r\n")
            try:
                answer = sock.recv(65536)
            except ConnectionError:
                continue
        assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer), answer


@pytest.mark.http1
@pytest.mark.parametrize("method", ["cAnArY7f3e9", "PROPFIND", "CONNECT", "TRACE"])
def test_a_strange_method(target: Target, method: str):
    with raw(target.chat) as sock:
        sock.sendall(f"{method} {SEND} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = read_answer(sock)
    # RFC 9110 §15.6.2: 501 for one that the server does not know at all.
    known = answer.status_code == 405
    assert_refused(
        answer, 405 if known else 501, "METHOD_NOT_ALLOWED" if known else "METHOD_UNKNOWN"
    )
    logged = eventually(
        lambda: [
            line
            for line in target.chat.log_lines("request")
            if line["request_id"] == answer.headers["x-request-id"]
        ]
    )
    assert logged[0]["method"] == "other"


# Cursors and queries


@pytest.mark.parametrize(
    "cursor",
    [CANARY, "-1", "+1", "1.5.2", "1,2", "0x1", "1e3", "2" * 20, "9223372036854775808", "1 2"],
)
def test_a_cursor_of_another_server_is_a_reset(target: Target, cursor: str):
    """A 400 would end an `EventSource` for good, which cannot help what it was given."""
    chat, pair = target.chat, target.pair
    query = httpx.QueryParams({"lastEventId": cursor})
    for path, headers in (
        (f"{pair.channel_id}", {"last-event-id": cursor}),
        (f"{pair.channel_id}?{query}", {}),
    ):
        with chat.stream(path, pair.prospect, headers) as events:
            assert events.connected().next().event == "reset"
            assert CANARY.encode() not in events._body


@pytest.mark.parametrize("cursor", ["%ED%A0%80", "%ff", "%D9%A3", "1%2C%201"])
def test_a_cursor_of_strange_bytes_is_a_reset(target: Target, cursor: str):
    with target.chat.stream(
        f"{target.pair.channel_id}?lastEventId={cursor}", target.pair.prospect
    ) as events:
        assert events.connected().next().event == "reset"


@pytest.mark.parametrize("cursor", ["%00", "1%0A2", "a" * 257, "%C2%85x"])
def test_a_cursor_that_no_server_gives_is_refused(target: Target, cursor: str):
    with target.chat.stream(
        f"{target.pair.channel_id}?lastEventId={cursor}", target.pair.prospect
    ) as events:
        assert (events.status, events.problem()["code"]) == (400, "INVALID_CURSOR")


def test_a_query_of_a_thousand_fields(target: Target):
    query = "&".join(f"a{number}=1" for number in range(600))
    response = target.chat.get(f"/api/chat/export?{query}", target.pair.therapist)
    assert_refused(response, 400, "INVALID_QUERY")


@pytest.mark.parametrize(
    "number",
    [CANARY, "1e3", "1.0", "%31 ", "0", "-1", "9223372036854775808", "٣", f"{2**62}&channelId=x"],
)
def test_an_export_of_a_channel_that_is_no_number(target: Target, number: str):
    path = f"/api/chat/export?channelId={number}"
    response = target.chat.get(path, target.pair.therapist)
    if "&" in number:  # the first counts, and it is not theirs
        assert_refused(response, 403, "NOT_YOUR_CHANNEL")
    else:
        assert_refused(response, 400, "INVALID_QUERY")


# Headers


@pytest.mark.http1
def test_doubled_headers_do_not_open_a_way_around(target: Target):
    chat, pair = target.chat, target.pair
    good = chat.token(pair.prospect)
    body = target.body()
    common = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    for doubled in (f"Authorization: Bearer {good}", "Authorization: Bearer x"):
        with raw(chat) as sock:
            sock.sendall(head(target, doubled, *common) + body)
            assert_refused(read_answer(sock), 401, "UNAUTHENTICATED")
    with raw(chat) as sock:
        lines = ["Content-Type: text/plain", *common]
        sock.sendall(head(target, *lines) + body)
        assert_refused(read_answer(sock), 415, "UNSUPPORTED_MEDIA_TYPE")
    with raw(chat) as sock:
        sock.sendall(head(target, *common, "Content-Type: text/plain") + body)
        assert_refused(read_answer(sock), 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.http1
def test_of_doubled_cursors_neither_counts(target: Target):
    chat, pair = target.chat, target.pair
    for second in ("1", CANARY):
        with raw(chat) as sock:
            sock.sendall(
                f"GET /api/chat/{pair.channel_id} HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {chat.token(pair.prospect)}\r\n"
                f"Last-Event-ID: 1\r\nLast-Event-ID: {second}\r\n\r\n".encode()
            )
            answer = b""
            while b"event: reset" not in answer:
                part = sock.recv(65536)
                assert part, answer
                answer += part


@pytest.mark.http1
def test_headers_without_an_end(target: Target):
    with raw(target.chat) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        line = b"X-A: " + CANARY.encode() * 100 + b"\r\n"
        answer = b""
        try:
            for _ in range(1000):
                sock.sendall(line)
            sock.settimeout(5)
            answer = sock.recv(65536)
        except OSError:
            pass
    assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert CANARY.encode() not in answer


def test_a_header_injected_through_a_name(target: Target):
    """The client's name goes into a header of the export."""
    chat = target.chat
    pair = chat.pair(prospect=chat.person(first_name='X"\r\nSet-Cookie: a=b', last_name="; /../"))
    response = chat.get(f"/api/chat/export?channelId={pair.channel_id}", pair.therapist)
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    assert re.fullmatch(
        r'attachment; filename="chat-transcript-[A-Za-z0-9-]+-\d{8}T\d{6}Z\.txt"',
        response.headers["content-disposition"],
    )


@pytest.mark.http1
def test_bytes_after_the_request_of_a_stream(target: Target):
    """A client that goes on talking must not break its stream, and gets no second answer."""
    chat, pair = target.chat, target.pair
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        events._socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        beat = events.next(heartbeats=True)
        while beat.event != "heartbeat":
            beat = events.next(heartbeats=True)


# What is no request of ours at all

GET = b"GET /api/chat/1 HTTP/1.1\r\nHost: x\r\n"
H2C = GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: %b\r\n\r\n"
WEBSOCKET = (
    GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n%b\r\n"
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

JUNK = {
    "an upgrade to h2c with settings that are no base64": H2C % b"x",
    "an upgrade to h2c with settings that are none": H2C % b"AAAA",
    "an upgrade to h2c with frames that are none": H2C % b"AAMAAABkAAQAAP__" + b"\xff" * 500,
    "HTTP/2 without a preface": b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0",
    "HTTP/2 with frames that are none": PREFACE + b"\xff" * 500,
    "HTTP/2 with headers that are none": PREFACE
    + b"\0\0\0\x04\0\0\0\0\0"
    + b"\0\0\x03\x01\x05\0\0\0\x01\xff\xff\xff",
    "a websocket": WEBSOCKET % b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
    "a websocket without a key": WEBSOCKET % b"",
    "a websocket and frames that are none": WEBSOCKET
    % b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    + b"\xff" * 500,
    "a TLS client": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\xaa" * 500,
    "nothing but line ends": b"\r\n" * 5000,
    "nothing but NULs": b"\0" * 5000,
}


@pytest.mark.http1
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_http_costs_its_sender_the_connection_and_nobody_else_theirs(
    target: Target, junk: str
):
    """The fixture sees that the open stream lives."""
    with raw(target.chat) as sock:
        sock.sendall(JUNK[junk])
        sock.settimeout(0.3)
        try:
            while sock.recv(65536):
                pass
        except (TimeoutError, ConnectionError):
            pass
