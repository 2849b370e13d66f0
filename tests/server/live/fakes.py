"""A true history, and a store that reads it at the moments and in the pieces that a test says."""

from collections.abc import Callable
from typing import Any

import trio

from protocol.frames import Frame
from protocol.parser import EventStreamParser, ServerSentEvent
from server.live.wire import AsgiWire, Wire
from storage.contract import ChannelGone, Page, Record, StoreUnavailable


def record(seq: int, channel_id: int = 42) -> Record:
    return Record(seq, seq * 1000, b'{"text":"m%d","channelId":%d}' % (seq, channel_id), b"{}")


def frame(seq: int) -> Frame:
    return record(seq).frame()


def frames(*seqs: int) -> list[Frame]:
    return [frame(seq) for seq in seqs]


class FakeFeed:
    def __init__(self) -> None:
        self.connected = True
        self.listen = 0.0

    async def listening(self, channel_id: int, *, seconds: float) -> bool:
        await trio.sleep(min(self.listen, seconds))
        return self.listen <= seconds


class FakeBreaker:
    suspect = False


class FakeStore:
    """Holds 1..`newest` of each channel, and promises what `storage.contract` does."""

    def __init__(self, newest: int = 0, *, page: int = 200) -> None:
        self.newest = newest
        self.page = page
        self.takes = 0.0
        """Seconds that a read takes, before it sees the history."""
        self.takes_after = 0.0
        """The same, after it saw it."""
        self.down = False
        self.gone = False
        self.deleted: frozenset[int] = frozenset()
        """Numbers whose messages the main application has deleted."""
        self.reads: list[tuple[int | None, int]] = []
        self.looks: list[dict[int, int]] = []
        self.feed = FakeFeed()
        self.redis = FakeBreaker()
        self.before_answer: Callable[[], None] = lambda: None

    async def missed(self, channel_id: int, after: int, *, head: int) -> Page:
        return await self.history(channel_id, after, head=head)

    async def history(
        self, channel_id: int, after: int | None, *, head: int, size: int | None = None
    ) -> Page:
        self.reads.append((after, head))
        await trio.lowlevel.checkpoint()
        if self.takes:
            await trio.sleep(self.takes)
        if self.down:
            raise StoreUnavailable
        if self.gone:
            raise ChannelGone
        newest = self.newest
        reset = after is not None and after > newest
        first = max(1, newest - 49) if after is None or reset else after + 1
        last = newest if after is None or reset else min(newest, after + self.page)
        seqs = [n for n in range(first, last + 1) if n not in self.deleted]
        page = Page([record(n, channel_id) for n in seqs], newest, reset)
        if self.takes_after:
            await trio.sleep(self.takes_after)
        self.before_answer()
        return page

    async def heads(self, known: dict[int, int]) -> dict[int, int]:
        self.looks.append(dict(known))
        await trio.lowlevel.checkpoint()
        if self.down:
            raise StoreUnavailable
        return {channel: self.newest for channel, head in known.items() if self.newest > head}


class Peer:
    """The other end: takes what is written at its own pace, and may leave.

    Args:
        kind: `direct`, a socket that our engine lets us write to, or `asgi`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.wire: DirectWire | AsgiWire | None = None
        self.written: list[tuple[float, bytes]] = []
        """What the other side has, and since when."""
        self.started: float | None = None
        self.said_end = False
        self.room: int | None = None
        """Bytes that a direct wire's peer still takes; None: as many as come."""
        self._reading = trio.Event()
        self._reading.set()
        self.left = trio.Event()

    def begin(self) -> Wire:
        assert self.wire is None, "a response begins once"
        if self.kind == "direct":
            self.started = trio.current_time()
            self.wire = DirectWire(self)
        else:
            start = {"type": "http.response.start", "status": 200}
            self.wire = AsgiWire(self.send, self.receive, start=start)
        return self.wire

    # The server's side

    def take(self, data: bytes) -> int:
        """Bytes that fit, as a socket's `send` would take them."""
        size = len(data) if self.room is None else min(self.room, len(data))
        if self.room is not None:
            self.room -= size
            if not self.room:
                self._reading = trio.Event()
        if size:
            self.written.append((trio.current_time(), data[:size]))
        return size

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        await self._reading.wait()
        assert not self.said_end, "nothing is sent after the end"
        if message["type"] == "http.response.start":
            assert self.started is None
            self.started = trio.current_time()
            return
        assert self.started is not None, "no body before its start"
        if message["body"]:
            self.written.append((trio.current_time(), message["body"]))
        self.said_end = not message["more_body"]

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def writable(self) -> None:
        await self._reading.wait()

    # The other side

    def leave(self) -> None:
        self.left.set()

    def stop_reading(self, *, after: int = 0) -> None:
        """Take nothing more, but for some bytes of what comes next."""
        self.room = after
        if not after:
            self._reading = trio.Event()

    def read_on(self, size: int | None = None) -> None:
        """Take what comes, or a few bytes of it."""
        self.room = size
        self._reading.set()

    @property
    def ended(self) -> bool:
        return self.said_end or b"".join(body for _, body in self.written).endswith(b"0\r\n\r\n")

    @property
    def body(self) -> bytes:
        raw = b"".join(body for _, body in self.written)
        return dechunk(raw) if self.kind == "direct" else raw

    @property
    def events(self) -> list[ServerSentEvent]:
        return EventStreamParser().feed(self.body)

    @property
    def seqs(self) -> list[int]:
        return [int(event.id) for event in self.events if '"text"' in event.data]

    def named(self, name: str) -> list[ServerSentEvent]:
        return [event for event in self.events if event.event == name]


class DirectWire:
    """As `server.engine.wire.Wire`, but that the kernel is a `Peer`."""

    chunked = True

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._rest = b""
        self.gone = False
        self.given: list[bytes] = []
        """The objects that `write` got."""

    def write(self, data: bytes, /) -> bool:
        self.given.append(data)
        self._rest += data
        return self._push()

    def _push(self) -> bool:
        if self.gone:
            self._rest = b""
        self._rest = self._rest[self._peer.take(self._rest) :]
        return not self._rest

    async def flush(self, *, seconds: float) -> None:
        while self._rest and not self.gone:
            with trio.fail_after(seconds):
                await self._peer.writable()
            self._push()

    async def closed(self) -> None:
        await self._peer.left.wait()
        self.gone = True

    def end(self) -> None:
        self.write(b"0\r\n\r\n")


def dechunk(raw: bytes) -> bytes:
    """A chunked body's whole chunks.

    Raises:
        ValueError: there is something between the chunks, or within one.
    """
    body = b""
    while raw:
        line, found, rest = raw.partition(b"\r\n")
        if not found:
            break
        size = int(line, 16)
        if len(rest) < size + 2:
            break
        if rest[size : size + 2] != b"\r\n":
            raise ValueError("a chunk is not as long as it says")
        if not size and rest != b"\r\n":
            raise ValueError("there is something after the last chunk")
        body, raw = body + rest[:size], rest[size + 2 :]
    return body
