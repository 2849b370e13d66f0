"""A TCP proxy before a real server, which can cut, stall and slow down what goes through it."""

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

CHUNK_BYTES = 64 * 1024
CONNECT_SECONDS = 5.0

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close sends RST, not FIN


class TcpProxy:
    """What a test does to the connections. All of it is plain: it takes effect at once.

    Attributes:
        port: where clients connect, on 127.0.0.1.
        target: whom new connections go to, (host, port).
        delay: seconds that each piece of data is held back, in both directions.
        piece: bytes that are passed on at a time, each in a segment of its own; None: all.
        accepted: connections taken so far.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self.delay = 0.0
        self.piece: int | None = None
        self.accepted = 0
        self.target = (target_host, target_port)
        # Bound and never listening: it keeps the port ours while connections are refused.
        self._placeholder = _bound_socket(0)
        self.port: int = self._placeholder.getsockname()[1]
        self._listener: trio.SocketListener | None = None
        self._listening = trio.Event()
        self._flowing = trio.Event()
        self._live: dict[trio.CancelScope, trio.SocketStream] = {}
        self.resume()

    @property
    def open_connections(self) -> int:
        return len(self._live)

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `resume`."""
        if self._listener is not None:
            self._listening = trio.Event()
            self._listener.socket.close()
            self._listener = None
        for scope, client in self._live.items():
            scope.cancel()
            _reset(client)

    def stall(self) -> None:
        """Keep connections and take new ones, and pass nothing on, until `resume`."""
        if self._flowing.is_set():
            self._flowing = trio.Event()

    def resume(self) -> None:
        """Be an ordinary proxy again. What was cut stays cut; what was held goes on."""
        self._flowing.set()
        if self._listener is None:
            sock = _bound_socket(self.port)
            sock.listen(128)
            self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            self._listening.set()

    def _close(self) -> None:
        self.cut()
        self._placeholder.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._listening.wait()
                if self._listener is None:  # cut again, before this task had its turn
                    continue
                with suppress(trio.ClosedResourceError):  # cut
                    client = await self._listener.accept()
                    self.accepted += 1
                    nursery.start_soon(self._serve, client)

    async def _serve(self, client: trio.SocketStream) -> None:
        """One client's connection, from its start to its end."""
        with trio.CancelScope() as scope:
            self._live[scope] = client
            try:
                async with client:
                    with trio.fail_after(CONNECT_SECONDS):
                        server = await trio.open_tcp_stream(*self.target)
                    async with server, trio.open_nursery() as nursery:
                        nursery.start_soon(self._pass_on, client, server)
                        nursery.start_soon(self._pass_on, server, client)
            except* (
                OSError,
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.TooSlowError,
            ):
                pass  # one side is gone, and now both are
            finally:
                del self._live[scope]

    async def _pass_on(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            while data := await source.receive_some(CHUNK_BYTES):
                if self.delay:
                    await trio.sleep(self.delay)
                await self._flowing.wait()
                size = self.piece or len(data)
                for start in range(0, len(data), size):
                    await sink.send_all(data[start : start + size])
            await self._flowing.wait()
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            _reset(source)
            _reset(sink)
            raise


@asynccontextmanager
async def open_proxy(target_host: str, target_port: int) -> AsyncIterator[TcpProxy]:
    """A proxy on a free port, which ends with the block and every connection with it."""
    proxy = TcpProxy(target_host, target_port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proxy._run)
        try:
            yield proxy
        finally:
            proxy._close()
            nursery.cancel_scope.cancel()


def _bound_socket(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _reset(stream: trio.SocketStream) -> None:
    with suppress(OSError):  # it may be closed already
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    stream.socket.close()
