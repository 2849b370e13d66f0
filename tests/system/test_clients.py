"""Clients that others wrote: `httpx-sse`, and `eventsource` on Node, which reconnects by itself."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx_sse
import pytest
import trio

from bench.faults.proxy import open_proxy
from tests.support.chat import Chat, Pair, own_valkey, run_chat
from tests.support.wire import WIRE

NODE = Path(__file__).parent / "node"
INSTALL_SECONDS = 90.0
CLOSED_SECONDS = 0.8
"""Many times the pause before a reconnect here: who has not come back by then never will."""


@pytest.fixture(scope="module")
def quick(chat: Chat, services_folder: Path) -> Iterator[Chat]:
    """A worker that tells its clients to come back at once."""
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database,
            valkey.url,
            services_folder,
            SOTTOVOCE_RETRY_MILLISECONDS="40",
            SOTTOVOCE_HEARTBEAT_SECONDS="0.2",
        ) as running,
    ):
        yield running


# httpx-sse


def test_httpx_sse_reads_a_stream(chat: Chat):
    pair = chat.pair()
    texts = ["one", "two\nlines\r\nand \u2028 a third", " spaces ", "data: x\n\nevent: y", "💬"]
    for text in texts[:3]:
        chat.send(pair.therapist, pair.channel_id, text)
    seen = []
    with httpx_sse.connect_sse(
        chat.client, "GET", f"/api/chat/{pair.channel_id}", headers=chat.bearer(pair.prospect)
    ) as source:
        assert source.response.status_code == 200
        for event in source.iter_sse():
            if event.event == "heartbeat":
                continue
            assert event.event == "message"
            seen.append((event.id, event.retry, event.json()))
            if len(seen) == 4:
                for text in texts[3:]:
                    chat.send(pair.therapist, pair.channel_id, text)
            if len(seen) == 6:
                break
    ids, retries, data = zip(*seen, strict=True)
    assert ids == ("", "1", "2", "3", "4", "5")
    assert 1500 <= retries[0] <= 3000
    assert retries[1:] == (None,) * 5
    assert data[0]["type"] == "connected"
    assert [message["text"] for message in data[1:]] == texts


def test_httpx_sse_resumes_by_the_last_id(chat: Chat):
    pair = chat.pair()
    for number in range(5):
        chat.send(pair.therapist, pair.channel_id, f"m{number}")
    headers = {**chat.bearer(pair.prospect), "last-event-id": "3"}
    texts = []
    with httpx_sse.connect_sse(
        chat.client, "GET", f"/api/chat/{pair.channel_id}", headers=headers
    ) as source:
        for event in source.iter_sse():
            texts += [event.json()["text"]] if event.id else []
            if len(texts) == 2:
                break
    assert texts == ["m3", "m4"]


# eventsource on Node


@pytest.fixture(scope="session")
def node_folder(services_folder: Path) -> Path:
    """The package from its registry, in a folder that goes away."""
    if shutil.which("npm") is None:
        pytest.skip("Node's npm is not on this machine")
    folder = services_folder / "node"
    shutil.copytree(NODE, folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=INSTALL_SECONDS,
    )
    return folder


class Listener:
    """What a Node process saw."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.seen: list[dict[str, Any]] = []
        self.changed = trio.Event()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.seen if line["kind"] == kind]

    def messages(self) -> list[dict[str, Any]]:
        return [line for line in self.of("message") if line["id"]]

    async def until(self, kind: str, count: int = 1) -> None:
        with trio.fail_after(20):
            while len(self.messages() if kind == "message" else self.of(kind)) < count:
                await self.changed.wait()

    async def read(self) -> None:
        assert self._process.stdout is not None
        buffer = b""
        async for data in self._process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            self.seen += [json.loads(line) for line in lines]
            self.changed.set()
            self.changed = trio.Event()


@asynccontextmanager
async def listen(folder: Path, url: str, token: str) -> AsyncIterator[Listener]:
    process = await trio.lowlevel.open_process(
        ["node", "listen.mjs", url, token],
        cwd=folder,
        stdout=subprocess.PIPE,
        env=os.environ | WIRE.environ,
    )
    listener = Listener(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.read)
            yield listener
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.http1
async def test_eventsource_sees_every_message_once_whatever_is_cut(quick: Chat, node_folder: Path):
    pair = quick.pair()
    count, cuts = 60, 4
    async with open_proxy("127.0.0.1", quick.port) as proxy:
        url = f"{WIRE.scheme}://127.0.0.1:{proxy.port}/api/chat/{pair.channel_id}"
        async with listen(node_folder, url, quick.token(pair.prospect)) as listener:
            await listener.until("open")
            for number in range(count):
                await trio.to_thread.run_sync(
                    quick.send, pair.therapist, pair.channel_id, f"m{number}"
                )
                if number % (count // cuts) == 5:
                    proxy.cut()
                elif number % (count // cuts) == 9:
                    proxy.resume()
                await trio.sleep(0.02)
            await listener.until("message", count)
            await trio.sleep(0.2)  # nothing may follow
            seen = listener.messages()
            opened = len(listener.of("open"))
    assert [line["id"] for line in seen] == [str(seq) for seq in range(1, count + 1)]
    assert [line["data"]["text"] for line in seen] == [f"m{number}" for number in range(count)]
    assert opened > cuts, "it was cut, and came back each time"
    assert not listener.of("reset")


@pytest.mark.http1
async def test_eventsource_with_a_ticket_comes_back_after_every_cut(quick: Chat, node_folder: Path):
    """By itself, with the URL that it was made with."""
    pair = quick.pair()
    ticket = quick.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    async with open_proxy("127.0.0.1", quick.port) as proxy:
        url = f"{WIRE.scheme}://127.0.0.1:{proxy.port}/api/chat/{pair.channel_id}?ticket={ticket}"
        async with listen(node_folder, url, "") as listener:
            for number in range(3):
                await listener.until("open", number + 1)
                await trio.to_thread.run_sync(
                    quick.send, pair.therapist, pair.channel_id, f"m{number}"
                )
                await listener.until("message", number + 1)
                proxy.cut()
                proxy.resume()
            await listener.until("open", 4)
    assert [line["data"]["text"] for line in listener.messages()] == ["m0", "m1", "m2"]
    assert not listener.of("reset")


@pytest.mark.http1
async def test_eventsource_resumes_after_a_drain(
    quick: Chat, node_folder: Path, services_folder: Path
):
    """A worker says goodbye, another one takes its place: as in a deployment."""
    pair = quick.pair()

    def worker(redis_url: str) -> AbstractContextManager[Chat]:
        return run_chat(
            quick.database, redis_url, services_folder, SOTTOVOCE_RETRY_MILLISECONDS="40"
        )

    with (
        own_valkey(services_folder) as valkey,
        worker(valkey.url) as first,
        worker(valkey.url) as second,
    ):
        async with open_proxy("127.0.0.1", first.port) as proxy:
            url = f"{WIRE.scheme}://127.0.0.1:{proxy.port}/api/chat/{pair.channel_id}"
            async with listen(node_folder, url, quick.token(pair.prospect)) as listener:
                await listener.until("open")
                await trio.to_thread.run_sync(first.send, pair.therapist, pair.channel_id, "old")
                await listener.until("message")
                proxy.target = ("127.0.0.1", second.port)
                first.process.terminate()
                await listener.until("closing")
                assert listener.of("closing")[0]["data"] == {"reason": "drain", "reconnect": True}
                await listener.until("open", 2)
                await trio.to_thread.run_sync(second.send, pair.therapist, pair.channel_id, "new")
                await listener.until("message", 2)
    assert [line["data"]["text"] for line in listener.messages()] == ["old", "new"]


async def assert_stops(listener: Listener, status: int, errors: int = 1) -> None:
    """For good: the last error has the status, and nothing follows it."""
    await listener.until("error", errors)
    last = listener.of("error")[-1]
    assert last == {"kind": "error", "status": status, "closed": True}
    seen = len(listener.seen)
    await trio.sleep(CLOSED_SECONDS)
    assert len(listener.seen) == seen


def refusals(chat: Chat, person: Any) -> list[str]:
    rows = chat.database.execute(
        "SELECT detail FROM chat_audit WHERE actor = %s AND outcome = 'refused'", (person.clerk_id,)
    )
    return [row[0] for row in rows]


def stream_url(chat: Chat, pair: Pair) -> str:
    return f"{chat.base}/api/chat/{pair.channel_id}"


@pytest.mark.http1
async def test_eventsource_stops_for_good_at_403(quick: Chat, node_folder: Path):
    pair, outsider = quick.pair(), quick.person()
    async with listen(node_folder, stream_url(quick, pair), quick.token(outsider)) as listener:
        await assert_stops(listener, 403)
    assert refusals(quick, outsider) == ["NOT_YOUR_CHANNEL"]


@pytest.mark.http1
async def test_eventsource_stops_for_good_at_404(quick: Chat, node_folder: Path):
    pair = quick.pair()
    unknown = pair.prospect._replace(clerk_id="user_of_nobody")
    async with listen(node_folder, stream_url(quick, pair), quick.token(unknown)) as listener:
        await assert_stops(listener, 404)
    assert refusals(quick, unknown) == ["USER_NOT_FOUND"]


@pytest.mark.http1
async def test_eventsource_survives_every_refusal_that_will_pass(
    quick: Chat, node_folder: Path, services_folder: Path
):
    """Nobody accepts, no room, and a token that has run out: it asks again and is let in."""
    pair = quick.pair()
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            quick.database,
            valkey.url,
            services_folder,
            SOTTOVOCE_RETRY_MILLISECONDS="40",
            SOTTOVOCE_MAX_STREAMS="1",
        ) as full,
    ):
        expired = quick.token(pair.prospect, exp=int(time.time()) - 60)
        async with (
            open_proxy("127.0.0.1", full.port) as proxy,
            listen(node_folder, stream_url(quick, pair), expired) as asleep,
        ):
            url = f"{WIRE.scheme}://127.0.0.1:{proxy.port}/api/chat/{pair.channel_id}"
            with full.stream(pair.channel_id, pair.therapist) as other:
                other.connected()
                async with listen(node_folder, url, full.token(pair.prospect)) as listener:
                    await listener.until("closing")
                    assert listener.of("closing")[0]["data"]["reason"] == "server_full"
                    proxy.target = ("127.0.0.1", quick.port)
                    await trio.to_thread.run_sync(
                        quick.send, pair.therapist, pair.channel_id, "after"
                    )
                    await listener.until("message")  # five to ten seconds later
                    assert not [line for line in listener.of("error") if line["closed"]]
            await asleep.until("closing", 2)
            assert {line["data"]["reason"] for line in asleep.of("closing")} == {"session_ended"}
            assert not [line for line in asleep.of("error") if line["closed"]]


@pytest.mark.http1
async def test_eventsource_stops_for_good_when_the_subscription_ends(
    quick: Chat, node_folder: Path
):
    """It comes back once after the goodbye, and the answer to that ends it."""
    pair = quick.pair()
    token = quick.token(pair.prospect)
    async with listen(node_folder, stream_url(quick, pair), token) as listener:
        await listener.until("open")
        quick.database.execute(
            "UPDATE users SET subscription_status = null WHERE id = %s", (pair.prospect.user_id,)
        )
        await listener.until("closing")
        assert listener.of("closing")[0]["data"]["reconnect"] is False
        await assert_stops(listener, 403, errors=2)
    assert refusals(quick, pair.prospect) == ["SUBSCRIPTION_REQUIRED"]
