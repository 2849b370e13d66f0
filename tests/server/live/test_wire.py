"""What a stream is written to: every byte in order, no frame in another, and each wait ends."""

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from protocol.frames import chunk
from server.engine.wire import MAX_IGNORED, Wire
from server.live.wire import AsgiWire
from tests.server.live.fakes import dechunk

START = {"type": "http.response.start", "status": 200}
LARGE = 3 * 1024 * 1024
"""More than a socket's two buffers take."""


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Wire, trio.SocketStream]]:
    """Our side of a TCP connection, with a small buffer, and the other side."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
        peer = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        ours = await listener.accept()
        async with peer, ours:
            wire = Wire(ours)
            wire.chunked = True
            with trio.fail_after(20):
                yield wire, peer


async def read_all(peer: trio.SocketStream) -> bytes:
    return b"".join([data async for data in peer])


def fill(wire: Wire) -> bytes:
    """Write more than the kernel takes; what was written."""
    sent = chunk(bytes(range(97, 123)) * (LARGE // 26))
    assert not wire.write(sent)
    return sent


# A socket


async def test_what_the_kernel_takes_is_written_at_once():
    async with connected() as (wire, peer):
        with assert_no_checkpoints():
            assert wire.write(b"one")
            assert wire.write(b"two")
        assert await peer.receive_some(100) in (b"onetwo", b"one")
        await wire.flush(seconds=1)  # nothing is kept


async def test_what_it_does_not_take_is_kept_and_goes_first():
    async with connected() as (wire, peer):
        with assert_no_checkpoints():
            sent = fill(wire)
            for number in range(20):  # others try to get in between
                more = chunk(b"more-%d" % number)
                assert not wire.write(more)
                sent += more
        got = b""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal got
                got = await read_all(peer)

            nursery.start_soon(read)
            await wire.flush(seconds=5)
            last = chunk(b"last")
            assert wire.write(last)
            wire.half_close()
        assert got == sent + last
        assert dechunk(got).endswith(b"more-19last")


async def test_frames_are_whole_however_the_other_side_reads():
    chance = random.Random(7)
    async with connected() as (wire, peer):
        frames = [chunk(b"%06d" % n * chance.randrange(1, 3000)) for n in range(200)]
        got = b""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal got
                while data := await peer.receive_some(chance.choice([1, 7, 1000, 100_000])):
                    got += data

            nursery.start_soon(read)
            for data in frames:
                written = wire.write(data)
                if not written and chance.random() < 0.3:
                    await wire.flush(seconds=5)
            wire.end()
            await wire.flush(seconds=5)
            wire.half_close()
        assert got == b"".join(frames) + b"0\r\n\r\n"


async def test_a_flush_that_is_cancelled_loses_nothing():
    async with connected() as (wire, peer):
        sent, got = fill(wire), b""
        for _ in range(5):
            with trio.move_on_after(0.01) as scope:
                await wire.flush(seconds=5)
            assert scope.cancelled_caught
            got += await peer.receive_some(100_000)
        async with trio.open_nursery() as nursery:

            async def close() -> None:
                await wire.flush(seconds=5)
                wire.half_close()

            nursery.start_soon(close)
            assert got + await read_all(peer) == sent


async def test_a_head_goes_out_with_the_first_of_its_body():
    async with connected() as (wire, peer):
        wire.hold(b"head")
        await trio.sleep(0.02)
        with trio.move_on_after(0.02) as scope:
            await peer.receive_some()
        assert scope.cancelled_caught, "not by itself"
        assert wire.write(b"body")
        assert await peer.receive_some() == b"headbody"


async def test_a_reader_that_takes_nothing_is_too_slow():
    async with connected() as (wire, _):
        fill(wire)
        started = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await wire.flush(seconds=0.2)
        assert 0.2 <= trio.current_time() - started < 5
        assert not wire.gone


async def test_a_reader_that_takes_some_has_its_time_again():
    async with connected() as (wire, peer):
        fill(wire)
        wire.write(b"x" * LARGE)
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                while trio.current_time() - started < 1.6:
                    await trio.sleep(0.1)
                    await peer.receive_some(384 * 1024)
                await read_all(peer)

            nursery.start_soon(read)
            await wire.flush(seconds=1)
            wire.half_close()
        assert trio.current_time() - started > 1


@pytest.mark.parametrize("kept", [False, True], ids=["nothing kept", "some kept"])
async def test_a_reset_is_a_peer_that_is_gone(kept: bool):
    async with connected() as (wire, peer):
        if kept:
            fill(wire)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.closed)
            if kept:
                nursery.start_soon(lambda: wire.flush(seconds=5))
            await wait_all_tasks_blocked()
            linger = struct.pack("ii", 1, 0)
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            await peer.aclose()
        assert wire.gone
        with assert_no_checkpoints():
            for _ in range(5):
                assert wire.write(b"x" * LARGE), "to a peer that is gone all is written"
        await wire.flush(seconds=5)
        await wire.closed()


async def test_a_write_finds_that_the_peer_is_gone_and_does_not_raise():
    async with connected() as (wire, peer):
        linger = struct.pack("ii", 1, 0)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await peer.aclose()
        await trio.sleep(0.05)
        assert wire.write(b"x")
        assert wire.gone


async def test_the_end_of_what_the_peer_says_is_seen():
    async with connected() as (wire, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.closed)
            await wait_all_tasks_blocked()
            assert not wire.gone
            await peer.send_eof()
        assert wire.gone


async def test_what_a_peer_says_meanwhile_is_ignored_within_a_limit():
    async with connected() as (wire, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.closed)
            for _ in range(4):
                await peer.send_all(b"x" * (MAX_IGNORED // 4))
            await trio.sleep(0.1)
            assert not wire.gone
            assert wire.write(b"still here")
            await peer.send_all(b"x")
        assert wire.gone


async def test_the_end_comes_after_all_that_is_kept():
    async with connected() as (wire, peer):
        sent = fill(wire)
        wire.end()
        async with trio.open_nursery() as nursery:

            async def close() -> None:
                await wire.flush(seconds=5)
                wire.half_close()

            nursery.start_soon(close)
            assert await read_all(peer) == sent + b"0\r\n\r\n"


async def test_a_response_without_chunks_has_no_last_one():
    async with connected() as (wire, peer):
        wire.chunked = False
        wire.write(b"plain")
        wire.end()
        wire.half_close()
        assert await read_all(peer) == b"plain"


async def test_an_aborted_connection_is_reset_when_it_is_closed():
    async with connected() as (wire, peer):
        assert wire.write(b"some")
        wire.abort()
        assert wire.gone
        wire._socket.close()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(peer)


async def test_who_waits_to_read_sees_the_end_when_reading_stops():
    async with connected() as (wire, _):
        assert wire.read_now() is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.readable)
            await wait_all_tasks_blocked()
            wire.give_up()
        assert wire.read_now() == b""


# ASGI


class Server:
    """An ASGI server's side."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.answers = [{"type": "http.request"}, {"type": "http.disconnect"}]
        self.delay = 0.0
        self.broken = False

    async def send(self, message: dict[str, Any]) -> None:
        await trio.sleep(self.delay)
        if self.broken:
            raise OSError
        self.sent.append(message)

    async def receive(self) -> dict[str, Any]:
        await trio.sleep(1)
        return self.answers.pop(0)

    def wire(self) -> AsgiWire:
        return AsgiWire(self.send, self.receive, start=START)


def body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def test_what_waits_is_sent_as_one_body_after_the_start(autojump_clock):
    server = Server()
    wire = server.wire()
    with assert_no_checkpoints():
        assert not wire.write(b"a")
        assert not wire.write(b"b")
    assert server.sent == []
    await wire.flush(seconds=1)
    assert server.sent == [START, body(b"ab")]
    await wire.flush(seconds=1)
    assert len(server.sent) == 2, "nothing is kept"
    wire.write(b"c")
    wire.end()
    await wire.flush(seconds=1)
    assert server.sent[2:] == [body(b"c", more=False)]


async def test_what_is_written_while_it_sends_is_sent_next(autojump_clock):
    server = Server()
    server.delay = 1
    wire = server.wire()
    wire.write(b"a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: wire.flush(seconds=10))
        await trio.sleep(1.5)
        wire.write(b"b")
        wire.end()
    assert server.sent == [START, body(b"a"), body(b"b", more=False)]


async def test_a_server_that_does_not_take_it_is_too_slow(autojump_clock):
    server = Server()
    wire = server.wire()
    wire.write(b"a")
    await wire.flush(seconds=1)
    server.delay = 60
    wire.write(b"b")
    started = trio.current_time()
    with pytest.raises(trio.TooSlowError):
        await wire.flush(seconds=5)
    assert trio.current_time() - started == 5


async def test_a_start_is_sent_though_its_stream_is_cancelled_and_within_its_time(autojump_clock):
    server = Server()
    server.delay = 1
    wire = server.wire()
    wire.write(b"a")
    with trio.move_on_after(0.5):
        await wire.flush(seconds=5)
    assert server.sent == [START, body(b"a")]
    server.delay = 60
    stuck = server.wire()
    stuck.write(b"a")
    started = trio.current_time()
    with pytest.raises(trio.TooSlowError), trio.move_on_after(0.5):
        await stuck.flush(seconds=5)
    assert trio.current_time() - started == 5


async def test_a_server_that_says_so_means_a_peer_that_is_gone(autojump_clock):
    server = Server()
    server.broken = True
    wire = server.wire()
    wire.write(b"a")
    await wire.flush(seconds=5)
    assert wire.gone


async def test_it_is_over_when_the_server_says_disconnect(autojump_clock):
    wire, started = Server().wire(), trio.current_time()
    await wire.closed()
    assert trio.current_time() - started == 2, "the rest of the request was none"
    assert wire.gone
