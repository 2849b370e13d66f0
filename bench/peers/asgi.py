"""The same broadcast for every ASGI server: GET /events, POST /publish, POST /answer.

Where the server offers `sottovoce.direct`, streams are written to directly. Elsewhere each
stream has a bounded queue, a task that empties it and one that watches for the peer's leaving:
the shape that ASGI's own means lead to.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import sniffio
import trio

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
GREETING = b":\n\n"
"""Servers may hold the headers back until there is a body."""

QUEUE_EVENTS = 256
"""That one stream may be behind; more are dropped, and the measurement says so."""


class DirectStream:
    """One reader whose server lets us write to the socket.

    Args:
        stream: what the extension's `open` gave.
        spawn: starts a task that outlives this call.
    """

    def __init__(self, stream: Any, spawn: Callable[[Callable[[], Awaitable[None]]], Any]) -> None:
        self._stream = stream
        self._spawn = spawn
        self._waiting: deque[bytes] = deque()
        self._blocked = False

    def offer(self, plain: bytes, chunked: bytes) -> None:
        data = chunked if self._stream.chunked else plain
        if self._blocked:
            if len(self._waiting) < QUEUE_EVENTS:
                self._waiting.append(data)
        elif not self._stream.write(data):
            self._blocked = True
            self._spawn(self._catch_up)

    async def _catch_up(self) -> None:
        await self._stream.flush()
        while self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            if not self._stream.write(data):
                await self._stream.flush()
        self._blocked = False


class TrioStream:
    """One reader behind ASGI `send`, under Trio."""

    def __init__(self) -> None:
        self._into: trio.MemorySendChannel[bytes]
        self._into, self._out = trio.open_memory_channel[bytes](QUEUE_EVENTS)

    def offer(self, plain: bytes) -> None:
        with suppress(trio.WouldBlock):
            self._into.send_nowait(plain)

    async def run(self, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, send)
            await _until_left(receive)
            nursery.cancel_scope.cancel()

    async def _write(self, send: Send) -> None:
        async for plain in self._out:
            await send({"type": "http.response.body", "body": plain, "more_body": True})


class AsyncioStream:
    """One reader behind ASGI `send`, under asyncio."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUE_EVENTS)

    def offer(self, plain: bytes) -> None:
        with suppress(asyncio.QueueFull):
            self._queue.put_nowait(plain)

    async def run(self, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        try:
            await _until_left(receive)
        finally:
            writer.cancel()

    async def _write(self, send: Send) -> None:
        while True:
            plain = await self._queue.get()
            await send({"type": "http.response.body", "body": plain, "more_body": True})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Broadcast:
    """One channel; everybody who asks for /events is on it."""

    def __init__(self) -> None:
        self._streams: set[TrioStream | AsyncioStream] = set()
        self._direct: set[DirectStream] = set()
        self._turn: list[bytes] = []
        self._nursery: trio.Nursery | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        match scope["type"], scope.get("path"):
            case "lifespan", _:
                await self._serve_lifespan(receive, send)
            case "http", "/events":
                await self._stream(scope, receive, send)
            case "http", "/publish":
                self._publish(await _body(receive))
                await _answer(send)
            case "http", _:
                await _body(receive)
                await _answer(send)

    unready: tuple[str, ...] = ()

    async def answer_full(self, scope: Message, receive: Receive, send: Send) -> None:
        """Part of what our worker asks of an application; these runs leave it room."""
        await self(scope, receive, send)

    async def drain(self, *, refuse: bool) -> None:
        """Part of what our worker asks of an application; there is nothing to wait for."""

    def set_enabled(self, enabled: bool) -> None:
        """Part of what our worker asks of an application; there is nothing to turn off."""

    def _publish(self, data: bytes) -> None:
        plain = b"data: %b\n\n" % data
        for stream in self._streams:
            stream.offer(plain)
        if self._direct:
            if not self._turn:
                assert self._nursery is not None
                self._nursery.start_soon(self._write_turn)
            self._turn.append(plain)

    async def _write_turn(self) -> None:
        """What came in one turn of the loop leaves in one write per stream."""
        plain = b"".join(self._turn)
        self._turn.clear()
        chunked = b"%x\r\n%b\r\n" % (len(plain), plain)
        for stream in self._direct:
            stream.offer(plain, chunked)

    async def _stream(self, scope: Message, receive: Receive, send: Send) -> None:
        direct = scope.get("extensions", {}).get("sottovoce.direct")
        if direct is not None:
            assert self._nursery is not None
            opened = direct["open"](200, HEADERS)
            stream = DirectStream(opened, self._nursery.start_soon)
            stream.offer(GREETING, b"%x\r\n%b\r\n" % (len(GREETING), GREETING))
            self._direct.add(stream)
            try:
                await opened.closed()
            finally:
                self._direct.discard(stream)
            return
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": GREETING, "more_body": True})
        queued = TrioStream() if sniffio.current_async_library() == "trio" else AsyncioStream()
        self._streams.add(queued)
        try:
            await queued.run(receive, send)
        finally:
            self._streams.discard(queued)

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        if sniffio.current_async_library() == "trio":
            async with trio.open_nursery() as self._nursery:
                await send({"type": "lifespan.startup.complete"})
                await receive()
                self._nursery.cancel_scope.cancel()
        else:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Send) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok\n"})


app = Broadcast()
