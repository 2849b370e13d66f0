"""The load: people who send and repeat, and pages that resume. All of it goes into the ledger."""

import random
import uuid
from contextlib import nullcontext
from typing import Any, NamedTuple

import msgspec
import trio

from bench.faults.client import BROKEN, EventStream, Poster
from bench.faults.deployment import HEARTBEAT_SECONDS, Channel, Deployment
from bench.faults.ledger import UNKNOWN, Attempt, Ledger, Reader, Send, Session, Shown

ANSWER_SECONDS = 8.0
"""Then a client gives an attempt up. The servers promise two seconds."""
REPEAT_SECONDS = (0.1, 0.4)
"""Before an attempt whose outcome is unknown, or a 503, is repeated."""
GIVE_UP_SECONDS = 90.0
SILENCE_SECONDS = 6 * HEARTBEAT_SECONDS
"""Without a heartbeat: then a page connects anew."""
STAY_SECONDS = 20.0
"""In the mean; then a page is closed and opened again, as people do, on either server."""
COME_BACK_SECONDS = (0.05, 0.3)
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
        self.talking = True
        self._rng = random.Random(seed)
        self._sent: dict[str, tuple[float, int]] = {}
        """Of keys: when the first attempt was made, and where."""
        self._pause = 2 * len(deployment.channels) / rate
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

    def run(self, pages: trio.Nursery, talkers: trio.Nursery) -> None:
        """Start everybody. Talkers end when `talking` does, pages with their nursery. Plain."""
        for channel in self.deployment.channels:
            for person in (channel.therapist, channel.prospect):
                page = Page(self, channel, person, random.Random(self._rng.random()))
                self.pages.append(page)
                self.ledger.readers.append(page.reader)
                pages.start_soon(page.run)
                rng = random.Random(self._rng.random())
                talkers.start_soon(self._talk, channel, person, rng)

    async def _talk(self, channel: Channel, person: str, rng: random.Random) -> None:
        posters = [Poster(lambda: self.token(person)) for _ in self.deployment.nodes]
        try:
            await trio.sleep(self._pause * rng.random())
            while self.talking:
                await self._send(channel, person, posters, rng)
                await trio.sleep(self._pause * rng.uniform(0.5, 1.5))
        finally:
            with trio.CancelScope(shield=True):
                for poster in posters:
                    await poster.aclose()

    async def _send(
        self, channel: Channel, person: str, posters: list[Poster], rng: random.Random
    ) -> None:
        send = Send(channel.id, person, str(uuid.UUID(int=rng.getrandbits(128), version=4)))
        self.ledger.sends.append(send)
        body: dict[str, Any] = {
            "channelId": channel.id,
            "content": f"message {send.key}",
            "clientMessageId": send.key,
        }
        if rng.random() < NOT_ALLOWED:
            others = rng.choice(self.deployment.channels)
            wrong = {"content": ""} if others.id == channel.id else {"channelId": others.id}
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
        send.attempts.append(attempt)

    def arrived(self, session: Session, key: str, at: float) -> None:
        sent = self._sent.get(key)
        if sent is not None:
            when, node = sent
            live = 0 < session.live <= when
            self.delivered.append(Delivery(at, at - when, node == session.node, live))


class Page:
    """One person's stream over any number of connections, as a browser holds it."""

    def __init__(self, load: Load, channel: Channel, person: str, rng: random.Random) -> None:
        self.reader = Reader(channel.id, person)
        self.open: EventStream | None = None
        self.live = False
        """Has been shown `connected`, and the connection lasts."""
        self.last: int | None = None
        self._load = load
        self._channel = channel
        self._rng = rng

    async def run(self) -> None:
        nodes = self._load.deployment.nodes
        while True:
            node = self._rng.randrange(len(nodes))
            try:
                await self._connect(node, nodes[node].port)
            except trio.TooSlowError:
                self._load.silences += self.live
            except BROKEN:
                pass
            if self.open is not None:
                self.reader.sessions[-1].ended = self._load.now
            self.open, self.live = None, False
            await trio.sleep(self._rng.uniform(*COME_BACK_SECONDS))

    async def _connect(self, node: int, port: int) -> None:
        load = self._load
        session = Session(node, self.last, load.now)
        token = load.token(self.reader.person)
        last_id = "" if self.last is None else str(self.last)
        leave = trio.move_on_after(self._rng.expovariate(1 / STAY_SECONDS))
        path = f"/api/chat/{self._channel.id}"
        async with EventStream(port, path, token, last_id) as stream:
            self.open = stream
            self.reader.sessions.append(session)
            with leave if load.talking else nullcontext():
                while (events := await stream.read(seconds=SILENCE_SECONDS)) is not None:
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
        seq = int(last_id)
        session.shown.append(
            Shown(at, message.channel_id, seq, message.id, message.client_message_id)
        )
        self.last = seq
        self._load.arrived(session, message.client_message_id, at)
