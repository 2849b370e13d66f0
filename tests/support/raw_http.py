"""Our HTTP/1.1 engine on a loopback port, around any ASGI application, and a client that sends it
bytes and reads answers. No worker, no database: what is tested is what is on the wire.
"""

import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from server.engine.http1 import Engine, Limits
from server.engine.worker import _HypercornLog

SECONDS = 5.0
"""That a test waits for what must come."""
ROOMY = Limits(connections=100)

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    """By lower-case name; none comes twice here."""
    body: bytes


class Cut(Exception):
    """The connection ended before the answer was whole."""


class Client:
    """A connection to the engine."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._kept = b""

    async def send(self, *parts: bytes) -> None:
        """Each part with a write of its own."""
        for part in parts:
            await self.stream.send_all(part)

    async def answer(self, *, to: str = "GET") -> Answer:
        """The next answer.

        Args:
            to: the method that was asked with.

        Raises:
            Cut: it is not whole.
            trio.BrokenResourceError: the connection was reset.
        """
        with trio.fail_after(SECONDS):
            while b"\r\n\r\n" not in self._kept:
                await self._read()
            head, self._kept = self._kept.split(b"\r\n\r\n", 1)
            line, *fields = head.split(b"\r\n")
            status = int(line.split(b" ", 2)[1])
            headers: dict[bytes, bytes] = {}
            for field in fields:
                name, value = field.split(b": ", 1)
                assert name.lower() not in headers, name
                headers[name.lower()] = value
            if to == "HEAD" or status < 200 or status in (204, 304):
                return Answer(status, headers, b"")
            return Answer(status, headers, await self._body(headers))

    async def _body(self, headers: dict[bytes, bytes]) -> bytes:
        if headers.get(b"transfer-encoding") == b"chunked":
            assert b"content-length" not in headers
            body = b""
            while part := await self.chunk():
                body += part
            return body
        if b"content-length" in headers:
            return await self._take(int(headers[b"content-length"]))
        return await self.rest()

    async def chunk(self) -> bytes:
        """The next chunk's data; empty is the last."""
        with trio.fail_after(SECONDS):
            while b"\r\n" not in self._kept:
                await self._read()
            size, self._kept = self._kept.split(b"\r\n", 1)
            assert re.fullmatch(rb"[0-9a-f]+", size), size
            data = await self._take(int(size, 16) + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def read(self, until: bytes) -> bytes:
        """All up to `until`, which comes."""
        with trio.fail_after(SECONDS):
            while until not in self._kept:
                await self._read()
        found, self._kept = self._kept.split(until, 1)
        return found + until

    async def rest(self) -> bytes:
        """All up to the end of the connection.

        Raises:
            trio.BrokenResourceError: the connection was reset.
        """
        with trio.fail_after(SECONDS):
            while data := await self.stream.receive_some(65536):
                self._kept += data
        rest, self._kept = self._kept, b""
        return rest

    async def ended(self) -> None:
        """The connection is over, one way or the other, and nothing more came."""
        try:
            rest = await self.rest()
        except trio.BrokenResourceError:
            rest = self._kept
        assert rest == b""

    def reset(self) -> None:
        """Be gone at once, as a client that crashed."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def _take(self, size: int) -> bytes:
        while len(self._kept) < size:
            await self._read()
        taken, self._kept = self._kept[:size], self._kept[size:]
        return taken

    async def _read(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise Cut
        self._kept += data


class Served:
    """An engine with a port.

    Attributes:
        engine: whose limits and counts a test looks at.
        listener: whose options new connections inherit.
    """

    def __init__(self, engine: Engine, listener: trio.SocketListener) -> None:
        self.engine = engine
        self.listener = listener
        self.port: int = listener.socket.getsockname()[1]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        try:
            yield Client(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def ask(self, *parts: bytes, to: str = "GET") -> Answer:
        """One answer, on a connection of its own."""
        async with self.connect() as client:
            await client.send(*parts)
            return await client.answer(to=to)


@asynccontextmanager
async def serving(app: App, limits: Limits = ROOMY) -> AsyncIterator[Served]:
    """The engine around `app` while the block lasts."""
    engine = Engine(app, limits)
    wrapped: Any = app
    config = Config()
    logger: Any = _HypercornLog
    config.logger_class = logger
    serve = partial(engine.serve_connection, ASGIWrapper(wrapped), config, WorkerContext(None), {})
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(partial(trio.serve_listeners, serve, [listener]))
        nursery.start_soon(engine.sweep)
        yield Served(engine, listener)
        nursery.cancel_scope.cancel()


class Seen(NamedTuple):
    """A request as the application got it."""

    method: str
    path: str
    body: bytes
    query: bytes = b""


class Recorder:
    """An application that remembers each request, and answers with its method, path and body.

    Attributes:
        seen: the requests whose bodies came to their ends.
        begun: the paths of all requests.
        lost: the paths of requests that ended before their bodies did.
        scopes: of all requests.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.begun: list[str] = []
        self.lost: list[str] = []
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        path = scope["path"]
        self.begun.append(path)
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.lost.append(path)
                return
            body += message["body"]
            more = message["more_body"]
        self.seen.append(Seen(scope["method"], path, body, scope["query_string"]))
        await respond(send, f"{scope['method']} {path} ".encode() + body)


async def respond(
    send: Any, body: bytes = b"", *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """A whole ASGI response."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
