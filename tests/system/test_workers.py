"""Several processes, one conversation; and what happens to it when a part below dies."""

import base64
import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import trio

from storage.embedded import EmbeddedValkey
from tests.support.conversation import conversation
from tests.support.running import RunningServer, clean_environment, running_serve, running_server
from tests.support.services import temporary_folder
from tests.support.sse import BROKEN

LIMITS: dict[str, Any] = {"SOTTOVOCE_MAX_STREAMS_PER_USER": "500"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(workers=2, **LIMITS) as running:
        yield running


@contextmanager
def second_server(first: RunningServer, log_file: Path) -> Iterator[str]:
    """`sottovoce serve` on the first one's database and Redis; its URL."""
    database, redis_url = first.ready.database_url, first.ready.redis_url
    url = httpx.URL(database)
    environ = clean_environment(
        {
            "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": "true",
            "UPSTASH_REDIS_URL": redis_url,
            "DB_HOST": url.host,
            "DB_PORT": str(url.port),
            "DB_USER": url.username,
            "DB_PASSWORD": url.password,
            "DB_DATABASE": url.path.strip("/"),
            "SOTTOVOCE_DB_SSLMODE": "disable",
            "SOTTOVOCE_DRAIN_SECONDS": "0.2",
            "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": publishable_key(first.ready.issuer),
        }
    )
    with running_serve(environ, log_file) as served:
        yield served


def publishable_key(issuer: str) -> str:
    host = issuer.removeprefix("http://")
    return "pk_test_" + base64.b64encode(f"{host}$".encode()).decode()


async def test_a_send_to_one_worker_reaches_the_streams_of_all(server: RunningServer):
    async with conversation(server) as talk:
        streams = await talk.listen_on_every_worker(2)
        assert set(streams) == set(server.ready.pids.workers)
        for number in range(20):  # whichever worker takes them
            await talk.say(f"hello {number}")
        await talk.all_show("hello 19", seconds=5)
        for listener in talk.listeners:
            assert listener.texts[-20:] == [f"hello {number}" for number in range(20)]


async def test_a_message_arrives_in_milliseconds_on_every_worker(server: RunningServer):
    """Half of a second would do for reconciliation: this is the fast path."""
    async with conversation(server) as talk:
        await talk.listen_on_every_worker(2)
        took = []
        for number in range(20):
            started = trio.current_time()
            await talk.say(f"quick {number}")
            await talk.all_show(f"quick {number}", seconds=5)
            took.append(trio.current_time() - started)
        assert statistics.median(took) < 0.1, took


async def test_a_send_to_one_server_reaches_a_stream_on_the_other(server: RunningServer):
    with temporary_folder() as folder, second_server(server, folder / "log") as other:
        async with conversation(server) as talk:
            here, there = await talk.listen(), await talk.listen(base_url=other)
            await talk.say("to both servers")
            assert await talk.all_show("to both servers", seconds=5) < 1
            assert here.seqs[-1] == there.seqs[-1]


async def test_valkey_killed_in_the_middle_of_a_conversation_loses_nothing():
    with running_server(workers=2, **LIMITS) as server:
        async with conversation(server) as talk:
            await talk.listen_on_every_worker(2)
            await talk.say("before")
            await talk.all_show("before", seconds=5)
            os.kill(server.ready.pids.redis, signal.SIGKILL)
            await talk.say("the next one")
            assert await talk.all_show("the next one", seconds=5) < 2
            for number in range(10):
                await talk.say(f"without {number}")
            await talk.all_show("without 9", seconds=5)
            late = await talk.listen(last_id="1")
            fresh = await talk.listen()
            await talk.say("last")
            await talk.all_show("last", seconds=5)
            whole = ["before", "the next one", *(f"without {n}" for n in range(10)), "last"]
            for listener in talk.listeners:
                expected = whole[1:] if listener is late else whole
                assert listener.texts == expected
                assert listener.seqs == list(range(14 - len(expected), 14))
            assert fresh.texts == whole
            async with server.async_client(None) as client:
                readiness = (await client.get("/readyz")).json()
                assert (readiness["status"], readiness["redis"]) == ("degraded", "down")
                metrics = (await client.get("/metrics")).text
                assert 'sottovoce_dependency_up{dependency="redis"} 0.0' in metrics


async def test_valkey_that_comes_back_empty_is_used_again():
    with running_server(workers=2, **LIMITS) as server:
        url = httpx.URL(server.ready.redis_url)
        async with conversation(server) as talk:
            await talk.listen_on_every_worker(2)
            await talk.say("before")
            await talk.all_show("before", seconds=5)
            os.kill(server.ready.pids.redis, signal.SIGKILL)
            await talk.say("during")
            await talk.all_show("during", seconds=5)
            psutil.wait_procs(
                [p for p in server.processes() if p.pid == server.ready.pids.redis], timeout=5
            )
            with (
                temporary_folder() as folder,
                EmbeddedValkey(folder / "v", port=url.port, password=url.password),
            ):
                async with server.async_client(None) as client:
                    with trio.fail_after(6):
                        while (await client.get("/readyz")).json()["status"] != "ready":
                            await trio.sleep(0.1)
                await talk.say("after")
                await talk.all_show("after", seconds=5)
                fresh = await talk.listen()
                await talk.say("last")
                await talk.all_show("last", seconds=5)
                assert fresh.texts == ["before", "during", "after", "last"]


async def test_postgresql_stopped_keeps_the_streams_and_refuses_sends_until_it_is_back():
    with running_server(workers=1, SOTTOVOCE_HEARTBEAT_SECONDS="0.3", **LIMITS) as server:
        async with conversation(server) as talk:
            listener = await talk.listen()
            await talk.say("before")
            await talk.all_show("before", seconds=5)
            postgres = psutil.Process(server.ready.pids.postgres)
            stopped = [postgres, *postgres.children()]
            for process in stopped:
                process.suspend()
            try:
                mine, next_one = (f"00000000-0000-4000-8000-00000000000{n}" for n in (1, 2))
                started = trio.current_time()
                status, reply = await talk.send("during", client_message_id=mine)
                assert (status, reply["code"]) == (503, "UNAVAILABLE")
                assert trio.current_time() - started < 2
                beats = listener.heartbeats
                await trio.sleep(1)
                assert listener.heartbeats >= beats + 2
                assert not listener.ended.is_set()
            finally:
                for process in stopped:
                    process.resume()
            with trio.fail_after(5):  # what was under way when it stopped may be refused yet
                while (await talk.send("during", client_message_id=mine))[0] != 200:
                    await trio.sleep(0.1)
                while (await talk.send("after", client_message_id=next_one))[0] != 200:
                    await trio.sleep(0.1)
            await talk.all_show("after", seconds=5)
            assert listener.texts == ["before", "during", "after"]


async def test_a_worker_killed_is_replaced_and_its_streams_resume_elsewhere():
    with running_server(workers=2, **LIMITS) as server:
        async with conversation(server) as talk:
            streams = await talk.listen_on_every_worker(2)
            await talk.say("before")
            await talk.all_show("before", seconds=5)
            pid, lost = next(iter(streams.items()))
            os.kill(pid, signal.SIGKILL)
            await lost.ended.wait()
            talk.listeners = [each for each in talk.listeners if not each.ended.is_set()]
            with trio.fail_after(10):
                while True:
                    try:
                        await talk.say("while it was gone")
                        break
                    except BROKEN:
                        await trio.sleep(0.05)
            again = await talk.listen(last_id=str(lost.seqs[-1]))
            await talk.all_show("while it was gone", seconds=5)
            assert again.texts == ["while it was gone"]
