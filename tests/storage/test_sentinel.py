"""Redis behind Sentinels, three real ones: who is asked, and what a failover does."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import redis
import trio

from protocol.confidential import Secret
from storage.contract import Eviction
from storage.embedded import EmbeddedValkey, _valkey_binary
from storage.redis import Keys
from storage.redis.evictions import publish_eviction
from tests.storage.stores import draft, make_rooms, opened_store
from tests.support.chat import eventually
from tests.support.services import Database

NAME = "the chat's"
FAILOVER_SECONDS = 20.0


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def knows_the_others(client: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        about = client.sentinel_master(NAME)
        assert isinstance(about, dict)
        return int(about["num-other-sentinels"]) == 2
    return False


class Set:
    """A primary, its replica, and three Sentinels."""

    def __init__(self, servers: list[EmbeddedValkey], sentinels: list[int]) -> None:
        self.servers = servers
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        return f"redis-sentinel://:{self.servers[0].password}@{hosts}/0#the%20chat's"


@contextmanager
def sentinel_set(folder: Path) -> Iterator[Set]:
    with ExitStack() as stack:
        primary = EmbeddedValkey(folder / "a", durable=False)
        primary._config["primaryauth"] = primary.password
        stack.enter_context(primary)
        replica = EmbeddedValkey(
            folder / "b",
            durable=False,
            password=primary.password,
            config={
                "replicaof": f"127.0.0.1 {primary.port}",
                "primaryauth": primary.password,
                "repl-diskless-sync-delay": 0,
            },
        )
        stack.enter_context(replica)
        with redis.Redis.from_url(replica.url) as client:
            eventually(lambda: client.info("replication")["master_link_status"] == "up")
        ports = free_ports(3)
        for port in ports:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f'sentinel monitor "{NAME}" 127.0.0.1 {primary.port} 2\n'
                f'sentinel auth-pass "{NAME}" {primary.password}\n'
                f'sentinel down-after-milliseconds "{NAME}" 500\n'
                f'sentinel failover-timeout "{NAME}" 2000\n'
            )
            process = subprocess.Popen(
                [str(_valkey_binary()), str(config), "--sentinel"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        for port in ports:
            with redis.Redis(port=port) as client:
                eventually(partial(knows_the_others, client), seconds=20)
        yield Set([primary, replica], ports)


async def until(look: object, seconds: float = FAILOVER_SECONDS) -> None:
    assert callable(look)
    with trio.fail_after(seconds):
        while not look():
            await trio.sleep(0.05)


async def test_two_stores_hear_each_other_before_and_after_a_failover(
    folder: Path, database: Database
):
    with sentinel_set(folder) as redis_set:
        (room,) = make_rooms(database)
        async with (
            opened_store(database, redis_set.url) as one,
            opened_store(database, redis_set.url) as two,
        ):
            two.store.feed.want(room.channel_id)
            assert await two.store.feed.listening(room.channel_id, seconds=5)
            first = await one.store.append(draft(room, "before"))
            await until(lambda: (room.channel_id, first) in two.delivered)
            os.kill(redis_set.servers[0].pid, signal.SIGKILL)
            await until(lambda: not two.store.feed.connected)
            during = await one.store.append(draft(room, "meanwhile"))  # nobody waits for Redis
            await until(lambda: one.store.redis.up and two.store.feed.connected)
            assert await two.store.feed.listening(room.channel_id, seconds=FAILOVER_SECONDS)
            last = await one.store.append(draft(room, "after"))
            await until(lambda: (room.channel_id, last) in two.delivered)
            page = await two.store.history(room.channel_id, first.seq, head=last.seq)
            assert page.records == [during, last]
        with redis.Redis.from_url(redis_set.servers[1].url) as client:
            assert client.dbsize() > 0, "the replica that was promoted is used"


def test_an_eviction_is_published_at_the_primary(folder: Path):
    keys = Keys({"host": "h", "port": 1, "dbname": "d"})
    with (
        sentinel_set(folder) as redis_set,
        redis.Redis.from_url(redis_set.servers[0].url) as client,
        client.pubsub() as heard,
    ):
        heard.subscribe(keys.control)
        assert heard.get_message(timeout=5) is not None
        assert publish_eviction(Secret(redis_set.url), keys, Eviction(user_id=7)) == 1
        message = heard.get_message(timeout=5)
        assert message is not None
        assert Eviction.decode(message["data"]) == Eviction(user_id=7)
