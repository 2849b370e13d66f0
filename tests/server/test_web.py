"""HTTP as the handlers see it: decoding, problems, rates, origins, addresses, queries."""

import ipaddress
import json
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from protocol import requests
from protocol.problems import PROBLEMS
from server import routes
from server.web import rate
from server.web.cors import cors_headers, preflight
from server.web.decode import decode
from server.web.problems import Problem, problem_response
from server.web.rate import SendRate
from server.web.request import (
    LINGER_BYTES,
    LINGER_SECONDS,
    PeerLeft,
    Request,
    read_address,
)

CANARY = "cAnArY7f3e9"
Headers = list[tuple[bytes, bytes]]


async def nothing() -> dict[str, Any]:
    raise AssertionError("nobody should ask")


def request(
    headers: Headers | None = None,
    *,
    query: bytes = b"",
    client: tuple[str, int] | None = ("192.0.2.7", 1234),
    messages: list[dict[str, Any]] | None = None,
    method: str = "POST",
) -> Request:
    waiting = list(messages or [])

    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if not waiting:
            await trio.sleep_forever()
        return waiting.pop(0)

    scope = {
        "type": "http",
        "method": method,
        "headers": headers or [],
        "query_string": query,
        "client": client,
    }
    return Request(scope, nothing if messages is None else receive, path_id=None)


def body(*parts: bytes, more: bool = False) -> list[dict[str, Any]]:
    last = len(parts) - 1
    return [
        {"type": "http.request", "body": part, "more_body": more or number < last}
        for number, part in enumerate(parts)
    ]


# Decoding

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
FIELDS = ["action", "channelId", "content", "messageType", "clientMessageId", "maxResults",
          "lastMessageId", "therapistId", "prospectUserId", "channelName"]  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(), JSON).flatmap(
    lambda fields: st.sampled_from(
        ["create_channel", "send_message", "get_messages", "list_channels", "mark_read"]
    ).map(lambda action: {**fields, "action": action})
)
DECODERS = [requests.decode_send, requests.decode_action]
SENTENCES = {
    None,
    "The body has a field that is not known here.",
    "The body must be a JSON object with the documented fields.",
    *(f"The field `{field}` is missing, or not of its type or range." for field in FIELDS),
}


@given(
    raw=st.binary()
    | (JSON | BODIES).map(lambda value: json.dumps(value).encode())
    | BODIES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")),
    decoder=st.sampled_from(DECODERS),
)
def test_whatever_comes_is_decoded_or_refused_in_words_of_ours(raw: bytes, decoder: Any):
    try:
        value = decode(decoder, raw)
    except Problem as refused:
        value = refused
    if isinstance(value, Problem):
        assert value.code in ("INVALID_JSON", "INVALID_BODY")
        assert value.detail in SENTENCES
    else:
        assert isinstance(value, msgspec.Struct)


@pytest.mark.parametrize(
    "raw",
    [
        '{"action": "%s"}',
        '{"action": "send_message", "%s": 1}',
        '{"action": "mark_read", "channelId": "%s"}',
        '{"action": "send_message", "channelId": 1, "content": ["%s"]}',
        '{"action": "get_messages", "channelId": 1, "lastMessageId": "%s"}',
        '{"action": "`%s`"}',
        '{"action": "$.%s`"}',
        '{"action": "mark_read", "channelId": 1, "- at `$.%s`": 1}',
        '{"missing required field `%s`": 1}',
        '{"%s',
    ],
)
def test_no_explanation_repeats_the_input(raw: str):
    for decoder in DECODERS:
        with pytest.raises(Problem) as refused:
            decode(decoder, (raw % CANARY).encode())
        assert CANARY not in problem_response(refused.value).body.decode()
        assert CANARY not in repr(refused.value) + str(refused.value)


def test_a_refused_body_leaves_no_trace_in_the_exception():
    """`from None`: msgspec's own words, which repeat the input, are not printed with it."""
    with pytest.raises(Problem) as refused:
        decode(requests.decode_action, b'{"action": "cAnArY7f3e9"}')
    assert refused.value.__suppress_context__


# Problems


@pytest.mark.parametrize("code", PROBLEMS)
def test_every_problem_is_a_response(code: str):
    response = problem_response(Problem(code, retry_after=0.2))
    headers = dict(response.headers)
    assert response.status == PROBLEMS[code].status
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == b"%d" % len(response.body)
    assert headers[b"retry-after"] == b"1", "whole seconds, and never none"
    assert (headers.get(b"www-authenticate") == b"Bearer") is (response.status == 401)
    assert CANARY not in repr(response)


def test_retry_after_is_rounded_up():
    assert (b"retry-after", b"3") in Problem("UNAVAILABLE", retry_after=2.1).headers


# Rates


@pytest.fixture
def clock() -> MockClock:
    """Found by pytest-trio, which runs the test on it."""
    return MockClock()


async def test_twice_the_rate_may_come_at_once_and_then_the_rate(clock: MockClock):
    sends = SendRate(5)
    for _ in range(10):
        sends.spend(1)
    with pytest.raises(Problem) as refused:
        sends.spend(1)
    assert refused.value.code == "RATE_LIMITED"
    assert (b"retry-after", b"1") in refused.value.headers
    clock.jump(0.19)
    with pytest.raises(Problem):
        sends.spend(1)
    clock.jump(0.02)
    sends.spend(1)
    with pytest.raises(Problem):
        sends.spend(1)
    clock.jump(3600)
    for _ in range(10):
        sends.spend(1)
    with pytest.raises(Problem):
        sends.spend(1)


async def test_a_refused_send_costs_nothing(clock: MockClock):
    sends = SendRate(1)
    sends.spend(1)
    sends.spend(1)
    for _ in range(100):
        with pytest.raises(Problem):
            sends.spend(1)
    clock.jump(1.01)
    sends.spend(1)


async def test_one_users_rate_is_not_anothers(clock: MockClock):
    sends = SendRate(1)
    for user in range(50):
        sends.spend(user)
        sends.spend(user)
    with pytest.raises(Problem):
        sends.spend(7)


async def test_only_users_with_a_full_bucket_are_forgotten(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rate, "MAX_BUCKETS", 10)
    sends = SendRate(1)
    for user in range(9):
        sends.spend(user)
    clock.jump(1.5)
    for _ in range(2):
        sends.spend(99)
    clock.jump(0.6)
    sends.spend(100)
    assert set(sends._buckets) == {99, 100}
    assert sends._buckets[99][0] < 1, "who has just sent is remembered"


# Origins


def test_only_a_configured_origin_gets_cors_headers():
    allowed = ["https://a.example"]
    headers = dict(cors_headers(request([(b"origin", b"https://a.example")]), allowed))
    assert headers[b"access-control-allow-origin"] == b"https://a.example"
    assert headers[b"access-control-allow-credentials"] == b"true"
    assert headers[b"vary"] == b"Origin"
    for origin in (b"https://b.example", b"null", b"*", b"", b"https://a.example.evil", b"\xff"):
        assert cors_headers(request([(b"origin", origin)]), allowed) == [(b"vary", b"Origin")]
    both = [(b"origin", b"https://a.example"), (b"origin", b"https://b.example")]
    assert cors_headers(request(both), allowed) == [(b"vary", b"Origin")]
    assert cors_headers(request(), allowed) == [(b"vary", b"Origin")]
    assert cors_headers(request([(b"origin", b"https://a.example")]), []) == []


def test_a_preflight_has_no_body_and_no_content():
    response = preflight(["OPTIONS", "GET"], [], allowed_headers=())
    assert (response.status, response.body) == (204, b"")
    names = [name for name, _ in response.headers]
    assert b"content-type" not in names
    assert b"content-length" not in names, "RFC 9110 §8.6: none with 204"
    assert b"access-control-allow-origin" not in names


def test_a_preflight_names_the_usual_headers_and_the_configured_ones():
    response = preflight(["OPTIONS", "GET"], [], allowed_headers=("X-Trace", "traceparent"))
    names = dict(response.headers)[b"access-control-allow-headers"].split(b", ")
    assert {b"Cache-Control", b"X-Requested-With", b"Last-Event-ID"} <= {*names}, "polyfills'"
    assert names[-2:] == [b"X-Trace", b"traceparent"]


# What is asked for


@pytest.mark.parametrize(
    ("accept", "asked"),
    [
        ([], False),
        ([""], False),
        (["*/*"], False),
        (["text/*"], False),
        (["text/html, application/xhtml+xml, */*;q=0.8"], False),
        (["text/event-stream"], True),
        (["Text/Event-Stream"], True),
        (["text/event-stream, */*"], True),
        (["application/json,text/event-stream"], True),
        (["application/json", "text/event-stream"], True),
        (["text/event-stream;q=0.5"], True),
        (["text/event-stream ; charset=utf-8 ; q=0.001"], True),
        (["text/event-stream;q=0"], False),
        (["text/event-stream; Q=0.000, */*"], False),
        (["text/event-streams"], False),
        (["x-text/event-stream"], False),
    ],
)
def test_an_event_stream_is_asked_for_by_name(accept: list[str], asked: bool):
    headers = [(b"accept", value.encode()) for value in accept]
    assert request(headers).asks_for_events is asked


# Addresses


@pytest.mark.parametrize(
    ("hops", "forwarded", "address"),
    [
        (0, [], "192.0.2.7"),
        (0, ["203.0.113.9"], "192.0.2.7"),
        (1, ["203.0.113.9"], "203.0.113.9"),
        (1, ["10.9.9.9, 203.0.113.9"], "203.0.113.9"),
        (2, ["10.9.9.9, 203.0.113.9,10.0.0.1"], "203.0.113.9"),
        (2, ["10.9.9.9", "203.0.113.9", "10.0.0.1"], "203.0.113.9"),
        (1, ["2001:db8::9"], "2001:db8::9"),
        (2, ["203.0.113.9"], "192.0.2.7"),
        (1, [], "192.0.2.7"),
        (1, [""], "192.0.2.7"),
        (1, ["unknown"], "192.0.2.7"),
        (1, [CANARY], "192.0.2.7"),
        (1, ["203.0.113.9:4711"], "203.0.113.9"),
        (1, ["10.9.9.9:1, [2001:db8::9]:443"], "2001:db8::9"),
        (2, ["203.0.113.9, "], "203.0.113.9"),
        (1, ["203.0.113.9,"], "192.0.2.7"),
        (2, ["10.9.9.9,, 10.0.0.1"], "192.0.2.7"),
        (1, ["'; DROP TABLE x"], "192.0.2.7"),
    ],
)
def test_the_address_is_what_the_last_trusted_proxy_saw(
    hops: int, forwarded: list[str], address: str
):
    """What the client wrote itself stands further left, and is not believed."""
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert request(headers).address(hops=hops) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        (" \t203.0.113.9 ", "203.0.113.9"),
        ("203.0.113.9:443", "203.0.113.9"),
        ("203.0.113.9:", "203.0.113.9"),
        ("2001:DB8:0::9", "2001:db8::9"),
        ("2001:db8::9%eth0", "2001:db8::9"),
        ("[2001:db8::9]", "2001:db8::9"),
        ("[2001:db8::9]:443", "2001:db8::9"),
        ("[fe80::1%eth0]:443", "fe80::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("fe80::1%", "fe80::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("::FFFF:cb00:7109", "203.0.113.9"),
        ("[::ffff:203.0.113.9]:443", "203.0.113.9"),
        ("::ffff:203.0.113.9%1", "203.0.113.9"),
        ("[203.0.113.9]", "203.0.113.9"),
        ("", None),
        ("unknown", None),
        ("_hidden", None),
        ("unix:", None),
        ("/run/x.sock", None),
        ("[2001:db8::9", None),
        ("2001:db8::9]:443", None),
        ("[]", None),
        ("203.0.113.9:port", None),
        ("203.0.113.9%eth0", "203.0.113.9"),
        ("203.0.113.9/32", None),
        ("203.0.113", None),
        ("0x7f.1", None),
        ("203.0.113.9 198.51.100.1", None),
        ("'; DROP TABLE x", None),
        (CANARY, None),
    ],
)
def test_an_address_is_read_as_sockets_and_proxies_write_it(text: str, address: str | None):
    assert read_address(text) == address
    assert request(client=(text, 1)).address(hops=0) == address


@given(st.text() | st.from_regex(r"\[?[0-9a-f:.]{1,40}(%[a-z0-9]*)?\]?(:[0-9]{0,5})?"))
def test_whatever_is_read_as_an_address_is_one_without_a_zone(text: str):
    address = read_address(text)
    if address is not None:
        assert str(ipaddress.ip_address(address)) == address
        assert "%" not in address


@pytest.mark.parametrize("client", [None, ("", 0), ("unix:", 0), ("/run/x.sock", 0)])
def test_a_client_without_an_address_has_none(client: tuple[str, int] | None):
    assert request(client=client).address(hops=0) is None


# Requests


def test_a_doubled_header_is_one_list():
    doubled = request([(b"last-event-id", b"1"), (b"x", b"y"), (b"last-event-id", b"2")])
    assert doubled.header(b"last-event-id") == b"1, 2"
    assert doubled.header(b"content-type") is None


def test_a_request_prints_nothing_of_itself():
    secret = CANARY.encode()
    one = request([(b"authorization", secret)], query=secret)
    assert CANARY not in repr(one) + str(one)


def test_a_query_of_too_many_fields_is_refused():
    assert request(query=b"&".join([b"a=1"] * 32)).query("a") == "1"
    with pytest.raises(Problem, match="INVALID_QUERY"):
        request(query=b"&".join([b"a=1"] * 33)).query("a")


TYPE = (b"content-type", b"application/json")


async def read(one: Request, limit: int = 10) -> bytes:
    return await one.json_bytes(limit=limit, seconds=5)


async def test_a_body_is_put_together():
    parts = [b"ab", b"", b"cd"]
    assert await read(request([TYPE], messages=body(*parts))) == b"abcd"


async def test_a_body_over_its_limit_is_not_read_on():
    """The third part would raise: nobody may ask for it."""
    one = request([TYPE], messages=body(b"x" * 6, b"x" * 6, more=True))
    with pytest.raises(Problem, match="BODY_TOO_LARGE"):
        await read(one)


@pytest.mark.parametrize("length", [b"11", b"-1", b"1e1", b"0x1", b"9" * 19, b"1, 1"])
async def test_a_length_that_is_over_or_none_is_refused_unread(length: bytes):
    with pytest.raises(Problem, match="BODY_TOO_LARGE"):
        await read(request([TYPE, (b"content-length", length)]))


async def test_a_body_that_stops_is_given_up_after_its_time(autojump_clock: MockClock):
    one = request([TYPE, (b"content-length", b"9")], messages=body(b"{", more=True))
    began = trio.current_time()
    with pytest.raises(Problem, match="REQUEST_TIMEOUT"):
        await read(one)
    assert trio.current_time() - began == pytest.approx(5)
    assert not one.unread, "it had its time, and gets no more"


async def test_a_peer_that_leaves_gets_no_answer():
    one = request([TYPE], messages=[*body(b"{", more=True), {"type": "http.disconnect"}])
    with pytest.raises(PeerLeft):
        await read(one)


async def test_the_rest_of_a_body_is_taken_in_within_a_time(autojump_clock: MockClock):
    one = request([(b"content-length", b"99")], messages=body(b"x", b"y", more=True))
    assert one.unread
    began = trio.current_time()
    await one.discard()
    assert trio.current_time() - began == pytest.approx(LINGER_SECONDS)


async def test_the_rest_of_a_body_is_taken_in_within_a_size():
    part = b"x" * (LINGER_BYTES // 2)
    one = request([(b"transfer-encoding", b"chunked")], messages=body(part, part, part, more=True))
    with trio.fail_after(5):
        await one.discard()
    assert one.unread


async def test_a_body_that_ends_is_taken_in_and_no_more():
    for messages in (body(b"x", b"y"), [{"type": "http.disconnect"}]):
        one = request([(b"content-length", b"2")], messages=messages)
        await one.discard()
        assert not one.unread


def test_a_request_without_a_body_has_nothing_to_come():
    assert not request([TYPE]).unread


# Routes


@pytest.mark.parametrize("path", [route.path for route in routes.ROUTES[1:]])
def test_every_route_is_found_by_its_path_and_by_no_other(path: str):
    found = routes.find(path)
    assert found is not None
    assert (found[0].path, found[1]) == (path, None)
    assert routes.find(path + "/") == found, "Next.js adds it where `trailingSlash` is set"
    for other in (path + "//", path.upper(), path[:-1], path + "\0", "/" + path):
        assert routes.find(other) is None


@given(st.integers(1, 2**63 - 1))
def test_every_channel_has_one_path(number: int):
    assert routes.find(f"/api/chat/{number}") == (routes.STREAM, number)
    assert routes.find(f"/api/chat/{number}/") == (routes.STREAM, number)


@given(st.text())
def test_any_other_path_is_unknown_or_canonical(text: str):
    found = routes.find(f"/api/chat/{text}")
    if found is not None and found[0] is routes.STREAM:
        assert str(found[1]) == text.removesuffix("/")
