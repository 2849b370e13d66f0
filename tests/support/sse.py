"""A small client for streams, on h11 and our own parser: it can be cut at any byte."""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import h11
import trio

from protocol.parser import EventStreamParser, ServerSentEvent

BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError)
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

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
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
        request = h11.Request(method="GET", target=path, headers=fields)
        data = self._http.send(request) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        await self._stream.send_all(data)
        response = await self._next()
        assert isinstance(response, h11.Response), response
        self.status = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}
        if self.status != 200:
            body = b""
            while isinstance(event := await self._next(), h11.Data):
                body += bytes(event.data)
            raise StreamRefused(self.status, body)

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._stream.receive_some(65536))
        return event  # type: ignore[return-value]

    async def read(self) -> list[ServerSentEvent] | None:
        """The next events, those of one read together; None when the server ended the stream.

        Raises:
            one of `BROKEN`: the connection broke.
        """
        while isinstance(event := await self._next(), h11.Data):
            if batch := self.parser.feed(bytes(event.data)):
                return batch
        return None

    def cut(self, *, reset: bool) -> None:
        """End the connection now, as a network would: with a RST, or a FIN."""
        if reset:
            linger = struct.pack("ii", 1, 0)
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._stream.socket.close()


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
    OSError, trio.BrokenResourceError, h11.RemoteProtocolError: no answer.
    """
    url = urlsplit(base_url)
    assert url.hostname is not None and url.port is not None
    stream = await trio.open_tcp_stream(url.hostname, url.port)
    try:
        client = StreamClient(stream)
        path = f"/api/chat/{channel_id}{query}"
        await client.open(url.netloc, path, token, last_id, headers or {})
        yield client
    finally:
        await trio.aclose_forcefully(stream)
