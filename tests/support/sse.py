"""A small client for streams, on our own parser: it can be cut at any byte."""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import trio

from protocol.parser import EventStreamParser, ServerSentEvent
from tests.support.wire import WIRE, Broken, End, Head, Tls, socket_of

BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, Broken)
"""How a connection that ended badly shows."""


class StreamRefused(Exception):
    """The server answered with a status that is not 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class StreamClient:
    """One connection to one stream.

    Attributes:
        parser: holds the last event id and the retry time.
    """

    def __init__(self, stream: trio.SocketStream | Tls) -> None:
        self._stream = stream
        self._http = WIRE.http()
        self.parser = EventStreamParser()
        self.status = 0
        self.headers: dict[str, str] = {}

    async def open(
        self, host: str, path: str, token: str | None, last_id: str, headers: dict[str, str]
    ) -> None:
        fields = [("host", host), ("accept", "text/event-stream"), *headers.items()]
        if token:
            fields.append(("authorization", f"Bearer {token}"))
        if last_id:
            fields.append(("last-event-id", last_id))
        await self._stream.send_all(self._http.request("GET", path, fields))
        head = await self._next()
        assert isinstance(head, Head), head
        self.status = head.status
        self.headers = dict(head.headers)
        if self.status != 200:
            body = b""
            while isinstance(part := await self._next(), bytes):
                body += part
            raise StreamRefused(self.status, body)

    async def _next(self) -> Head | bytes | End:
        while (part := self._http.next()) is None:
            if answer := self._http.receive(await self._stream.receive_some(65536)):
                await self._stream.send_all(answer)
        return part

    async def read(self) -> list[ServerSentEvent] | None:
        """The next events, those of one read together; None when the server ended the stream.

        Raises:
            one of `BROKEN`: the connection broke.
        """
        while isinstance(part := await self._next(), bytes):
            if batch := self.parser.feed(part):
                return batch
        return None

    def cut(self, *, reset: bool) -> None:
        """End the connection now, as a network would: with a RST, or a FIN."""
        sock = socket_of(self._stream)
        if reset:
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()


@contextlib.asynccontextmanager
async def open_stream(
    base_url: str,
    channel_id: int,
    token: str | None,
    *,
    last_id: str = "",
    query: str = "",
    headers: dict[str, str] | None = None,
) -> AsyncIterator[StreamClient]:
    """Raises:
    StreamRefused
    one of `BROKEN`: no answer.
    """
    url = urlsplit(base_url)
    assert url.hostname is not None and url.port is not None
    stream = await WIRE.open(url.hostname, url.port)
    try:
        client = StreamClient(stream)
        path = f"/api/chat/{channel_id}{query}"
        await client.open(url.netloc, path, token, last_id, headers or {})
        yield client
    finally:
        await trio.aclose_forcefully(stream)
