"""The measuring client: many sockets, one epoll, one process.

It must not be the limit. So it reads into one buffer, parses nothing, and counts events by a
byte that occurs once in each; only where latency is measured does it look for the time in the
text. `Meter` says how busy it was.
"""

import contextlib
import errno
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

MARK = b"~"
"""Once in every published text, and nowhere else in any server's bytes."""

BUFFER_BYTES = 256 * 1024
MAX_EVENTS = 4096  # of one poll
CONNECT_IN_FLIGHT = 64
PATIENCE_SECONDS = 60.0
RETRY_SECONDS = 1.0
STREAMS_PER_SOURCE = 8_000
"""From one loopback address: the kernel has 28,000 ports for it, others use some of them."""
IP_BIND_ADDRESS_NO_PORT = 24
"""<linux/in.h>: choose the port when connecting, when its other end is known."""
ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER: a close that leaves no port in TIME_WAIT."""

Address = tuple[str, int]

_STAMP = re.compile(rb"~(\d+)!")


class Refused(Exception):
    """A server did not do what a measurement needs."""


def stamp(seconds: float) -> str:
    """The text that carries a moment of `time.perf_counter`, and the mark."""
    return f"~{int(seconds * 1e9)}!"


class Page(NamedTuple):
    """What a new stream must have received to be complete, besides a 200."""

    greeting: bytes = b""
    events: int = 0


class _Opening:
    """A stream that is not complete yet."""

    __slots__ = ("began", "head_seen", "received", "request", "sent", "sock")

    def __init__(self, sock: socket.socket, request: bytes, began: float) -> None:
        self.sock = sock
        self.request = request
        self.sent = False
        self.began = began
        self.received = b""
        self.head_seen = False


class Streams:
    """Open event streams.

    Args:
        addresses: of the servers; streams are spread over them in turn.

    Attributes:
        events: marks received since `forget`.
        bytes: received since then, chunk frames and heartbeats included.
        latencies: seconds, of the stamps that `read_stamps` found.
        lost: streams that the server ended.
        turned_away: times that a new stream was not let in, and came back later.
    """

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.events = 0
        self.bytes = 0
        self.lost = 0
        self.turned_away = 0
        self.latencies: list[float] = []
        self._addresses = addresses
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._opening: dict[int, _Opening] = {}
        self._later: deque[tuple[float, bytes, float]] = deque()
        self._tails: dict[int, bytes] = {}
        self._buffer = bytearray(BUFFER_BYTES)
        self._others: dict[int, Callable[[], None]] = {}
        self._opened = 0

    def __len__(self) -> int:
        return len(self._sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Call it from `read` whenever `fd` has something: the publishers' own epoll."""
        self._others[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        del self._others[fd]
        self._epoll.unregister(fd)

    def forget(self) -> None:
        self.events = self.bytes = 0
        self.latencies = []
        self._tails.clear()

    def open(
        self,
        requests: Sequence[bytes],
        *,
        page: Page,
        in_flight: int = CONNECT_IN_FLIGHT,
        seconds: float = PATIENCE_SECONDS,
    ) -> list[float]:
        """Open a stream for each request, a bounded number of them at once.

        A client that is told to come back, or is cut off before the page is whole, does so a second
        later, as a browser would, and is still timed from its first attempt.

        Returns:
            For each, in the order of completion, seconds from connecting to its whole page.

        Raises:
            Refused: one got yet another status, or they took too long.
        """
        waiting = deque(requests)
        took: list[float] = []
        now = time.perf_counter()
        deadline = now + seconds
        while len(took) < len(requests):
            while self._later and self._later[0][0] <= now:
                _, request, began = self._later.popleft()
                self._connect(request, began)
            while waiting and len(self._opening) < in_flight:
                self._connect(waiting.popleft(), time.perf_counter())
            for fd, _ in self._epoll.poll(0.2, MAX_EVENTS):
                opening = self._opening.get(fd)
                if opening is None:
                    self._receive(fd)
                elif opening.sent:
                    self._complete(fd, opening, page, took)
                else:
                    self._greet(fd, opening)
            now = time.perf_counter()
            if now > deadline:
                missing = len(requests) - len(took)
                raise Refused(f"{missing} of {len(requests)} streams in {seconds:.0f} s not open")
        return took

    def read(self, timeout: float, *, gather: float = 0.0) -> None:
        """Take what is there and count it; wait for it at most `timeout` seconds.

        Args:
            gather: seconds to let more arrive first. One poll then finds many sockets ready,
                and one read many events: counting takes less of this core.
        """
        if gather:
            time.sleep(gather)
        for fd, _ in self._epoll.poll(timeout, MAX_EVENTS):
            self._receive(fd)

    def read_stamps(self, timeout: float) -> None:
        """The same, and find the time in each event."""
        for fd, _ in self._epoll.poll(timeout, MAX_EVENTS):
            size = self._receive(fd)
            if size:
                self._note_stamps(fd, size)

    def close(self) -> None:
        for sock in [*self._sockets.values(), *(o.sock for o in self._opening.values())]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            sock.close()
        self._sockets.clear()
        self._opening.clear()
        self._epoll.close()

    def _connect(self, request: bytes, began: float) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((f"127.0.0.{1 + self._opened // STREAMS_PER_SOURCE}", 0))
        address = self._addresses[self._opened % len(self._addresses)]
        self._opened += 1
        problem = sock.connect_ex(address)
        if problem not in (0, errno.EINPROGRESS):
            sock.close()
            raise Refused(f"connect: {errno.errorcode.get(problem, problem)}")
        opening = _Opening(sock, request, began)
        self._opening[sock.fileno()] = opening
        # On loopback the connection is made by now, unless the server's queue is full.
        self._epoll.register(sock.fileno(), select.EPOLLOUT)

    def _greet(self, fd: int, opening: _Opening) -> None:
        try:
            sent = opening.sock.send(opening.request)
        except OSError:
            self._try_again(fd, opening)
            return
        assert sent == len(opening.request)
        opening.sent = True
        self._epoll.modify(fd, select.EPOLLIN)

    def _complete(self, fd: int, opening: _Opening, page: Page, took: list[float]) -> None:
        try:
            data = opening.sock.recv(BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._try_again(fd, opening)
            return
        opening.received += data
        if not opening.head_seen:
            head, end, rest = opening.received.partition(b"\r\n\r\n")
            if not end:
                return
            status = head[9:12]
            if status == b"503":
                self._try_again(fd, opening)
                return
            if status != b"200":
                raise Refused(f"status {status.decode('ascii', 'replace')} for a stream")
            opening.head_seen, opening.received = True, rest
        if b"event: closing" in opening.received:  # so a refusal that will pass is told
            self._try_again(fd, opening)
            return
        if opening.received.count(MARK) < page.events or page.greeting not in opening.received:
            return
        took.append(time.perf_counter() - opening.began)
        del self._opening[fd]
        self._sockets[fd] = opening.sock

    def _try_again(self, fd: int, opening: _Opening) -> None:
        self.turned_away += 1
        again = time.perf_counter() + RETRY_SECONDS
        self._later.append((again, opening.request, opening.began))
        del self._opening[fd]
        opening.sock.close()

    def _receive(self, fd: int) -> int:
        other = self._others.get(fd)
        if other is not None:
            other()
            return 0
        sock = self._sockets.get(fd)
        if sock is None:  # closed earlier in this batch
            return 0
        try:
            size = sock.recv_into(self._buffer)
        except BlockingIOError:
            return 0
        except OSError:
            size = 0
        if not size:
            self.lost += 1
            self._epoll.unregister(fd)
            self._sockets.pop(fd).close()
            return 0
        self.events += self._buffer.count(MARK, 0, size)
        self.bytes += size
        return size

    def _note_stamps(self, fd: int, size: int) -> None:
        now = time.perf_counter()
        data = self._tails.pop(fd, b"") + self._buffer[:size]
        end = 0
        for found in _STAMP.finditer(data):
            self.latencies.append(now - int(found[1]) / 1e9)
            end = found.end()
        if (begun := data.find(MARK, end)) >= 0:
            self._tails[fd] = data[begun:]


class _Post:
    """One keep-alive connection with at most one request on its way."""

    __slots__ = ("received", "request", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = b""
        self.received = b""


class Posts:
    """Keep-alive connections that post, each waiting for its answer before the next.

    Attributes:
        answered: requests with a 2xx, in all.
    """

    def __init__(self, address: Address, connections: int) -> None:
        self.answered = 0
        self._address = address
        self._epoll = select.epoll()
        self._busy: dict[int, _Post] = {}
        self._free: list[_Post] = [_Post(self._connect()) for _ in range(connections)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for post in [*self._busy.values(), *self._free]:
            post.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            post.sock.close()
        self._epoll.close()

    @property
    def fd(self) -> int:
        """Readable whenever `read` has something to do."""
        return self._epoll.fileno()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._busy)

    def post(self, request: bytes) -> None:
        """Send it on a free connection; there must be one."""
        post = self._free.pop()
        post.request = request
        self._send(post)

    def read(self, timeout: float = 0.0) -> None:
        """Take the answers that are there.

        Raises:
            Refused: one of them is no 2xx.
        """
        for fd, _ in self._epoll.poll(timeout, MAX_EVENTS):
            post = self._busy.get(fd)
            if post is None:
                self._renew(fd)
                continue
            try:
                data = post.sock.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._again(post)
                continue
            post.received = data = post.received + data if post.received else data
            if not _is_whole(data):
                continue
            if data[9:10] != b"2":
                raise Refused(f"status {data[9:12].decode('ascii', 'replace')} for a POST")
            del self._busy[fd]
            post.received = b""
            self.answered += 1
            self._free.append(post)

    def _renew(self, fd: int) -> None:
        """The server has closed a connection that had nothing to do."""
        for post in self._free:
            if post.sock.fileno() == fd:
                self._epoll.unregister(fd)
                post.sock.close()
                post.sock = self._connect()
                return

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, PATIENCE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return sock

    def _send(self, post: _Post) -> None:
        self._busy[post.sock.fileno()] = post
        try:
            sent = post.sock.send(post.request)
        except (BrokenPipeError, ConnectionResetError):  # it was closed while it was idle
            self._again(post)
            return
        assert sent == len(post.request)

    def _again(self, post: _Post) -> None:
        """The server closed it just as we used it, or after its last answer: ask on a new one."""
        if post.received:
            raise Refused("a POST's answer was cut off")
        fd = post.sock.fileno()
        del self._busy[fd]
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        post.sock.close()
        post.sock = self._connect()
        self._send(post)


def _is_whole(data: bytes) -> bool:
    """Whether an HTTP/1.1 answer is there with all of its body."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = data[:end].lower()
    at = head.find(b"content-length:")
    if at >= 0:
        stop = head.find(b"\r", at)
        length = int(head[at + 15 : stop if stop >= 0 else end])
        return len(data) >= end + 4 + length
    if b"transfer-encoding: chunked" in head:
        return data.endswith(b"\r\n0\r\n\r\n")
    return True  # 204


class Meter:
    """How long it was, and which share of that this process was on its core.

    Attributes:
        began: on the clock of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._cpu = time.process_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def busy(self) -> float:
        return (time.process_time() - self._cpu) / self.seconds
