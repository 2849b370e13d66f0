"""Thousands of open streams and a steady beat of requests, from one process with one epoll.

It parses nothing while it runs: it keeps what each stream said, and when it was told to go.
"""

import contextlib
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

OPENING = 128
PATIENCE_SECONDS = 30.0
CLOSING = b"event: closing\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"

_RESET = struct.pack("ii", 1, 0)
_GREETED = b'"connected"'


class Listener:
    """One stream, from its request to whatever ends it.

    Attributes:
        said: every byte of the response, head and chunk sizes included.
        told_at: when it was told that it ends; of `time.monotonic`, as every time here.
        ended_at: when its connection ended.
        reset: by a RST.
    """

    __slots__ = ("ended_at", "request", "reset", "said", "sock", "told_at")

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.said = bytearray()
        self.told_at: float | None = None
        self.ended_at: float | None = None
        self.reset = False
        self.sock: socket.socket | None = None

    @property
    def seqs(self) -> list[int]:
        return [int(seq) for seq in re.findall(rb"\nid: (\d+)\n", self.said)]

    @property
    def closing(self) -> tuple[str, int] | None:
        """(reason, retry in milliseconds) of its last event."""
        pattern = rb'event: closing\nretry: (\d+)\ndata: \{"reason":"(\w+)","reconnect":true\}\n\n'
        found = re.search(pattern, self.said)
        return None if found is None else (found[2].decode(), int(found[1]))

    @property
    def whole(self) -> bool:
        """It ended as HTTP ends a response, and was not broken off."""
        return self.ended_at is not None and not self.reset and self.said.endswith(LAST_CHUNK)


class Ask:
    """One request and its answer.

    Attributes:
        about: whatever the caller wants to find it by.
        ended_at: when its answer was whole, or there was to be none.
        refused: no connection was made for it.
    """

    __slots__ = ("about", "began", "ended_at", "raw", "refused", "request")

    def __init__(self, request: bytes, about: Any) -> None:
        self.request = request
        self.about = about
        self.began = time.monotonic()
        self.ended_at: float | None = None
        self.refused = False
        self.raw = b""

    @property
    def status(self) -> int:
        """0: none came."""
        return int(self.raw[9:12]) if self.complete else 0

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    def header(self, name: bytes) -> bytes | None:
        found = re.search(rb"\r\n" + name + rb": ([^\r]*)\r\n", self.raw, re.IGNORECASE)
        return None if found is None else found[1]

    @property
    def complete(self) -> bool:
        length = self.header(b"content-length")
        head, end, body = self.raw.partition(b"\r\n\r\n")
        if not end:
            return False
        if length is None:  # a stream, which must not have begun here: its head says it all
            return head.startswith(b"HTTP/1.1 200")
        return len(body) >= int(length)


class Audience:
    """Everybody at one address."""

    def __init__(self, port: int) -> None:
        self.listeners: list[Listener] = []
        self.asked: list[Ask] = []
        self._address = ("127.0.0.1", port)
        self._epoll = select.epoll()
        self._streams: dict[int, Listener] = {}
        self._busy: dict[int, tuple[socket.socket, Ask]] = {}
        self._free: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        streams = [listener.sock for listener in self.listeners if listener.sock is not None]
        for sock in [*streams, *self._free, *(sock for sock, _ in self._busy.values())]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
        self._epoll.close()

    @property
    def answers_due(self) -> int:
        return len(self._busy)

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    def listen(self, requests: Sequence[bytes]) -> list[Listener]:
        """A stream for each; returns when all of them have been greeted."""
        new = [Listener(request) for request in requests]
        self.listeners += new
        deadline = time.monotonic() + PATIENCE_SECONDS
        waiting, opening = list(reversed(new)), set[Listener]()
        while waiting or opening:
            while waiting and len(opening) < OPENING:
                listener = waiting.pop()
                listener.sock = socket.create_connection(self._address, PATIENCE_SECONDS)
                listener.sock.setblocking(False)
                listener.sock.send(listener.request)
                self._streams[listener.sock.fileno()] = listener
                self._epoll.register(listener.sock.fileno(), select.EPOLLIN)
                opening.add(listener)
            self.turn(0.2)
            for listener in [one for one in opening if _GREETED in one.said]:
                opening.remove(listener)
            assert not any(one.ended_at for one in opening), "a stream was refused"
            assert time.monotonic() < deadline, "the streams did not open"
        return new

    def ask(self, request: bytes, about: Any = None, *, fresh: bool = False) -> Ask:
        """Send it on a free connection, or on one made for it.

        Args:
            fresh: on one made for it in any case.
        """
        ask = Ask(request, about)
        self.asked.append(ask)
        try:
            sock = self._free.pop() if self._free and not fresh else self._connect()
        except OSError:
            ask.refused, ask.ended_at = True, time.monotonic()
            return ask
        self._busy[sock.fileno()] = (sock, ask)
        with contextlib.suppress(OSError):  # what is wrong is seen in reading
            sock.send(request)
        return ask

    def turn(self, seconds: float) -> None:
        """Take what has arrived; wait for it at most so long."""
        for fd, _ in self._epoll.poll(seconds, 4096):
            if fd in self._streams:
                self._hear(fd, self._streams[fd])
            elif fd in self._busy:
                self._take(fd, *self._busy[fd])
            else:  # closed while nothing was asked on it
                for sock in [sock for sock in self._free if sock.fileno() == fd]:
                    self._free.remove(sock)
                    sock.close()

    def until(self, condition: Callable[[], object], *, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
            self.turn(0.05)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, PATIENCE_SECONDS)
        sock.setblocking(False)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return sock

    def _hear(self, fd: int, listener: Listener) -> None:
        assert listener.sock is not None
        try:
            data = listener.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data, listener.reset = b"", True
        listener.said += data
        if listener.told_at is None and CLOSING in listener.said:
            listener.told_at = time.monotonic()
        if not data:
            listener.ended_at = time.monotonic()
            listener.sock.close()
            listener.sock = None
            del self._streams[fd]

    def _take(self, fd: int, sock: socket.socket, ask: Ask) -> None:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        ask.raw += data
        if data and not ask.complete:
            return
        ask.ended_at = time.monotonic()
        del self._busy[fd]
        if data and ask.header(b"connection") is None and ask.header(b"content-length"):
            self._free.append(sock)
        else:
            sock.close()
