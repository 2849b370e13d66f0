"""Streams that stay, streams that come and go, and sends at random moments, in one epoll."""

import random
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.client import ABORT, MAX_EVENTS, Address, Meter, Page, Posts, Streams, stamp
from bench.subjects import Pair, Sottovoce

HEARTBEAT = b"event: heartbeat"
STAY_SECONDS = 2.0
"""Of a stream that came: long enough for its page, short enough to leave within a window."""
DRAIN_SECONDS = 8.0
QUIET_SECONDS = 0.4
"""Without an event: what has not come by then does not come by itself."""
POLL_SECONDS = 0.1


class Channels(NamedTuple):
    """Channels that talk, and how many streams each has."""

    pairs: Sequence[Pair]
    fanout: int


class Crowd(Streams):
    """`Streams` that also count heartbeats, note arrivals, and let streams come and go.

    Args:
        page: what a stream that comes must have received to be complete.

    Attributes:
        heartbeats: received since `forget`.
        arrivals: moments of `time.perf_counter`, one for each of `latencies`.
        came: seconds that each stream which came took to its whole page.
    """

    def __init__(self, addresses: Sequence[Address], *, page: Page) -> None:
        super().__init__(addresses)
        self.heartbeats = 0
        self.arrivals: list[float] = []
        self.came: list[float] = []
        self._page = page
        self._comers: deque[tuple[float, socket.socket]] = deque()

    def forget(self) -> None:
        super().forget()
        self.heartbeats = 0
        self.arrivals = []
        self.came = []

    def come(self, request: bytes) -> None:
        self._connect(request, time.perf_counter())

    @property
    def coming(self) -> int:
        """Streams that are not complete yet."""
        return len(self._opening) + len(self._later)

    def take(self, timeout: float) -> None:
        """Whatever there is; wait for it at most `timeout` seconds."""
        now = time.perf_counter()
        while self._comers and self._comers[0][0] <= now:
            self._leave(self._comers.popleft()[1])
        while self._later and self._later[0][0] <= now:
            _, request, began = self._later.popleft()
            self._connect(request, began)
        for fd, _ in self._epoll.poll(timeout, MAX_EVENTS):
            opening = self._opening.get(fd)
            if opening is None:
                if size := self._receive(fd):
                    self.heartbeats += self._buffer.count(HEARTBEAT, 0, size)
                    self._note_stamps(fd, size)
            elif opening.sent:
                before = len(self.came)
                self._complete(fd, opening, self._page, self.came)
                if len(self.came) > before:
                    leaves = time.perf_counter() + STAY_SECONDS
                    self._comers.append((leaves, self._sockets[fd]))
            else:
                self._greet(fd, opening)

    def _note_stamps(self, fd: int, size: int) -> None:
        before = len(self.latencies)
        super()._note_stamps(fd, size)
        if new := len(self.latencies) - before:
            self.arrivals += [time.perf_counter()] * new

    def _leave(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        if fd < 0:  # the server has ended it
            return
        del self._sockets[fd]
        self._tails.pop(fd, None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        sock.close()


class Driver:
    """Keeps a load up, whatever the server does: each send carries the moment at which it was due.

    Args:
        channels: that talk.
        sends: a second.
        comers: requests of streams that come; None where none do.
        connects: of these a second.

    Attributes:
        sent, expected: messages, and the deliveries that they must lead to.
    """

    def __init__(
        self,
        server: Sottovoce,
        crowd: Crowd,
        posts: Posts,
        *,
        channels: Channels,
        sends: float,
        characters: int,
        connects: float = 0.0,
        comers: Iterator[bytes] | None = None,
        seed: int = 1,
    ) -> None:
        self.sent = 0
        self.expected = 0
        self._server = server
        self._crowd = crowd
        self._posts = posts
        self._channels = channels
        self._sends = sends
        self._characters = characters
        self._connects = connects
        self._comers = comers
        self._random = random.Random(seed)
        self._next_send = self._after(time.perf_counter(), sends)
        self._next_connect = self._after(time.perf_counter(), connects)

    def run(self, seconds: float) -> Meter:
        """For so long; how long it was, and how busy this process."""
        meter = Meter()
        end = meter.began + seconds
        crowd, posts = self._crowd, self._posts
        while (now := time.perf_counter()) < end:
            while self._next_send <= now and posts.free:
                self._send(self._next_send)
                self._next_send = self._after(self._next_send, self._sends)
            while self._next_connect <= now and self._comers is not None:
                crowd.come(next(self._comers))
                self._next_connect = self._after(self._next_connect, self._connects)
            # With all connections busy an answer wakes it: to spin would take from the server.
            sends = self._next_send if posts.free else end
            soon = min(sends, self._next_connect, end) - now
            crowd.take(min(POLL_SECONDS, max(0.0, soon)))
        return meter

    def drain(self) -> None:
        """Until everything has arrived, or nothing comes any more."""
        meter, quiet, before = Meter(), Meter(), -1
        crowd = self._crowd
        while meter.seconds < DRAIN_SECONDS:
            crowd.take(0.02)
            arrived = len(crowd.latencies) + len(crowd.came)
            if arrived != before:
                before, quiet = arrived, Meter()
            done = len(crowd.latencies) >= self.expected and not crowd.coming
            if not self._posts.waiting and (done or quiet.seconds > QUIET_SECONDS):
                return

    def _send(self, due: float) -> None:
        pair = self._random.choice(self._channels.pairs)
        text = stamp(due)
        text += "x" * (self._characters - len(text))
        self._posts.post(self._server.send_request(pair, text))
        self.sent += 1
        self.expected += self._channels.fanout

    def _after(self, moment: float, rate: float) -> float:
        """A moment of a Poisson process; never, where the rate is 0."""
        return moment + self._random.expovariate(rate) if rate else float("inf")
