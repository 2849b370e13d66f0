import contextlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from server.auth.jwks import (
    MAX_JWKS_BYTES,
    MAX_READS,
    KeysUnavailable,
    PemKey,
    RemoteKeys,
    UnknownKey,
    fetch_jwks,
    jwks_url,
    parse_jwks,
)
from tests.support.tokens import Signer, jwks_body

ONE, TWO = Signer("key-1"), Signer("key-2")
URL = "https://clerk.example.com/.well-known/jwks.json"


class Endpoint:
    """A JWKS endpoint that says what it is told, and counts."""

    def __init__(self, *signers: Signer) -> None:
        self.body = jwks_body(*signers)
        self.failure: Exception | None = None
        self.seconds = 0.0
        self.reads = 0

    async def fetch(self, url: str) -> bytes:
        assert url == URL
        self.reads += 1
        body = self.body
        await trio.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        return body

    def keys(self) -> RemoteKeys:
        return RemoteKeys(URL, fetch=self.fetch)


def number(signer: Signer) -> int:
    return signer.key.public_key().public_numbers().n


async def test_a_prefetched_set_needs_the_endpoint_no_more(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.prefetch()
    endpoint.failure = OSError()
    assert (await keys.key("key-1")).public_numbers().n == number(ONE)
    await keys.prefetch()
    assert endpoint.reads == 1


async def test_a_prefetch_that_fails_is_tried_again_until_it_does_not(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.failure = OSError()
    keys = endpoint.keys()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.prefetch)
        await trio.sleep(100)
        mended = trio.current_time()
        assert 50 <= endpoint.reads <= 103  # each two seconds, or half of that
        endpoint.failure = None
    assert trio.current_time() <= mended + 2
    endpoint.failure = OSError()
    assert (await keys.key("key-1")).public_numbers().n == number(ONE)


async def test_what_is_known_is_said(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.failure = OSError()
    keys = endpoint.keys()
    with pytest.raises(KeysUnavailable):
        await keys.key("key-1")
    assert not keys.known
    endpoint.failure = None
    await keys.prefetch()
    assert keys.known
    assert PemKey(ONE.pem).known


async def test_a_key_is_found_by_its_id_with_one_read(autojump_clock: MockClock):
    endpoint = Endpoint(ONE, TWO)
    keys = endpoint.keys()
    for _ in range(3):
        assert (await keys.key("key-1")).public_numbers().n == number(ONE)
        assert (await keys.key("key-2")).public_numbers().n == number(TWO)
    assert endpoint.reads == 1


async def test_without_a_key_id_nothing_is_read(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    with pytest.raises(UnknownKey):
        await endpoint.keys().key(None)
    assert endpoint.reads == 0


async def test_a_new_key_is_found_at_once(autojump_clock: MockClock):
    """Also when it comes just after the set was read."""
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    endpoint.body = jwks_body(ONE, TWO)
    assert (await keys.key("key-2")).public_numbers().n == number(TWO)
    assert endpoint.reads == 2


async def test_a_flood_of_unknown_keys_reads_once_per_interval(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    refused = Counter[type[Exception]]()
    for attempt in range(300):
        with pytest.raises((UnknownKey, KeysUnavailable)) as raised:
            await keys.key(f"forged-{attempt}")
        refused[raised.type] += 1
        await trio.sleep(0.25)
    assert endpoint.reads == MAX_READS + 7  # 75 seconds
    assert refused == {UnknownKey: endpoint.reads, KeysUnavailable: 300 - endpoint.reads}


async def test_in_a_flood_a_new_key_is_not_refused_for_good(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    for attempt in range(MAX_READS):
        with pytest.raises(UnknownKey):
            await keys.key(f"forged-{attempt}")
    endpoint.body = jwks_body(ONE, TWO)
    with pytest.raises(KeysUnavailable) as unavailable:
        await keys.key("key-2")
    assert unavailable.value.retry_after == 10
    await trio.sleep(10)
    assert (await keys.key("key-2")).public_numbers().n == number(TWO)


async def test_a_read_that_began_before_says_nothing_of_a_newer_key(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 1
    keys = endpoint.keys()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.key, "key-1")
        await trio.sleep(0.5)
        endpoint.body = jwks_body(ONE, TWO)
        found = await keys.key("key-2")
    assert found.public_numbers().n == number(TWO)
    assert endpoint.reads == 2


async def test_a_withdrawn_key_is_unknown_once_the_set_is_old(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    endpoint.body = jwks_body(TWO)
    await trio.sleep(3599)
    await keys.key("key-1")
    await trio.sleep(1)
    with pytest.raises(UnknownKey):
        await keys.key("key-1")
    assert endpoint.reads == 2


async def test_fifty_callers_share_one_read(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 1
    keys = endpoint.keys()
    found = []

    async def ask() -> None:
        found.append(await keys.key("key-1"))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
    assert len(found) == 50
    assert endpoint.reads == 1


async def test_fifty_callers_share_one_failure(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 60
    keys = endpoint.keys()
    refused = []

    async def ask() -> None:
        with pytest.raises(KeysUnavailable):
            await keys.key("key-1")
        refused.append(trio.current_time())

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
    assert len(refused) == 50
    assert max(refused) == started + 2  # nobody waits for a second attempt
    assert endpoint.reads == 1


async def test_a_known_key_stays_good_while_the_endpoint_is_down(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    endpoint.failure = httpx.ConnectError("down")
    for _ in range(5):
        await trio.sleep(4000)
        assert (await keys.key("key-1")).public_numbers().n == number(ONE)
    assert endpoint.reads == 6


async def test_an_old_set_is_read_by_one_caller_and_the_others_do_not_wait(
    autojump_clock: MockClock,
):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    await trio.sleep(3600)
    endpoint.seconds = 60
    waited = []

    async def ask() -> None:
        started = trio.current_time()
        await keys.key("key-1")
        waited.append(trio.current_time() - started)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
    assert sorted(waited) == [0] * 9 + [2]
    assert endpoint.reads == 2


async def test_an_unknown_key_cannot_be_judged_while_the_endpoint_is_down(
    autojump_clock: MockClock,
):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    endpoint.failure = httpx.ConnectError("down")
    with pytest.raises(KeysUnavailable) as first:
        await keys.key("key-2")
    assert first.value.retry_after == 10
    await trio.sleep(4)
    with pytest.raises(KeysUnavailable) as second:
        await keys.key("key-2")
    assert second.value.retry_after == 6
    assert endpoint.reads == 2


async def test_an_unknown_key_is_refused_again_once_the_endpoint_is_back(
    autojump_clock: MockClock,
):
    endpoint = Endpoint(ONE)
    endpoint.failure = httpx.ConnectError("down")
    keys = endpoint.keys()
    with pytest.raises(KeysUnavailable):
        await keys.key("key-2")
    endpoint.failure = None
    await trio.sleep(30)
    with pytest.raises(UnknownKey):
        await keys.key("key-2")


async def test_a_first_read_that_fails_is_tried_again_soon(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.failure = httpx.ConnectError("down")
    keys = endpoint.keys()
    for _ in range(5):
        with pytest.raises(KeysUnavailable) as unavailable:
            await keys.key("key-1")
    assert unavailable.value.retry_after == 1
    assert endpoint.reads == 1
    endpoint.failure = None
    await trio.sleep(0.5)
    await keys.key("key-1")
    assert endpoint.reads == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>sign in</html>",
        b"[]",
        b'{"keys": 1}',
        b'{"keys": []}',
        b'{"keys": [1, null, "x"]}',
        b'{"keys": ' + b"[" * 100_000,
        b"\xff\xfe\x00",
        json.dumps({"keys": [ONE.jwk(n="")]}).encode(),
        json.dumps({"keys": [ONE.jwk(e="AA")]}).encode(),
    ],
)
async def test_garbage_from_the_endpoint_is_a_failed_read(body: bytes, autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    keys = endpoint.keys()
    await keys.key("key-1")
    endpoint.body = body
    await trio.sleep(3600)
    with capture_logs() as logs:
        await keys.key("key-1")
    assert logs == [{"event": "jwks_failed", "error": "ValueError", "log_level": "warning"}]


@pytest.mark.parametrize(
    "jwk",
    [
        ONE.jwk(use="enc"),
        ONE.jwk(alg="RS512"),
        ONE.jwk(kty="EC"),
        ONE.jwk(kty="oct", k="c2VjcmV0"),
        ONE.jwk(kid=...),
        ONE.jwk(kid=""),
        ONE.jwk(kid=7),
        ONE.jwk(n=...),
        Signer("weak", bits=1024).jwk(),
    ],
    ids=["enc", "RS512", "EC", "oct", "no kid", "empty kid", "kid 7", "no n", "1024 bits"],
)
def test_a_key_that_is_not_for_rs256_is_left_out(jwk: dict[str, object]):
    body = json.dumps({"keys": [jwk, TWO.jwk()]}).encode()
    assert list(parse_jwks(body)) == ["key-2"]


def test_use_and_algorithm_may_be_absent():
    body = json.dumps({"keys": [ONE.jwk(use=..., alg=...)]}).encode()
    assert list(parse_jwks(body)) == ["key-1"]


async def test_a_read_is_logged_once_without_what_the_client_sent(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 0.5
    keys = endpoint.keys()
    with capture_logs() as logs:
        await keys.key("key-1")
        with pytest.raises(UnknownKey):
            await keys.key("canary")
        endpoint.seconds = 60
        with pytest.raises(KeysUnavailable) as unavailable:
            await keys.key("canary")
    assert logs == [
        {"event": "jwks_fetched", "keys": 1, "ms": 500, "log_level": "info"},
        {"event": "jwks_fetched", "keys": 1, "ms": 500, "log_level": "info"},
        {"event": "jwks_failed", "error": "TooSlow", "log_level": "warning"},
    ]
    assert "canary" not in repr(unavailable.value)


async def test_a_caller_that_is_cancelled_does_not_take_the_read_with_it(
    autojump_clock: MockClock,
):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 1
    keys = endpoint.keys()
    first = trio.CancelScope()
    found = []

    async def leave() -> None:
        with first:
            await keys.key("key-1")

    async def stay() -> None:
        found.append(await keys.key("key-1"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        await wait_all_tasks_blocked()
        nursery.start_soon(stay)
        await wait_all_tasks_blocked()
        first.cancel()
    assert len(found) == 1
    assert endpoint.reads == 1


async def test_a_waiter_that_is_cancelled_leaves_at_once(autojump_clock: MockClock):
    endpoint = Endpoint(ONE)
    endpoint.seconds = 1
    keys = endpoint.keys()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.key, "key-1")
        await wait_all_tasks_blocked()
        started = trio.current_time()
        with trio.move_on_after(0.5):
            await keys.key("key-1")
        assert trio.current_time() == started + 0.5
    await keys.key("key-1")
    assert endpoint.reads == 1


# PemKey


@pytest.mark.parametrize("newline", ["\n", "\\n", "\r\n"])
async def test_a_pem_is_read_with_real_and_with_written_line_breaks(newline: str):
    key = PemKey(ONE.pem.replace("\n", newline))
    assert (await key.key("any")).public_numbers().n == number(ONE)
    assert (await key.key(None)).public_numbers().n == number(ONE)


EC_PEM = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----"""


@pytest.mark.parametrize(
    "pem",
    ["", "canary", EC_PEM, Signer("weak", bits=1024).pem, ONE.pem[:200], "é\ud800"],
    ids=["empty", "text", "EC", "1024 bits", "cut", "surrogate"],
)
def test_what_is_no_rsa_public_key_is_refused_without_being_repeated(pem: str):
    with pytest.raises(ValueError, match=r"\Anot a PEM of an RSA public key") as refused:
        PemKey(pem)
    assert refused.value.__context__ is None


# A real server


left_by_client = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/.well-known/jwks.json":
                self.answer(200, jwks_body(ONE))
            case "/huge":
                try:  # far more than the socket's buffers hold
                    self.answer(200, *[b" " * MAX_JWKS_BYTES] * 256)
                except OSError:
                    left_by_client.set()
            case "/moved":
                self.answer(302, location="/.well-known/jwks.json")
            case "/slow":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(100):  # each byte well within any limit per read
                        self.wfile.write(b" ")
                        time.sleep(0.05)
            case _:
                self.answer(500, jwks_body(ONE))

    def answer(self, status: int, *parts: bytes, location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        self.send_header("Location", location)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


async def test_keys_are_read_from_a_real_server(issuer: str):
    keys = RemoteKeys(jwks_url(issuer))
    assert (await keys.key("key-1")).public_numbers().n == number(ONE)


async def test_a_body_is_left_where_it_is_too_long(issuer: str):
    with pytest.raises(ValueError, match="too long"):
        await fetch_jwks(issuer + "/huge")
    with trio.fail_after(5):
        while not left_by_client.is_set():
            await trio.sleep(0.01)


@pytest.mark.parametrize("path", ["/moved", "/fault"])
async def test_only_a_200_is_an_answer(issuer: str, path: str):
    with pytest.raises(ValueError, match="not a 200"):
        await fetch_jwks(issuer + path)


async def test_a_real_server_that_drips_is_left_in_time(issuer: str):
    started = time.monotonic()
    with pytest.raises(KeysUnavailable):
        await RemoteKeys(issuer + "/slow", timeout=0.3).key("key-1")
    assert time.monotonic() - started < 2


async def test_a_refused_connection_is_a_failed_read():
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with capture_logs() as logs, pytest.raises(KeysUnavailable):
            await RemoteKeys(url).key("key-1")
    assert logs == [{"event": "jwks_failed", "error": "ConnectError", "log_level": "warning"}]
