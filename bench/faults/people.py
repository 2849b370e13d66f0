"""The load: people who send and repeat, and pages that resume. All of it goes into the ledger.

Most channels talk all the time, and there the next message gives a lost one away. The quiet ones
say something and fall silent, with streams on every server that stay: what they lose stays lost
until it is looked for.
"""

import math
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import msgspec
import trio

from bench.faults.client import BROKEN, EventStream, Poster
from bench.faults.deployment import HEARTBEAT_SECONDS, Channel, Deployment
from bench.faults.ledger import (
    SEEN_SECONDS,
    UNKNOWN,
    Attempt,
    Ledger,
    Reader,
    Send,
    Session,
    Shown,
)
from protocol.cursors import Cursor, parse_cursor

ANSWER_SECONDS = 8.0
"""Then a client gives an attempt up. The servers promise two seconds."""
REPEAT_SECONDS = (0.1, 0.4)
"""Before an attempt whose outcome is unknown, or a 503, is repeated."""
GIVE_UP_SECONDS = 90.0
DEAF_SECONDS = 6 * HEARTBEAT_SECONDS
"""Without a heartbeat: then a page connects anew."""
STAY_SECONDS = 20.0
"""In the mean; then a page is closed and opened again, as people do, on either server."""
COME_BACK_SECONDS = (0.05, 0.3)
"""After a stream has ended; with a Retry-After, that much later."""
PAGES = 2
"""That each person of a channel that talks has open."""
QUIET = 4
"""One channel of so many is quiet."""
SILENCE_SECONDS = (SEEN_SECONDS + 4.0, SEEN_SECONDS + 10.0)
"""Of a quiet channel, after a few messages."""
BURST = (1, 4)
"""Messages between two silences."""
BURST_SECONDS = (0.2, 1.5)
"""Between two of them: some are sent while something is broken, others before or after."""
LONG_TEXT = 2500
"""Characters of a quiet channel's messages: servers keep a few kilobytes of each channel, and what
is older they have to read."""
VISIT_SECONDS = SEEN_SECONDS + 2.0
OLD = (5, 40)
"""Messages that the cursor of a visitor is behind."""
TWICE_AT_ONCE = 0.02
"""Share of the sends that go to both servers at the same time."""
NOT_ALLOWED = 0.01
"""Share that must be refused: to somebody else's channel, or without a text."""


class _Message(msgspec.Struct, rename="camel"):
    id: str
    channel_id: int
    client_message_id: str = ""


class _Sent(msgspec.Struct, rename="camel"):
    seq: int
    message_id: str


class _Reply(msgspec.Struct):
    message: _Sent


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode


class Delivery(NamedTuple):
    """A message on its page.

    Attributes:
        took: seconds since the first attempt to send it.
        same: the server that it was first sent to showed it.
        live: the stream was there when it was sent; else it came as history.
    """

    at: float
    took: float
    same: bool
    live: bool


class Load:
    """The people of all channels.

    Attributes:
        delivered: the newest at the end.
        silences: how often no heartbeat came.
    """

    def __init__(self, deployment: Deployment, ledger: Ledger, *, seed: int, rate: float) -> None:
        self.deployment = deployment
        self.ledger = ledger
        self.delivered: list[Delivery] = []
        self.silences = 0
        self.pages: list[Page] = []
        self._over = trio.Event()
        self._heads: dict[int, Cursor] = {}
        """Of channels: the newest that was acknowledged, in whichever epoch."""
        self._rng = random.Random(seed)
        self._sent: dict[str, tuple[float, int]] = {}
        """Of keys: when the first attempt was made, and where."""
        self._busy = [each for index, each in enumerate(deployment.channels) if index % QUIET]
        self._quiet = [each for each in deployment.channels if each not in self._busy]
        self._pause = 2 * len(self._busy) / rate
        self._began = trio.current_time()
        self._tokens: dict[tuple[str, str], str] = {}

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return trio.current_time() - self._began

    def token(self, person: str) -> str:
        name = (person, self.deployment.issuer.kid)
        if name not in self._tokens:
            self._tokens[name] = self.deployment.issuer.token(person)
        return self._tokens[name]

    def open(self, pages: trio.Nursery) -> None:
        """Open all pages; they end with their nursery. Plain."""
        self._nursery = pages
        for channel in self._busy:
            for person in (channel.therapist, channel.prospect):
                for _ in range(PAGES):
                    self._open(Page(self, channel, person, self._chance()))
        for channel in self._quiet:
            for person in (channel.therapist, channel.prospect):
                for node in range(len(self.deployment.nodes)):
                    self._open(Page(self, channel, person, self._chance(), node=node))

    def talk(self, talkers: trio.Nursery) -> None:
        """Begin to send, until `stop`. Plain."""
        for channel in self._busy:
            for person in (channel.therapist, channel.prospect):
                talkers.start_soon(self._talk, channel, person, self._chance())
        for channel in self._quiet:
            talkers.start_soon(self._talk_rarely, channel, self._chance())

    def stop(self) -> None:
        """Nobody begins to send any more, and nobody leaves. Plain."""
        self._over.set()

    @property
    def talking(self) -> bool:
        return not self._over.is_set()

    def visit(self, count: int) -> None:
        """So many times somebody opens a channel without a cursor, and with an old one: they are
        shown what the store has, which may have holes in it now. Plain."""
        for _ in range(count):
            self._visit(self._rng.choice(self.deployment.channels), self._rng)

    def _visit(self, channel: Channel, rng: random.Random) -> None:
        cursors: list[Cursor | None] = [None]
        if head := self._heads.get(channel.id):
            cursors.append(Cursor(head.epoch, max(1, head.seq - rng.randint(*OLD))))
        for cursor in cursors:
            node = rng.randrange(len(self.deployment.nodes))
            page = Page(self, channel, channel.prospect, rng, node=node, cursor=cursor)
            self.ledger.readers.append(page.reader)
            self._nursery.start_soon(page.visit, VISIT_SECONDS)

    def _open(self, page: "Page") -> None:
        self.pages.append(page)
        self.ledger.readers.append(page.reader)
        self._nursery.start_soon(page.run)

    def _chance(self) -> random.Random:
        return random.Random(self._rng.random())

    async def _talk(self, channel: Channel, person: str, rng: random.Random) -> None:
        async with self._posters(person) as posters:
            await self._wait(self._pause * rng.random())
            while self.talking:
                await self._send(channel, person, posters, rng)
                await self._wait(self._pause * rng.uniform(0.5, 1.5))

    async def _talk_rarely(self, channel: Channel, rng: random.Random) -> None:
        person = rng.choice((channel.therapist, channel.prospect))
        async with self._posters(person) as posters:
            await self._wait(SILENCE_SECONDS[1] * rng.random())
            while self.talking:
                for _ in range(rng.randint(*BURST)):
                    await self._send(channel, person, posters, rng, length=LONG_TEXT)
                    await self._wait(rng.uniform(*BURST_SECONDS))
                self._visit(channel, rng)
                await self._wait(rng.uniform(*SILENCE_SECONDS))

    async def _wait(self, seconds: float) -> None:
        """Unless it is over before."""
        with trio.move_on_after(seconds):
            await self._over.wait()

    @asynccontextmanager
    async def _posters(self, person: str) -> AsyncIterator[list[Poster]]:
        """One for each server."""
        posters = [Poster(lambda: self.token(person)) for _ in self.deployment.nodes]
        try:
            yield posters
        finally:
            with trio.CancelScope(shield=True):
                for poster in posters:
                    await poster.aclose()

    async def _send(
        self,
        channel: Channel,
        person: str,
        posters: list[Poster],
        rng: random.Random,
        *,
        length: int = 0,
    ) -> None:
        send = Send(channel.id, person, str(uuid.UUID(int=rng.getrandbits(128), version=4)))
        self.ledger.sends.append(send)
        body: dict[str, Any] = {
            "channelId": channel.id,
            "content": f"message {send.key}".ljust(length, "."),
            "clientMessageId": send.key,
        }
        if rng.random() < NOT_ALLOWED:
            others = rng.choice(self.deployment.channels)
            wrong = {"content": ""} if others.id == channel.id else {"channelId": others.id}
            send.allowed = False
            await self._try(send, body | wrong, posters, rng.randrange(len(posters)))
            return
        give_up = trio.current_time() + GIVE_UP_SECONDS
        while trio.current_time() < give_up:
            node = rng.randrange(len(posters))
            self._sent.setdefault(send.key, (self.now, node))
            if rng.random() < TWICE_AT_ONCE:
                async with trio.open_nursery() as nursery:
                    for each in range(len(posters)):
                        nursery.start_soon(self._try, send, body, posters, each)
            else:
                await self._try(send, body, posters, node)
            if send.acknowledged or send.refused:
                return
            await trio.sleep(rng.uniform(*REPEAT_SECONDS))

    async def _try(self, send: Send, body: object, posters: list[Poster], node: int) -> None:
        at = self.now
        status, raw = UNKNOWN, b""
        try:
            port = self.deployment.nodes[node].port
            status, raw = await posters[node].post(
                port, "/api/chat/send", body, seconds=ANSWER_SECONDS
            )
        except BROKEN:
            pass
        attempt = Attempt(at, self.now - at, status, node)
        if status == 200:
            sent = _decode_reply(raw).message
            attempt.seq, attempt.message_id = sent.seq, sent.message_id
            head = Cursor(self.ledger.epoch, sent.seq)
            self._heads[send.channel_id] = max(head, self._heads.get(send.channel_id, head))
        send.attempts.append(attempt)

    def arrived(self, session: Session, key: str, at: float) -> None:
        sent = self._sent.get(key)
        if sent is not None:
            when, node = sent
            live = 0 < session.live <= when
            self.delivered.append(Delivery(at, at - when, node == session.node, live))


class Page:
    """One person's stream over any number of connections, as a browser holds it.

    Args:
        node: the server that it stays with, until something breaks; None: it goes now and then,
            and comes back to any.
        cursor: what it begins after.
    """

    def __init__(
        self,
        load: Load,
        channel: Channel,
        person: str,
        rng: random.Random,
        *,
        node: int | None = None,
        cursor: Cursor | None = None,
    ) -> None:
        self.reader = Reader(channel.id, person, cursor=cursor and cursor.seq)
        self.node = node
        self.open: EventStream | None = None
        self.live = False
        """Has been shown `connected`, and the connection lasts."""
        self.last = cursor
        self._load = load
        self._channel = channel
        self._rng = rng

    async def run(self) -> None:
        while True:
            leaves = self.node is None and self._load.talking
            stay = self._rng.expovariate(1 / STAY_SECONDS) if leaves else math.inf
            try:
                await self._connect(stay)
            except trio.TooSlowError:
                self._load.silences += self.live
            except BROKEN:
                pass
            refused = 0.0 if self.open is None else self.open.retry_after
            self._ended()
            await trio.sleep(refused + self._rng.uniform(*COME_BACK_SECONDS))

    async def visit(self, seconds: float) -> None:
        """One connection, for so long at most."""
        with suppress(*BROKEN):
            await self._connect(seconds)
        self._ended()

    def _ended(self) -> None:
        if self.open is not None:
            self.reader.sessions[-1].ended = self._load.now
        self.open, self.live = None, False

    async def _connect(self, seconds: float) -> None:
        load = self._load
        nodes = load.deployment.nodes
        node = self._rng.randrange(len(nodes)) if self.node is None else self.node
        port = nodes[node].port
        session = Session(node, None, load.now)
        last_id = ""
        if self.last is not None:
            session.cursor, session.epoch = self.last.seq, self.last.epoch
            last_id = self.last.encode().decode()
        token = load.token(self.reader.person)
        path = f"/api/chat/{self._channel.id}"
        async with EventStream(port, path, token, last_id) as stream:
            self.open = stream
            self.reader.sessions.append(session)
            with trio.move_on_after(seconds):
                while (events := await stream.read(seconds=DEAF_SECONDS)) is not None:
                    at = load.now
                    for event in events:
                        if event.event == "message":
                            self._show(session, event.data, event.id, at)
                        elif event.event == "reset":
                            session.resets.append(len(session.shown))
                            self.last = None

    def _show(self, session: Session, data: str, last_id: str, at: float) -> None:
        if data.startswith('{"type"'):
            self.live, session.live = True, self._load.now
            return
        message = _decode_message(data)
        cursor = parse_cursor(last_id.encode())
        assert cursor is not None, "a message without an id"
        session.shown.append(
            Shown(
                at,
                message.channel_id,
                cursor.seq,
                message.id,
                message.client_message_id,
                cursor.epoch,
            )
        )
        self.last = cursor
        self._load.arrived(session, message.client_message_id, at)
