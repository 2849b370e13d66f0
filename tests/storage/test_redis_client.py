"""redis-py behind the bridge: scripts against a real Valkey, and what a bad peer can do."""

import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hiredis
import pytest
import redis
import trio

from bench.faults.proxy import TcpProxy, open_proxy
from protocol.confidential import Secret
from storage.breaker import Breaker
from storage.bridge import Bridge, open_bridge
from storage.contract import Record, StoreUnavailable
from storage.embedded import EmbeddedValkey
from storage.redis import Keys
from storage.redis.client import open_client
from storage.redis.recent import RecentMessages
from storage.store import REDIS_SECONDS
from tests.storage.stores import draft, make_rooms, opened_store
from tests.support.services import Database
from tests.support.wire import certificate

CANARY = "canary-words"
KEYS = Keys({"host": "h", "port": 1, "dbname": "d"})


@pytest.fixture(autouse=True)
async def time_limit():
    with trio.fail_after(20):
        yield


class Opened(NamedTuple):
    bridge: Bridge
    client: Any
    recent: RecentMessages
    breaker: Breaker

    async def ask(self, *words: Any) -> Any:
        return await self.bridge.run(self.client.execute_command, *words)


@asynccontextmanager
async def opened(
    url: str, *, size: int = 50, hears: Callable[[int], bool] = lambda _: False
) -> AsyncIterator[Opened]:
    async with open_bridge() as bridge:
        client = open_client(Secret(url))
        breaker = Breaker("redis", tolerance=2, on_change=lambda _: None)
        recent = RecentMessages(
            bridge,
            client,
            KEYS,
            breaker=breaker,
            size=size,
            ttl=600,
            seconds=REDIS_SECONDS,
            hears=hears,
        )
        try:
            yield Opened(bridge, client, recent, breaker)
        finally:
            with trio.move_on_after(2, shield=True):
                await bridge.run(client.aclose)


@asynccontextmanager
async def behind_proxy(url: str) -> AsyncIterator[tuple[TcpProxy, Opened]]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    async with (
        open_proxy(parts.hostname, parts.port) as proxy,
        opened(url.replace(f":{parts.port}", f":{proxy.port}")) as client,
    ):
        yield proxy, client


def record(seq: int, text: str = "") -> Record:
    return Record(seq, 0, b'{"event":"%b"}' % text.encode(), b'{"reply":"%b"}' % text.encode())


async def test_a_batch_is_written_and_read_whole_in_order(redis_url: str):
    """1000 messages are as many as may be kept of a channel; together they are megabytes."""
    written = {
        channel_id: [record(seq, f"{channel_id} {seq} \t$3 *2") for seq in range(1, 1001)]
        for channel_id in range(1, 21)
    }
    async with opened(redis_url, size=1000) as (_, _, recent, _):
        await recent.write([(each, records, False) for each, records in written.items()])
        ids = [20, 7, 99, *range(1, 21)]
        assert await recent.read(ids) == [written.get(channel_id, []) for channel_id in ids]


async def test_a_channel_keeps_its_newest_messages_for_a_time(redis_url: str):
    async with opened(redis_url, size=3) as (_, _, recent, _):
        await recent.write([(1, [record(seq)], True) for seq in (2, 3, 1)])
        await recent.write([(1, [record(4), record(5)], True), (2, [record(1)], False)])
        assert await recent.read([1, 2]) == [[record(3), record(4), record(5)], [record(1)]]
    with redis.Redis.from_url(redis_url) as client:
        assert 590 < int(client.ttl(KEYS.recent(1))) <= 600


async def test_what_only_the_writer_would_hear_is_not_published(redis_url: str):
    """Channel 1 has the writer alone, 2 somebody else alone, 3 both, 4 nobody."""
    with redis.Redis.from_url(redis_url) as client:
        ours, theirs = client.pubsub(), client.pubsub()
        with ours, theirs:
            ours.subscribe(KEYS.live(1), KEYS.live(3))
            theirs.subscribe(KEYS.live(2), KEYS.live(3))
            for each in (ours, theirs):
                assert {each.get_message(timeout=5)["type"] for _ in "12"} == {"subscribe"}
            async with opened(redis_url, hears={1, 3}.__contains__) as (_, _, recent, _):
                await recent.write([(n, [record(n)], True) for n in (1, 2, 3, 4)])
                assert await recent.read([1, 2, 3, 4]) == [[record(n)] for n in (1, 2, 3, 4)]
            heard = [
                [KEYS.channel_of(message["channel"]) for _ in "123" if (message := _next(each))]
                for each in (ours, theirs)
            ]
    assert heard == [[3], [2, 3]]


def _next(pubsub: Any) -> Any:
    return pubsub.get_message(timeout=0.2)


async def test_a_rebuild_takes_the_place_of_other_versions_and_is_not_published(redis_url: str):
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        pubsub.subscribe(KEYS.live(1))
        async with opened(redis_url) as (_, _, recent, _):
            await recent.write([(1, [record(seq, "1st") for seq in range(1, 6)], False)])
            await recent.write([(1, [record(seq, "2nd") for seq in (2, 3, 4)], False)])
            await recent.write([(1, [record(6, "said"), record(7, "said")], True)])
            texts = ("1st", "2nd", "2nd", "2nd", "1st", "said", "said")
            assert await recent.read([1]) == [
                [record(seq, text) for seq, text in enumerate(texts, 1)]
            ]
        heard: list[Any] = []
        while len(heard) < 3:
            heard += filter(None, [pubsub.get_message(timeout=5)])
        assert [each["data"] for each in heard[1:]] == [
            record(6, "said").encode(),
            record(7, "said").encode(),
        ]


async def test_what_redis_refuses_holds_up_nothing_else_of_its_batch(
    redis_url: str, capsys: pytest.CaptureFixture[str]
):
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        client.set(KEYS.recent(2), CANARY)
        pubsub.subscribe(*map(KEYS.live, (1, 2, 3)))
        async with opened(redis_url) as (_, _, recent, breaker):
            with pytest.raises(StoreUnavailable) as caught:
                await recent.write([(n, [record(n, CANARY)], True) for n in (1, 2, 3)])
            assert caught.value.__suppress_context__
            assert breaker.up, "it answers: one more may be right"
            assert await recent.read([1, 3]) == [[record(1, CANARY)], [record(3, CANARY)]]
            heard: list[Any] = []
            while len(heard) < 6:
                heard += filter(None, [pubsub.get_message(timeout=5)])
            assert [each["type"] for each in heard[3:]] == ["message"] * 3
    assert CANARY not in "".join(capsys.readouterr())


async def test_scripts_that_redis_forgot_are_sent_again(redis_url: str):
    async with opened(redis_url) as opened_client:
        for seq in (1, 2):
            await opened_client.ask("SCRIPT", "FLUSH")
            await opened_client.recent.write([(1, [record(seq)], True)])
            await opened_client.ask("SCRIPT", "FLUSH")
            assert len((await opened_client.recent.read([1]))[0]) == seq


async def test_connections_are_used_again(redis_url: str):
    async with opened(redis_url) as opened_client:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(opened_client.ask, "PING")
        clients = await opened_client.ask("CLIENT", "LIST")
        assert 1 <= clients.count(b"name=sottovoce") <= 3


async def test_a_connection_that_died_while_idle_is_replaced_unseen(redis_url: str):
    async with behind_proxy(redis_url) as (proxy, opened_client):
        for _ in range(3):
            assert await opened_client.recent.probe()
            proxy.cut()
            proxy.resume()
            await trio.sleep(0.05)


async def test_a_cancelled_call_leaves_no_answer_for_the_next(redis_url: str):
    async with behind_proxy(redis_url) as (proxy, opened_client):
        await opened_client.ask("MSET", "a", "1", "b", "2")
        for _ in range(20):  # more than there may be connections: none is lost either
            proxy.stall()
            with trio.move_on_after(0.03) as scope:
                await opened_client.ask("GET", "a")
            assert scope.cancelled_caught
            proxy.resume()
            assert await opened_client.ask("GET", "b") == b"2"


async def test_nobody_listening_is_known_at_once():
    started = trio.current_time()
    async with opened("redis://127.0.0.1:1") as (_, _, recent, breaker):
        with pytest.raises(StoreUnavailable) as caught:
            await recent.read([1])
        assert not breaker.up, "no need to ask twice"
    assert caught.value.__suppress_context__
    assert trio.current_time() - started < REDIS_SECONDS


async def test_a_resolver_that_hangs_costs_no_more_than_redis_may(
    monkeypatch: pytest.MonkeyPatch,
):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(10) and [])
    try:
        async with opened("redis://redis.invalid") as (_, _, recent, _):
            started = trio.current_time()
            with pytest.raises(StoreUnavailable):
                await recent.read([1])
            assert trio.current_time() - started < REDIS_SECONDS + 0.5
    finally:
        answered.set()


async def test_the_password_the_user_and_the_database_of_the_url_are_used(folder: Path):
    with EmbeddedValkey(folder / "valkey", durable=False) as server:
        where = server.url.split("//")[1].split("/")[0].rpartition("@")[2]
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("ACL SETUSER ada on >p@ss/word ~* &* +@all")
            admin.config_set("requirepass", "p@ss:2")
        for login in ("ada:p%40ss%2Fword", ":p%40ss%3A2"):
            async with opened(f"redis://{login}@{where}/3") as opened_client:
                await opened_client.ask("SET", "where", "three")
            async with opened(f"redis://{login}@{where}?db=3") as opened_client:
                assert await opened_client.ask("GET", "where") == b"three"
            async with opened(f"redis://{login}@{where}") as opened_client:
                assert await opened_client.ask("GET", "where") is None
        for login in ("", "ada:wrong@", ":wrong@"):
            async with opened(f"redis://{login}{where}") as opened_client:
                assert not await opened_client.recent.probe()
                assert not opened_client.breaker.up


Handler = Callable[[trio.abc.Stream], Awaitable[None]]


@asynccontextmanager
async def peer(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that does what `handler` does to each connection; its port."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listener.socket.getsockname()[1]

    async def serve(stream: trio.abc.Stream) -> None:
        try:
            await handler(trio.SSLStream(stream, tls, server_side=True) if tls else stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        try:
            yield port
        finally:
            nursery.cancel_scope.cancel()


async def says_ok(stream: trio.abc.Stream) -> None:
    parser = hiredis.Reader()
    while data := await stream.receive_some(65536):
        parser.feed(bytes(data))
        while parser.gets() is not False:
            await stream.send_all(b"+OK\r\n")


@pytest.mark.parametrize(
    "replies",
    [
        [],
        [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
        [b"+OK\r\n", b"-LOADING not yet\r\n"],
        [b"+OK\r\n", b"$9\r\nab"],
        [b"+OK\r\n", b"*1\r\n*1\r\n$1\r\n"],
    ],
    ids=["silent", "HTTP", "loading", "half a string", "half a list"],
)
async def test_a_peer_that_is_no_redis_or_not_yet_one_is_unavailable(replies: list[bytes]):
    async def handler(stream: trio.abc.Stream) -> None:
        for reply in replies:
            await stream.receive_some(65536)
            await stream.send_all(reply)

    async with peer(handler) as port, opened(f"redis://127.0.0.1:{port}") as opened_client:
        with pytest.raises(StoreUnavailable):
            await opened_client.recent.read([1])


async def test_rediss_speaks_tls_and_believes_only_who_can_prove_itself():
    certfile, keyfile = certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile)
    async with peer(says_ok, context) as port:
        url = f"rediss://127.0.0.1:{port}"
        for options in (f"?ssl_ca_certs={certfile}", "?ssl_cert_reqs=none"):
            async with opened(url + options) as opened_client:
                for _ in range(3):
                    assert await opened_client.recent.probe()
        async with opened(url) as opened_client:
            assert not await opened_client.recent.probe()


UPSTASH = "-config -info -select -client|kill -script -acl -spublish -ssubscribe -cluster -pubsub"
"""More than Upstash's documentation says that its servers lack: see docs/how-to/redis.md."""


async def test_over_tls_at_a_server_with_a_hosted_ones_limits_two_stores_hear_each_other(
    folder: Path, database: Database
):
    """As Upstash is: TLS alone, the user `default`, one database, and a limit of a request's size,
    over which the connection ends here."""
    certfile, keyfile = certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile)
    with EmbeddedValkey(folder / "valkey", durable=False) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("client-query-buffer-limit", "1mb")
            admin.execute_command("ACL", "SETUSER", "default", *UPSTASH.split())

        async def pass_on(client: trio.abc.Stream) -> None:
            upstream = await trio.open_tcp_stream("127.0.0.1", server.port)
            async with upstream, trio.open_nursery() as nursery:
                nursery.start_soon(_copy, client, upstream, nursery.cancel_scope)
                nursery.start_soon(_copy, upstream, client, nursery.cancel_scope)

        (room,) = make_rooms(database)
        async with peer(pass_on, context) as port:
            url = f"rediss://default:{server.password}@127.0.0.1:{port}?ssl_ca_certs={certfile}"
            async with opened_store(database, url) as one, opened_store(database, url) as two:
                while not (one.store.feed.connected and two.store.feed.connected):
                    await trio.sleep(0.02)
                two.store.feed.want(room.channel_id)
                assert await two.store.feed.listening(room.channel_id, seconds=5)
                text = "a long word " * 600
                records = [await one.store.append(draft(room, text)) for _ in range(50)]
                while len(two.delivered) < len(records):
                    await trio.sleep(0.02)
                assert [record for _, record in two.delivered] == records
                # All of them at once: more than a request may have.
                writes: Any = [(room.channel_id, records, False)] * 3
                await one.store._recent.write(writes)
                assert await two.store._recent.read([room.channel_id]) == [records]
                assert one.store.redis.up and two.store.redis.up


async def _copy(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
    try:
        while data := await source.receive_some(65536):
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()
