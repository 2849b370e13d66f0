"""One plain-text connection's socket, without a layer between: all reading and all writing.

Everything that can happen to a write happens here: a part of it taken, nothing taken, a reset, a
peer that is gone. What was not taken is kept and goes before anything else, so no byte of
another frame can come between the halves of one.
"""

import socket
import struct
from contextlib import suppress

import trio

MAX_READ = 64 * 1024
MAX_IGNORED = 64 * 1024
"""Bytes that a client may send while it is given a stream; more is no client of ours."""


class Wire:
    """An accepted connection; whoever accepted it closes it.

    For an application it is what a streamed response is written to: the ASGI extension
    `sottovoce.direct`, see `http1`.

    Attributes:
        chunked: whether what is written must come as HTTP/1.1 chunks (RFC 9112 §7.1).
        gone: the peer has left, or the connection is of no use any more.
    """

    __slots__ = ("_rest", "_socket", "chunked", "gone")

    def __init__(self, stream: trio.SocketStream) -> None:
        # Trio's own socket has no plain `send`; a second descriptor could outlive the first.
        self._socket: socket.socket = stream.socket._sock  # type: ignore[attr-defined]
        self._rest = b""
        self.chunked = False
        self.gone = False

    def hold(self, data: bytes) -> None:
        """Keep this for the next write: a head goes out with the first of its body."""
        self._rest += data

    def write(self, data: bytes) -> bool:
        """Hand bytes to the kernel. Plain, and never raises.

        Returns:
            False: some of them are kept, until `flush` or the next write. Nothing bounds what is
            kept but the caller. To a peer that is gone all is written.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.gone = True
            return True
        if sent == len(data):
            return True
        self._rest = data[sent:]
        return False

    async def flush(self, *, seconds: float) -> None:
        """Until what is kept is written, or the peer is gone.

        Raises:
            trio.TooSlowError: the peer took nothing for so many seconds.
        """
        while self._rest and not self.gone:
            with trio.fail_after(seconds):
                await trio.lowlevel.wait_writable(self._socket)
            self.write(b"")

    def read_now(self) -> bytes | None:
        """What has arrived; empty at the end; None: nothing yet. Plain."""
        try:
            return self._socket.recv(MAX_READ)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    async def readable(self) -> None:
        """Until `read_now` has something to say."""
        await trio.lowlevel.wait_readable(self._socket)

    async def closed(self) -> None:
        """Until the peer has left. What it sends meanwhile is dropped, within a limit."""
        ignored = 0
        while not self.gone:
            await trio.lowlevel.wait_readable(self._socket)
            data = self.read_now()
            if data is not None:
                ignored += len(data)
                self.gone = not data or ignored > MAX_IGNORED

    def end(self) -> None:
        """The end of a streamed response. Plain."""
        self.write(b"0\r\n\r\n" if self.chunked else b"")

    def half_close(self) -> None:
        """Say that nothing more is written. Plain."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Have the connection reset when it is closed: its response is not whole. Plain."""
        self.gone = True
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def give_up(self) -> None:
        """Have whoever waits to read see the end. Plain."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
