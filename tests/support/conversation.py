"""A conversation on a running server: open streams, what each has shown, and sends."""

import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

import trio

from protocol.parser import ServerSentEvent
from tests.support.keep_alive import KeepAlive
from tests.support.running import RunningServer
from tests.support.sse import BROKEN, StreamClient, open_stream


class Listener:
    """One open stream.

    Attributes:
        texts: of the messages, as they came.
        seqs: their numbers.
        heartbeats: how many.
        reason: why the server ended it, if it said so.
        ended: set when the stream has.
    """

    def __init__(self, client: StreamClient) -> None:
        self.request_id = client.headers["x-request-id"]
        self.texts: list[str] = []
        self.seqs: list[int] = []
        self.heartbeats = 0
        self.reason: str | None = None
        self.ended = trio.Event()
        self._client = client

    async def run(self) -> None:
        try:
            while (batch := await self._client.read()) is not None:
                for event in batch:
                    self._show(event)
        except BROKEN:
            pass
        finally:
            self.ended.set()

    def _show(self, event: ServerSentEvent) -> None:
        if event.event == "heartbeat":
            self.heartbeats += 1
        elif event.event == "closing":
            self.reason = json.loads(event.data)["reason"]
        elif event.event == "message" and "text" in (data := json.loads(event.data)):
            self.texts.append(data["text"])
            self.seqs.append(int(event.id))


class Conversation:
    """The demo's channel on one or several servers."""

    def __init__(self, server: RunningServer, nursery: trio.Nursery) -> None:
        self.server = server
        self.listeners: list[Listener] = []
        self._nursery = nursery
        self._stack = contextlib.AsyncExitStack()
        self._therapist = KeepAlive(server.base_url, server.ready.therapist.token)

    async def listen(
        self, *, base_url: str | None = None, last_id: str = "", person: str = "prospect"
    ) -> Listener:
        client = await self._stack.enter_async_context(
            open_stream(
                base_url or self.server.base_url,
                self.server.ready.channel_id,
                getattr(self.server.ready, person).token,
                last_id=last_id,
            )
        )
        listener = Listener(client)
        self.listeners.append(listener)
        self._nursery.start_soon(listener.run)
        return listener

    async def listen_on_every_worker(self, count: int) -> dict[int, Listener]:
        """Streams until each of `count` workers has one; worker's pid → one of its streams."""
        found: dict[int, Listener] = {}
        while len(found) < count:
            person = ("prospect", "therapist")[len(self.listeners) % 2]
            listener = await self.listen(person=person)
            found.setdefault(await self.worker_of(listener), listener)
        return found

    async def worker_of(self, listener: Listener) -> int:
        """Whoever logged the request: streams say so when they open."""
        line = re.compile(rf"stream_opened.*{listener.request_id}.*worker=(\d+)")
        with trio.fail_after(5):
            while not (match := line.search(self.server.log)):
                await trio.sleep(0.02)
        return int(match[1])

    async def send(self, text: str, *, client_message_id: str | None = None) -> tuple[int, Any]:
        """(status, reply)."""
        body = {
            "channelId": self.server.ready.channel_id,
            "content": text,
            "clientMessageId": client_message_id or str(uuid.uuid4()),
        }
        status, raw = await self._therapist.post("/api/chat/send", body)
        return status, json.loads(raw)

    async def say(self, text: str) -> int:
        """Send a message that must be taken; its number."""
        status, reply = await self.send(text)
        assert status == 200, reply
        return int(reply["message"]["seq"])

    async def all_show(self, text: str, *, seconds: float) -> float:
        """Wait until every stream has shown `text`; how long that took."""
        started = trio.current_time()
        with trio.fail_after(seconds):
            while not all(text in listener.texts for listener in self.listeners):
                await trio.sleep(0.002)
        return trio.current_time() - started

    async def aclose(self) -> None:
        await self._therapist.aclose()
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def conversation(server: RunningServer) -> AsyncIterator[Conversation]:
    async with trio.open_nursery() as nursery:
        talk = Conversation(server, nursery)
        try:
            yield talk
        finally:
            nursery.cancel_scope.cancel()
            with trio.move_on_after(2, shield=True):
                await talk.aclose()
