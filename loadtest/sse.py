"""One event stream over a gevent socket: as light as a client in Python can be.

llhttp (`httptools`) reads the response and `protocol/parser` its events. All streams receive into
one buffer: between a read and the end of its parsing no other greenlet runs. Nothing here has a
timer once a stream is open; whoever holds streams looks at `heard_at`.
"""

import contextlib
import struct
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import gevent
import httptools
from gevent import socket, ssl

from protocol.parser import EventStreamParser, ServerSentEvent

OPEN_SECONDS = 10.0
"""To connect and to get the response's head."""
BUFFER_BYTES = 64 * 1024
"""More than one read finds: the receive buffers of streams that keep up hold a few messages."""
ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER: a phone that loses its network says no goodbye, and leaves no port in TIME_WAIT."""

_buffer = memoryview(bytearray(BUFFER_BYTES))


class Refused(Exception):
    """The server answered with another status than 200.

    Attributes:
        status: the status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Ended(Exception):
    """The stream is over; `args` say how, without anything that a peer sent."""


class Target(NamedTuple):
    """Where the server is. Its name is looked up once, not for each of thousands of streams."""

    host: str
    family: int
    address: tuple[str, int]
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str) -> "Target":
        """
        Raises:
            ValueError: it is no http or https URL with a host.
            OSError: the host has no address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return cls(parts.hostname, family, address[:2], tls)


class Stream:
    """One connection, used once: `open`, then `read` until it raises.

    Args:
        target: the server.
        on_event: called with each event, in the greenlet that reads. Plain.
        receive_bytes: of SO_RCVBUF; None leaves it to the kernel.

    Attributes:
        opened_at: when the head of a 200 was there; None before. All times are on
            `time.monotonic`.
        heard_at: when bytes last came.
        parser: what the stream has said of `retry` and of its last id.
    """

    __slots__ = (
        "_http",
        "_on_event",
        "_receive_bytes",
        "_sock",
        "_target",
        "heard_at",
        "opened_at",
        "parser",
    )

    def __init__(
        self,
        target: Target,
        on_event: Callable[[ServerSentEvent], None],
        *,
        receive_bytes: int | None = None,
    ) -> None:
        self.parser = EventStreamParser()
        self.opened_at: float | None = None
        self.heard_at = time.monotonic()
        self._target = target
        self._on_event = on_event
        self._receive_bytes = receive_bytes
        self._sock: socket.socket | None = None
        self._http = httptools.HttpResponseParser(self)

    def open(self, path: str, token: str, *, cursor: str = "") -> None:
        """Connect, ask, and read until the head is there; events may have come with it.

        Raises:
            Refused, Ended, OSError
            TimeoutError: it took longer than `OPEN_SECONDS`.
        """
        last_id = f"Last-Event-ID: {cursor}\r\n" if cursor else ""
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {self._target.host}\r\n"
            f"Accept: text/event-stream\r\nCache-Control: no-store\r\n"
            f"Authorization: Bearer {token}\r\n{last_id}\r\n"
        )
        with gevent.Timeout(OPEN_SECONDS, TimeoutError(f"not open after {OPEN_SECONDS:.0f} s")):
            self._sock = self._connect()
            self._sock.sendall(request.encode())
            while self.opened_at is None:
                self.read(BUFFER_BYTES)

    def read(self, size: int = BUFFER_BYTES) -> int:
        """Wait for bytes and take them, at most `size`; how many they were.

        Raises:
            Refused, Ended, OSError
        """
        assert self._sock is not None
        count: int = self._sock.recv_into(_buffer[:size])
        if not count:
            raise Ended("the server closed the connection")
        self.heard_at = time.monotonic()
        try:
            self._http.feed_data(_buffer[:count])
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, Refused | Ended):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError:
            raise Ended("the response is no HTTP") from None
        return count

    def close(self) -> None:
        """Go away in silence; a greenlet that reads gets an error. Again is no error."""
        if self._sock is not None:
            with contextlib.suppress(OSError):  # the peer was first
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            self._sock.close()

    def _connect(self) -> socket.socket:
        target = self._target
        sock = socket.socket(target.family, socket.SOCK_STREAM)
        try:
            if self._receive_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
            sock.connect(target.address)
            if target.tls is None:
                return sock
            return target.tls.wrap_socket(sock, server_hostname=target.host)
        except BaseException:
            sock.close()
            raise

    # What httptools calls

    def on_headers_complete(self) -> None:
        status = self._http.get_status_code()
        if status != 200:
            raise Refused(status)
        self.opened_at = time.monotonic()

    def on_body(self, body: bytes) -> None:
        for event in self.parser.feed(body):
            self._on_event(event)

    def on_message_complete(self) -> None:
        raise Ended("the server ended the stream")
