"""A revoked access ends at once where somebody says so, on every worker, and for nobody else."""

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
import redis
import trio

from storage.redis import Keys
from tests.support.conversation import Conversation, Listener, conversation
from tests.support.running import RunningServer, running_server

WORKERS = 2
LIMITS: dict[str, Any] = {
    "SOTTOVOCE_MAX_STREAMS_PER_USER": "500",
    # Without an eviction nothing would be looked at while a test runs.
    "SOTTOVOCE_RECHECK_SECONDS": "600",
    "SOTTOVOCE_ACCESS_CACHE_SECONDS": "60",
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(workers=WORKERS, **LIMITS) as running:
        yield running


def subscribe(server: RunningServer, status: str) -> None:
    with psycopg.connect(server.ready.database_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE users SET subscription_status = %s WHERE id = %s",
            (status, server.ready.prospect.user_id),
        )


@pytest.fixture
def revoked_later(server: RunningServer) -> Iterator[None]:
    """A test may take the prospect's subscription away; it is given back."""
    yield
    subscribe(server, "active")
    evict(server, "--all")


def evict(server: RunningServer, *whom: str) -> subprocess.CompletedProcess[str]:
    done = server.command("evict", *whom)
    assert done.returncode == 0, done.stderr
    return done


async def prospects_everywhere(talk: Conversation) -> list[Listener]:
    """The prospect's streams, one on each worker at least."""
    streams: dict[int, list[Listener]] = {}
    while len(streams) < WORKERS:
        listener = await talk.listen(person="prospect")
        streams.setdefault(await talk.worker_of(listener), []).append(listener)
    return [listener for mine in streams.values() for listener in mine]


async def run(call: Any, *args: Any) -> Any:
    return await trio.to_thread.run_sync(call, *args)


@pytest.mark.usefixtures("revoked_later")
@pytest.mark.parametrize("whom", ["--user", "--clerk-id", "--channel", "--all"])
async def test_a_revoked_access_ends_at_once_on_every_worker(server: RunningServer, whom: str):
    ready = server.ready
    with psycopg.connect(ready.database_url) as connection:
        row = connection.execute(
            "SELECT clerk_id FROM users WHERE id = %s", (ready.prospect.user_id,)
        ).fetchone()
        assert row is not None
    value = {
        "--user": [str(ready.prospect.user_id)],
        "--clerk-id": [row[0]],
        "--channel": [str(ready.channel_id)],
        "--all": [],
    }
    async with conversation(server) as talk:
        therapists = [await talk.listen(person="therapist") for _ in range(2)]
        mine = await prospects_everywhere(talk)
        await run(subscribe, server, "canceled")
        await run(evict, server, "--user", str(ready.outsider.user_id))
        await talk.say(f"still heard {whom}")
        assert await talk.all_show(f"still heard {whom}", seconds=5) < 1
        assert not any(listener.ended.is_set() for listener in mine), "nobody spoke of them"

        done = await run(evict, server, whom, *value[whom])
        assert done.stderr == f"heard by {WORKERS} workers\n"
        with trio.fail_after(1.5):
            for listener in mine:
                await listener.ended.wait()
        assert {listener.reason for listener in mine} == {"subscription_ended"}
        await talk.say(f"not heard {whom}")
        await trio.sleep(0.1)
        assert all(f"not heard {whom}" not in listener.texts for listener in mine)
        assert all(f"not heard {whom}" in listener.texts for listener in therapists)
        async with server.async_client("prospect") as client:
            for _ in range(4 * WORKERS):  # the cached permit of no worker is used
                response = await client.get(
                    f"/api/chat/{ready.channel_id}", headers={"Connection": "close"}
                )
                assert response.json()["code"] == "SUBSCRIPTION_REQUIRED"


async def test_what_is_no_eviction_changes_nothing(server: RunningServer):
    url = httpx.URL(server.ready.database_url)
    database = {"host": url.host, "port": url.port, "dbname": url.path.strip("/")}
    control = Keys(database).control

    def say_garbage() -> list[Any]:
        garbage = [b"", b"\xff{", b"{}", b'{"userId":"x"}', b"[" * 10_000, b"\0" * 100_000]
        with redis.Redis.from_url(server.ready.redis_url) as client:
            return [client.publish(control, raw) for raw in garbage]

    async with conversation(server) as talk:
        streams = await prospects_everywhere(talk)
        assert await run(say_garbage) == [WORKERS] * 6
        await talk.say("after the garbage")
        assert await talk.all_show("after the garbage", seconds=5) < 1
        assert not any(listener.ended.is_set() for listener in streams)


@pytest.mark.usefixtures("revoked_later")
async def test_an_eviction_that_passed_while_redis_was_away_is_made_up_for(server: RunningServer):
    """Whoever lost the feed looks at everything once it is back."""

    def cut_the_feeds() -> int:
        with redis.Redis.from_url(server.ready.redis_url) as client:
            return int(client.client_kill_filter(_type="pubsub"))

    async with conversation(server) as talk:
        mine = await prospects_everywhere(talk)
        await run(subscribe, server, "canceled")
        assert await run(cut_the_feeds) == WORKERS
        with trio.fail_after(5):
            for listener in mine:
                await listener.ended.wait()
        assert {listener.reason for listener in mine} == {"subscription_ended"}
