"""The proxy does what the failure tests believe of it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from bench.faults.proxy import TcpProxy, open_proxy
from bench.faults.proxy_process import ProxyProcess, open_proxy_process


@asynccontextmanager
async def proxy_before_an_echo() -> AsyncIterator[TcpProxy]:
    async def echo(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, listeners)
        async with open_proxy("127.0.0.1", listeners[0].socket.getsockname()[1]) as proxy:
            with trio.fail_after(10):
                yield proxy
        nursery.cancel_scope.cancel()


async def connect(proxy: TcpProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", proxy.port)


async def ask(stream: trio.SocketStream, words: bytes) -> bytes:
    await stream.send_all(words)
    answer = b""
    while len(answer) < len(words):
        data = await stream.receive_some()
        assert data, "the stream ended early"
        answer += data
    return answer


async def test_it_passes_everything_both_ways_and_the_end_too():
    words = bytes(range(256)) * 4000  # many chunks
    async with proxy_before_an_echo() as proxy, await connect(proxy) as stream:
        answer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, words)
            while len(answer) < len(words):
                answer += await stream.receive_some()
        assert answer == words
        await stream.send_eof()
        assert await stream.receive_some() == b""
        assert proxy.accepted == 1
        await wait_all_tasks_blocked(0.05)
        assert proxy.open_connections == 0


async def test_a_cut_resets_what_is_open_and_refuses_what_comes_until_it_resumes():
    async with proxy_before_an_echo() as proxy:
        async with await connect(proxy) as stream:
            assert await ask(stream, b"before") == b"before"
            proxy.cut()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        for _ in range(3):
            with pytest.raises(OSError, match="connect"):
                await connect(proxy)
        proxy.cut()
        port = proxy.port
        proxy.resume()
        assert proxy.port == port
        async with await connect(proxy) as stream:
            assert await ask(stream, b"after") == b"after"
        assert proxy.accepted == 2


async def test_it_can_be_cut_in_the_moment_in_which_it_resumes():
    async with proxy_before_an_echo() as proxy:
        for _ in range(3):
            proxy.cut()
            await wait_all_tasks_blocked()
            proxy.resume()
            proxy.cut()
            await wait_all_tasks_blocked()
        proxy.resume()
        async with await connect(proxy) as stream:
            assert await ask(stream, b"after") == b"after"


async def test_a_stall_holds_both_directions_and_loses_nothing():
    async with proxy_before_an_echo() as proxy, await connect(proxy) as old:
        assert await ask(old, b"before") == b"before"
        proxy.stall()
        async with await connect(proxy) as new:
            for stream in (old, new):
                await stream.send_all(b"held")
                with trio.move_on_after(0.05) as scope:
                    await stream.receive_some()
                assert scope.cancelled_caught
            proxy.resume()
            for stream in (old, new):
                assert await stream.receive_some() == b"held"


async def test_a_stalled_connection_can_be_cut():
    async with proxy_before_an_echo() as proxy, await connect(proxy) as stream:
        proxy.stall()
        await stream.send_all(b"lost")
        proxy.cut()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_a_delay_holds_each_piece_in_both_directions():
    async with proxy_before_an_echo() as proxy, await connect(proxy) as stream:
        proxy.delay = 0.05
        began = trio.current_time()
        assert await ask(stream, b"late") == b"late"
        assert trio.current_time() - began >= 0.1


async def test_a_server_that_does_not_answer_ends_the_clients_connection():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen
        async with open_proxy(*deaf.getsockname()) as proxy, await connect(proxy) as stream:
            with trio.fail_after(10):
                assert await stream.receive_some() == b""


async def test_leaving_the_block_ends_connections_and_frees_the_port():
    async with proxy_before_an_echo() as proxy:
        stream = await connect(proxy)
        await ask(stream, b"open")
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    await stream.aclose()
    with pytest.raises(OSError, match="connect"):
        await connect(proxy)


async def test_data_comes_a_piece_at_a_time_when_told(monkeypatch: pytest.MonkeyPatch):
    async with proxy_before_an_echo() as proxy, await connect(proxy) as stream:
        assert await ask(stream, b"whole") == b"whole"
        sent: list[bytes] = []
        send_all = trio.SocketStream.send_all

        async def record(self: trio.SocketStream, data: bytes) -> None:
            sent.append(data)
            await send_all(self, data)

        proxy.piece = 1
        # What was written, not what is read: a socket joins pieces that wait in it.
        monkeypatch.setattr(trio.SocketStream, "send_all", record)
        await stream.send_all(b"abc")
        answer = b""
        while len(answer) < 3:
            answer += await stream.receive_some()
        assert answer == b"abc"
        assert {b"a", b"b", b"c"} <= set(sent)


async def test_new_connections_go_to_a_new_target():
    async def say(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    async with proxy_before_an_echo() as proxy, trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say, listeners)
        proxy.target = ("127.0.0.1", listeners[0].socket.getsockname()[1])
        async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream:
            assert await stream.receive_some() == b"hello"
        nursery.cancel_scope.cancel()


async def test_one_in_a_process_of_its_own_is_told_the_same_and_ends_with_the_block():
    async def say(words: bytes, stream: trio.SocketStream) -> None:
        await stream.send_all(words)
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()

    async def heard(proxy: ProxyProcess) -> bytes:
        async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream:
            return bytes(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        ports = []
        for words in (b"one", b"two"):
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, partial(say, words), listeners)
            ports.append(listeners[0].socket.getsockname()[1])
        with trio.fail_after(30):
            async with open_proxy_process("127.0.0.1", ports[0]) as proxy:
                assert await heard(proxy) == b"one"
                async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as stream:
                    assert await stream.receive_some() == b"one"
                    proxy.cut()
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()
                with pytest.raises(OSError, match="connect"):
                    await heard(proxy)
                proxy.target = ("127.0.0.1", ports[1])
                proxy.resume()
                assert await heard(proxy) == b"two"
                proxy.stall()
                with trio.move_on_after(0.1) as scope:
                    await heard(proxy)
                assert scope.cancelled_caught
                proxy.resume()
                proxy.delay = 0.2
                began = trio.current_time()
                assert await heard(proxy) == b"two"
                assert trio.current_time() - began >= 0.2
                assert proxy.delay == 0.2
            with pytest.raises(OSError, match="connect"):
                await heard(proxy)
        nursery.cancel_scope.cancel()
