"""A true history, and a store that reads it at the moments and in the pieces that a test says."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from protocol.frames import Frame
from protocol.parser import EventStreamParser, ServerSentEvent
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
    up = True


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
        self.reads: list[tuple[int | None, int]] = []
        self.looks: list[dict[int, int]] = []
        self.feed = FakeFeed()
        self.redis = FakeBreaker()
        self.before_answer: Callable[[], None] = lambda: None

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
        page = Page([record(n, channel_id) for n in range(first, last + 1)], newest, reset)
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
    """The other end: reads what is sent, at its own pace, and may leave."""

    def __init__(self) -> None:
        self.written: list[tuple[float, bytes]] = []
        self.started: float | None = None
        self.ended = False
        self.reading = trio.Event()
        self.reading.set()
        self._left = trio.Event()

    async def start(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        await trio.lowlevel.checkpoint()
        self.started = trio.current_time()

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        await self.reading.wait()
        assert not self.ended, "nothing is sent after the end"
        self.written.append((trio.current_time(), message["body"]))
        self.ended = not message["more_body"]

    async def receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self._left.set()

    def stop_reading(self) -> None:
        self.reading = trio.Event()

    @property
    def events(self) -> list[ServerSentEvent]:
        return EventStreamParser().feed(b"".join(body for _, body in self.written))

    @property
    def seqs(self) -> list[int]:
        return [int(event.id) for event in self.events if '"text"' in event.data]

    def named(self, name: str) -> list[ServerSentEvent]:
        return [event for event in self.events if event.event == name]
