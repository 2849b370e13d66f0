"""A browser's part of the wire, as little as it takes: POSTs on a kept connection, and streams.

httptools reads the responses: the server has it already.
"""

import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httptools
import msgspec
import trio

from protocol.events import CLOSING
from protocol.parser import EventStreamParser, ServerSentEvent

READ_BYTES = 65536
REFUSED_SECONDS = 1.0
"""Stayed away after a stream that closed before it began: less than the servers ask for, which is
harder on them."""
CONNECT_SECONDS = 3.0
BROKEN = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    httptools.HttpParserError,
    EOFError,
)
"""How a connection that ended badly shows."""


class _Response:
    """What httptools tells of one response."""

    def __init__(self, on_body: Callable[[bytes], None]) -> None:
        self.on_body = on_body
        self.parser: Any = httptools.HttpResponseParser(self)
        self.status = 0
        self.retry_after = 0.0
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = float(value)

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_message_complete(self) -> None:
        self.complete = True


async def _connect(port: int) -> trio.SocketStream:
    with trio.fail_after(CONNECT_SECONDS):
        return await trio.open_tcp_stream("127.0.0.1", port)


class Poster:
    """Sends JSON over one connection, opened when it is needed and again when it broke."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token
        self._port = 0
        self._stream: trio.SocketStream | None = None

    async def post(
        self, port: int, path: str, body: object, *, seconds: float
    ) -> tuple[int, bytes]:
        """(status, body)

        Raises:
            one of `BROKEN`: the outcome is unknown.
        """
        if self._port != port:
            await self.aclose()
        raw = msgspec.json.encode(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._token()}\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        whole = False
        parts: list[bytes] = []
        response = _Response(parts.append)
        try:
            if self._stream is None:
                self._stream, self._port = await _connect(port), port
            with trio.fail_after(seconds):
                await self._stream.send_all(head.encode() + raw)
                while not response.complete:
                    data = await self._stream.receive_some(READ_BYTES)
                    if not data:
                        raise EOFError
                    response.parser.feed_data(data)
            whole = bool(response.parser.should_keep_alive())
            return response.status, b"".join(parts)
        finally:
            if not whole:
                await self.aclose()

    async def aclose(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await trio.aclose_forcefully(stream)


class EventStream:
    """One connection of a stream, as an async context manager.

    Attributes:
        status: of the response.
    """

    def __init__(self, port: int, path: str, token: str, last_id: str) -> None:
        self._port = port
        resume = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        self._head = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {token}\r\n{resume}\r\n"
        )
        self._events: list[ServerSentEvent] = []
        self._parser = EventStreamParser()
        self._response = _Response(self._feed)
        self._stream: trio.SocketStream | None = None
        self._greeted = False
        self.frozen = trio.Event()
        self.frozen.set()

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def retry_after(self) -> float:
        """Seconds to stay away after a refusal; 0 where there was none."""
        return self._response.retry_after

    def _feed(self, data: bytes) -> None:
        if self.status == 200:
            events = self._parser.feed(data)
            if not self._greeted and events and events[0].event == CLOSING:
                self._response.retry_after = REFUSED_SECONDS
            self._greeted |= bool(events)
            self._events += events

    async def __aenter__(self) -> "EventStream":
        self._stream = await _connect(self._port)
        try:
            await self._stream.send_all(self._head.encode())
        except BaseException:
            await trio.aclose_forcefully(self._stream)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)

    async def read(self, *, seconds: float) -> list[ServerSentEvent] | None:
        """The next events, those of one read together; None at the response's end.

        Raises:
            one of `BROKEN`; TooSlowError: nothing came for so long, not even a heartbeat.
        """
        assert self._stream is not None
        while not self._events:
            if self._response.complete:
                return None
            await self.frozen.wait()
            with trio.fail_after(seconds):
                data = await self._stream.receive_some(READ_BYTES)
            if not data:
                return None
            self._response.parser.feed_data(data)
        events, self._events = self._events, []
        return events

    def reset(self) -> None:
        """End the connection with a RST, as a machine does that was switched off. Plain."""
        self._linger()
        self._shut()

    def half_close(self) -> None:
        """Say that nothing more is sent, and read on. Plain."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.socket._sock.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]

    async def freeze(self, seconds: float) -> None:
        """Read nothing for so long."""
        self.frozen = trio.Event()
        await trio.sleep(seconds * random.uniform(0.5, 1.0))
        self.frozen.set()

    def _linger(self) -> None:
        if self._stream is not None:
            with suppress(OSError):
                no_time = struct.pack("ii", 1, 0)
                self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_time)

    def _shut(self) -> None:
        if self._stream is not None:
            self._stream.socket.close()
