"""The Redis client: pipelines against a real Valkey, and what a bad peer can do to it."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hiredis
import pytest
import redis
import trio

from protocol.confidential import Secret
from storage.embedded import EmbeddedValkey
from storage.redis.client import MAX_IDLE, Client, RedisLost, RedisRefused
from storage.store import REDIS_SECONDS
from tests.support.tcp_proxy import TcpProxy, open_proxy
from tests.support.wire import certificate

CANARY = "canary-words"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Client]:
    client = Client(Secret(url))
    try:
        yield client
    finally:
        client.close()


@asynccontextmanager
async def behind_proxy(url: str) -> AsyncIterator[tuple[TcpProxy, Client]]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    async with (
        open_proxy(parts.hostname, parts.port) as proxy,
        opened(url.replace(f":{parts.port}", f":{proxy.port}")) as client,
    ):
        yield proxy, client


async def test_a_pipeline_answers_each_command_in_order(redis_url: str):
    async with opened(redis_url) as client:
        commands: list[Any] = [("ZADD", "z", n, b"\r\n$%d" % n) for n in range(2000)]
        answers = await client.call([*commands, ("ZRANGE", "z", 0, -1), ("GET", "none")])
    assert answers[:2000] == [1] * 2000
    assert answers[2000] == [b"\r\n$%d" % n for n in range(2000)]
    assert answers[2001] is None


async def test_an_answer_of_megabytes_is_whole(redis_url: str):
    value = bytes(range(256)) * 20_000
    async with opened(redis_url) as client:
        assert await client.call([("SET", "big", value), ("GET", "big")]) == [b"OK", value]


async def test_an_error_is_raised_by_its_code_and_what_redis_repeats_is_not_kept(redis_url: str):
    async with opened(redis_url) as client:
        with pytest.raises(RedisRefused) as caught:
            await client.call([("SET", "a", "1"), (CANARY, CANARY), ("SET", "b", "2")])
        assert caught.value.code == "ERR"
        assert CANARY not in repr(caught.value) + str(caught.value)
        assert caught.value.__cause__ is None
        with pytest.raises(RedisRefused, match="WRONGTYPE"):
            await client.call([("ZADD", "a", 1, "x")])
        assert await client.call([("MGET", "a", "b")]) == [[b"1", b"2"]], "the rest was done"


async def test_connections_are_used_again_and_no_more_are_kept_than_needed(valkey: EmbeddedValkey):
    async with opened(valkey.url) as client, trio.open_nursery() as nursery:
        for _ in range(3 * MAX_IDLE):
            nursery.start_soon(client.call, [("PING",)])
        await trio.testing.wait_all_tasks_blocked(0.2)
        ((clients,),) = [await client.call([("CLIENT", "LIST")])]
        assert clients.count(b"name=sottovoce") == MAX_IDLE


async def test_a_connection_that_died_while_idle_is_replaced_unseen(redis_url: str):
    async with behind_proxy(redis_url) as (proxy, client):
        for _ in range(3):
            assert await client.call([("PING",)]) == [b"PONG"]
            proxy.cut()
            proxy.resume()
            await trio.sleep(0.05)


async def test_a_cancelled_call_leaves_no_answer_for_the_next(redis_url: str):
    async with behind_proxy(redis_url) as (proxy, client):
        await client.call([("SET", "a", "1"), ("SET", "b", "2")])
        proxy.stall()
        with trio.move_on_after(0.1) as scope:
            await client.call([("GET", "a")])
        assert scope.cancelled_caught
        proxy.resume()
        assert await client.call([("GET", "b")]) == [b"2"]


async def test_nobody_listening_is_lost_at_once():
    with trio.fail_after(REDIS_SECONDS), pytest.raises(RedisLost) as caught:
        async with opened("redis://127.0.0.1:1") as client:
            await client.call([("PING",)])
    assert caught.value.__suppress_context__


async def test_the_password_the_user_and_the_database_of_the_url_are_used(folder: Path):
    with EmbeddedValkey(folder / "valkey", durable=False) as server:
        where = server.url.split("//")[1].split("/")[0].rpartition("@")[2]
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("ACL SETUSER ada on >p@ss/word ~* &* +@all")
            admin.config_set("requirepass", "p@ss:2")
        for login in ("ada:p%40ss%2Fword", ":p%40ss%3A2"):
            async with opened(f"redis://{login}@{where}/3") as client:
                await client.call([("SET", "where", "three")])
            async with opened(f"redis://{login}@{where}?db=3") as client:
                assert await client.call([("GET", "where")]) == [b"three"]
            async with opened(f"redis://{login}@{where}") as client:
                assert await client.call([("GET", "where")]) == [None]
        for login in ("", "ada:wrong@", ":wrong@"):
            async with opened(f"redis://{login}{where}") as client:
                with pytest.raises(RedisLost):
                    await client.call([("SET", "x", "y")])


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
    ],
)
async def test_a_peer_that_is_no_redis_or_not_yet_one_is_lost(replies: list[bytes]):
    async def handler(stream: trio.abc.Stream) -> None:
        for reply in replies:
            await stream.receive_some(65536)
            await stream.send_all(reply)

    async with peer(handler) as port, opened(f"redis://127.0.0.1:{port}") as client:
        with pytest.raises(RedisLost):
            await client.call([("PING",)])


async def test_answers_in_any_pieces_are_the_same_answers():
    answer = b"+OK\r\n*2\r\n$3\r\na\r\n\r\n:7\r\n$-1\r\n"

    async def handler(stream: trio.abc.Stream) -> None:
        await stream.receive_some(65536)
        for index in range(len(answer)):
            await stream.send_all(answer[index : index + 1])
        await trio.sleep_forever()

    async with peer(handler) as port:
        client = Client(Secret(f"redis://127.0.0.1:{port}"))
        connection = await client.connect()
        try:
            assert await connection.call([("a",), ("b",)]) == [[b"a\r\n", 7], None]
        finally:
            connection.close()


async def test_rediss_speaks_tls_and_believes_only_who_can_prove_itself():
    certfile, keyfile = certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile)
    async with peer(says_ok, context) as port:
        url = f"rediss://127.0.0.1:{port}"
        for options in (f"?ssl_ca_certs={certfile}", "?ssl_cert_reqs=none"):
            async with opened(url + options) as client:
                for _ in range(3):
                    assert await client.call([("SET", "a", "1")]) == [b"OK"]
                assert len(client._idle) == 1, "used again"
        async with opened(url) as client:
            with pytest.raises(RedisLost):
                await client.call([("SET", "a", "1")])
