"""What a stream is written to: the socket itself where the server lets us, else ASGI's `send`."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Wire(Protocol):
    """A streamed response. `server.engine.wire.Wire` is one that owns its socket."""

    @property
    def chunked(self) -> bool:
        """Whether what is written must come as HTTP/1.1 chunks."""

    @property
    def gone(self) -> bool:
        """Whether the peer has left."""

    def write(self, data: bytes, /) -> bool:
        """Plain. False: some of it is kept, and goes first, at `flush` or the next write."""

    async def flush(self, *, seconds: float) -> None:
        """Until nothing is kept, or the peer is gone.

        Raises:
            trio.TooSlowError: the reader took nothing for so many seconds.
        """

    async def closed(self) -> None:
        """Until the peer has left."""

    def end(self) -> None:
        """Nothing follows what was written. Plain; `flush` brings it out."""


class AsgiWire:
    """A wire made of ASGI's `send` and `receive`: for TLS, HTTP/2 and other servers.

    Args:
        start: the response's `http.response.start`.
    """

    __slots__ = ("_ended", "_kept", "_receive", "_send", "_start", "gone")

    chunked = False

    def __init__(self, send: Send, receive: Receive, *, start: dict[str, Any]) -> None:
        self._send = send
        self._receive = receive
        self._start: dict[str, Any] | None = start
        self._kept: list[bytes] = []
        self._ended = False
        self.gone = False

    def write(self, data: bytes, /) -> bool:
        self._kept.append(data)
        return False

    async def flush(self, *, seconds: float) -> None:
        # Hypercorn sends under a shield: there it is TCP_USER_TIMEOUT that ends the wait. The start
        # has one of its own: cancelled, it would be lost, and the reason for the end with it.
        with trio.fail_after(seconds, shield=self._start is not None):
            try:
                await self._send_kept()
            except OSError:  # ASGI 2.4: so `send` says that the peer has left
                self.gone = True

    async def _send_kept(self) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        while self._kept or self._ended:
            body, self._kept = b"".join(self._kept), []
            more, self._ended = not self._ended, False
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def closed(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True

    def end(self) -> None:
        self._ended = True
