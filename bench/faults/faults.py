"""What is broken, and how it heals. Each function breaks one thing, waits, and mends it.

What a fault needs of the parts it takes from the deployment; chance comes from the campaign's
seed. A fault leaves the deployment as it was, also when it is cancelled.
"""

import random
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import trio

from bench.faults.deployment import Deployment
from bench.faults.ledger import Era
from bench.faults.people import Load

LOCK_SECONDS = 10.0
_PROMOTE = "SELECT pg_promote(true, 20)"
SYNC_SECONDS = 10.0
SOME_DESCRIPTORS = 3
"""Left to a worker whose descriptors are used up."""
MORE_CONNECTIONS = 200
"""Tried until PostgreSQL takes no more."""


class Place(NamedTuple):
    """What a fault is done to."""

    deployment: Deployment
    load: Load
    rng: random.Random

    @property
    def node(self) -> int:
        return self.rng.randrange(len(self.deployment.nodes))

    async def wait(self, least: float, most: float) -> None:
        await trio.sleep(self.rng.uniform(least, most))


Fault = Callable[[Place], Awaitable[None]]
FAULTS: dict[str, Fault] = {}


def _fault(name: str) -> Callable[[Fault], Fault]:
    def add(fault: Fault) -> Fault:
        FAULTS[name] = fault
        return fault

    return add


# Valkey


@_fault("valkey killed")
async def valkey_killed(place: Place) -> None:
    """kill -9; it comes back empty."""
    deployment = place.deployment
    deployment.signal(deployment.valkey, signal.SIGKILL)
    await place.wait(1.0, 4.0)
    await deployment.start(deployment.valkey)


@_fault("valkey hangs")
async def valkey_hangs(place: Place) -> None:
    """SIGSTOP: connections stay, nothing answers."""
    deployment = place.deployment
    deployment.signal(deployment.valkey, signal.SIGSTOP)
    try:
        await place.wait(2.0, 5.0)
    finally:
        deployment.signal(deployment.valkey, signal.SIGCONT)


@_fault("valkey restarted empty")
async def valkey_restarted(place: Place) -> None:
    deployment = place.deployment
    await deployment.stop(deployment.valkey)
    await deployment.start(deployment.valkey)


@_fault("valkey restarted with a stale snapshot")
async def valkey_stale(place: Place) -> None:
    """What it knew a while ago is back, and what came since is not."""
    deployment = place.deployment
    await deployment.valkey_say("SAVE")
    await place.wait(1.0, 3.0)
    deployment.signal(deployment.valkey, signal.SIGKILL)
    await place.wait(0.0, 1.0)
    await deployment.start(deployment.valkey, empty=False)


@_fault("valkey flushed")
async def valkey_flushed(place: Place) -> None:
    await place.deployment.valkey_say("FLUSHALL")


@_fault("valkey drops pub/sub connections")
async def valkey_drops_pubsub(place: Place) -> None:
    await place.deployment.valkey_say("CLIENT", "KILL", "TYPE", "pubsub")


@_fault("valkey drops normal connections")
async def valkey_drops_normal(place: Place) -> None:
    await place.deployment.valkey_say("CLIENT", "KILL", "TYPE", "normal")


@_fault("valkey out of memory")
async def valkey_full(place: Place) -> None:
    deployment = place.deployment
    await deployment.valkey_say("CONFIG", "SET", "maxmemory", "1mb")
    try:
        await place.wait(2.0, 4.0)
    finally:
        with trio.CancelScope(shield=True):
            await deployment.valkey_say("CONFIG", "SET", "maxmemory", "0")


@_fault("valkey slow")
async def valkey_slow(place: Place) -> None:
    proxies = place.deployment.redis_proxies
    delay = place.rng.uniform(0.02, 0.3)
    try:
        for proxy in proxies:
            proxy.delay = delay
        await place.wait(2.0, 4.0)
    finally:
        for proxy in proxies:
            proxy.delay = 0.0


@_fault("valkey replica promoted")
async def valkey_failover(place: Place) -> None:
    """As Sentinel does it: the primary is lost with what its replica had not heard; the replica
    serves, and the old one comes back as a replica of it, with what it knew."""
    deployment = place.deployment
    old = deployment.valkey
    new = "valkey-1" if old == "valkey-0" else "valkey-0"
    part = await deployment.start(new)
    await deployment.valkey_say("REPLICAOF", "127.0.0.1", str(deployment.parts[old].port), name=new)
    with trio.move_on_after(SYNC_SECONDS):
        while not await _is_in_sync(deployment, new):
            await trio.sleep(0.1)
    await deployment.valkey_say("SAVE", name=old)
    await place.wait(0.2, 1.0)
    deployment.signal(old, signal.SIGKILL)
    await deployment.valkey_say("REPLICAOF", "NO", "ONE", name=new)
    deployment.valkey = new
    for proxy in deployment.redis_proxies:
        proxy.target = ("127.0.0.1", part.port)
        proxy.cut()
        proxy.resume()
    await deployment.start(old, empty=False)
    await deployment.valkey_say("REPLICAOF", "127.0.0.1", str(part.port), name=old)
    await place.wait(0.5, 1.0)
    await deployment.stop(old)


async def _is_in_sync(deployment: Deployment, name: str) -> bool:
    info = await deployment.valkey_say("INFO", "replication", name=name)
    return info is not None and info.get("master_link_status") == "up"


# PostgreSQL


@_fault("postgres killed")
async def postgres_killed(place: Place) -> None:
    deployment = place.deployment
    deployment.signal(deployment.postgres, signal.SIGKILL)
    await place.wait(0.5, 3.0)
    await deployment.start(deployment.postgres)


@_fault("postgres backend killed in a statement")
async def postgres_backend_killed(place: Place) -> None:
    """PostgreSQL ends all of them then, and recovers."""
    deployment = place.deployment
    query = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = 'sottovoce' AND state = 'active' AND query LIKE '%%append%%'"
    )
    with trio.move_on_after(3.0), suppress(psycopg.Error):
        while not (found := await deployment.sql(query)):
            await trio.sleep(0.005)
        with suppress(psutil.NoSuchProcess):
            psutil.Process(found[0][0]).kill()
    await trio.sleep(0.5)


@_fault("postgres hangs")
async def postgres_hangs(place: Place) -> None:
    deployment = place.deployment
    deployment.signal(deployment.postgres, signal.SIGSTOP)
    try:
        await place.wait(2.0, 5.0)
    finally:
        deployment.signal(deployment.postgres, signal.SIGCONT)


@_fault("postgres restarted")
async def postgres_restarted(place: Place) -> None:
    deployment = place.deployment
    await deployment.stop(deployment.postgres)
    await deployment.start(deployment.postgres)


@_fault("postgres has no connection left")
async def postgres_full(place: Place) -> None:
    """And those that the servers had are ended."""
    deployment = place.deployment
    held: list[psycopg.Connection[object]] = []

    def fill() -> None:
        conninfo = deployment.parts[deployment.postgres].conninfo
        with suppress(psycopg.Error), psycopg.connect(**conninfo, autocommit=True) as admin:
            with suppress(psycopg.Error):
                while len(held) < MORE_CONNECTIONS:
                    held.append(psycopg.connect(**conninfo, connect_timeout=2))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'sottovoce'"
            )
            with suppress(psycopg.Error):
                while len(held) < MORE_CONNECTIONS:
                    held.append(psycopg.connect(**conninfo, connect_timeout=2))

    try:
        await trio.to_thread.run_sync(fill)
        await place.wait(1.0, 3.0)
    finally:
        for connection in held:
            connection.close()


@_fault("a channel's row locked for 10 s")
async def postgres_lock(place: Place) -> None:
    channel = place.rng.choice(place.deployment.channels)

    def lock(connection: psycopg.Connection[object]) -> None:
        connection.execute("SELECT FROM chat_channels WHERE id = %s FOR UPDATE", [channel.id])

    await place.deployment.while_connected(lock, LOCK_SECONDS)


@_fault("postgres fails over to its standby")
async def postgres_failover(place: Place) -> None:
    """The primary is lost for good. Its standby is a synchronous one, so it has all that was ever
    acknowledged: one that is not may lose the last of it, which nobody here could mend."""
    deployment = place.deployment
    standby = await deployment.start_standby()
    await place.wait(0.2, 1.0)
    deployment.signal(deployment.postgres, signal.SIGKILL)
    await place.wait(0.0, 0.5)
    await deployment.sql(_PROMOTE, name=standby)
    deployment.turn_to(standby)


@_fault("postgres fails over, and its standby is promoted late")
async def postgres_late_failover(place: Place) -> None:
    """The servers are led to it while it can only be read."""
    deployment = place.deployment
    standby = await deployment.start_standby()
    await place.wait(0.2, 1.0)
    deployment.signal(deployment.postgres, signal.SIGKILL)
    deployment.turn_to(standby)
    await place.wait(1.0, 3.0)
    await deployment.sql(_PROMOTE)


@_fault("postgres is restored to an earlier point")
async def postgres_restored(place: Place) -> None:
    """As the docs say: the servers are stopped, PostgreSQL is put back, `sottovoce restored` is
    said, the servers are started. Valkey and the clients still know the future that is lost."""
    deployment, ledger = place.deployment, place.load.ledger
    backup = await deployment.start_standby()
    kept_until = place.load.now
    await deployment.hold_back(backup)
    await place.wait(1.0, 3.0)
    async with trio.open_nursery() as nursery:
        for node in deployment.nodes:
            nursery.start_soon(node.stop)
    lost = await deployment.stored()
    deployment.signal(deployment.postgres, signal.SIGKILL)
    await deployment.sql(_PROMOTE, name=backup)
    deployment.turn_to(backup)
    ledger.past.append(Era(ledger.epoch, kept_until, place.load.now, lost))
    ledger.epoch = await deployment.say_restored()
    async with trio.open_nursery() as nursery:
        for node in deployment.nodes:
            nursery.start_soon(node.start)


@_fault("postgres read-only")
async def postgres_read_only(place: Place) -> None:
    deployment = place.deployment
    await deployment.sql("ALTER SYSTEM SET default_transaction_read_only = on")
    await deployment.sql("SELECT pg_reload_conf()")
    try:
        await place.wait(1.0, 3.0)
    finally:
        with trio.CancelScope(shield=True):
            await deployment.sql("ALTER SYSTEM RESET default_transaction_read_only")
            await deployment.sql("SELECT pg_reload_conf()")


# The network


@_fault("one server loses valkey")
async def redis_cut(place: Place) -> None:
    proxy = place.deployment.redis_proxies[place.node]
    proxy.cut()
    try:
        await place.wait(1.0, 4.0)
    finally:
        proxy.resume()


@_fault("one server's way to valkey is silent")
async def redis_silent(place: Place) -> None:
    """Half open: what is sent arrives nowhere, and nobody says so."""
    proxy = place.deployment.redis_proxies[place.node]
    proxy.stall()
    try:
        await place.wait(2.0, 5.0)
    finally:
        proxy.cut()
        proxy.resume()


@_fault("one server's way to valkey a byte at a time")
async def redis_bytes(place: Place) -> None:
    proxy = place.deployment.redis_proxies[place.node]
    proxy.piece = 1
    try:
        await place.wait(1.0, 2.0)
    finally:
        proxy.piece = None


@_fault("the way to postgres is cut")
async def postgres_cut(place: Place) -> None:
    proxy = place.deployment.postgres_proxy
    proxy.cut()
    try:
        await place.wait(1.0, 3.0)
    finally:
        proxy.resume()


@_fault("the way to postgres is silent")
async def postgres_silent(place: Place) -> None:
    proxy = place.deployment.postgres_proxy
    proxy.stall()
    try:
        await place.wait(2.0, 4.0)
    finally:
        proxy.cut()
        proxy.resume()


@_fault("the way to postgres stalls and goes on")
async def postgres_stalls(place: Place) -> None:
    proxy = place.deployment.postgres_proxy
    proxy.stall()
    try:
        await place.wait(0.3, 2.5)
    finally:
        proxy.resume()


@_fault("the way to postgres is slow")
async def postgres_slow(place: Place) -> None:
    proxy = place.deployment.postgres_proxy
    proxy.delay = place.rng.uniform(0.01, 0.1)
    try:
        await place.wait(2.0, 4.0)
    finally:
        proxy.delay = 0.0


@_fault("the way to postgres a byte at a time")
async def postgres_bytes(place: Place) -> None:
    proxy = place.deployment.postgres_proxy
    proxy.piece = 1
    try:
        await place.wait(1.0, 2.0)
    finally:
        proxy.piece = None


# Ours


@_fault("worker killed")
async def worker_killed(place: Place) -> None:
    for worker in place.deployment.nodes[place.node].workers():
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@_fault("worker killed after a commit that was never published")
async def worker_killed_unpublished(place: Place) -> None:
    """Its way to Valkey takes nothing while it commits and acknowledges, and then it dies."""
    number = place.node
    proxy = place.deployment.redis_proxies[number]
    proxy.stall()
    try:
        await place.wait(0.1, 0.4)
        for worker in place.deployment.nodes[number].workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    finally:
        proxy.cut()  # what was held is never passed on
        proxy.resume()


@_fault("supervisor killed")
async def supervisor_killed(place: Place) -> None:
    node = place.deployment.nodes[place.node]
    await node.stop(signal.SIGKILL)
    await place.wait(0.1, 1.0)
    await node.start()


@_fault("server restarted by SIGTERM")
async def server_restarted(place: Place) -> None:
    node = place.deployment.nodes[place.node]
    await node.stop()
    await node.start()


@_fault("event loop blocked for 2 s")
async def worker_blocked(place: Place) -> None:
    """The worker's process stands still, as one whose loop is blocked."""
    workers = place.deployment.nodes[place.node].workers()
    try:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
        await trio.sleep(2.0)
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()


@_fault("file descriptors used up")
async def descriptors(place: Place) -> None:
    limits: list[tuple[int, tuple[int, int]]] = []
    try:
        for worker in place.deployment.nodes[place.node].workers():
            with suppress(psutil.NoSuchProcess, OSError):
                limits.append((worker.pid, resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)))
                few = worker.num_fds() + SOME_DESCRIPTORS
                resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (few, limits[-1][1][1]))
        await place.wait(1.0, 3.0)
    finally:
        for pid, limit in limits:
            with suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


@_fault("disk full for the log")
async def log_disk_full(place: Place) -> None:
    """A server that is started when its log can take nothing."""
    node = place.deployment.nodes[place.node]
    node.log_to = node.log.with_name("full")
    if not node.log_to.exists():
        node.log_to.symlink_to("/dev/full")
    try:
        await node.stop()
        await node.start()
        await place.wait(1.0, 2.0)
    finally:
        node.log_to = node.log
        with trio.CancelScope(shield=True):
            await node.stop()
            await node.start()


# Clients


@_fault("clients reset their connections")
async def clients_reset(place: Place) -> None:
    for page in place.load.pages:
        if page.open is not None and place.rng.random() < 0.3:
            page.open.reset()


@_fault("clients half close")
async def clients_half_close(place: Place) -> None:
    for page in place.load.pages:
        if page.open is not None and place.rng.random() < 0.3:
            page.open.half_close()


@_fault("clients freeze")
async def clients_freeze(place: Place) -> None:
    async with trio.open_nursery() as nursery:
        for page in place.load.pages:
            if page.open is not None and place.rng.random() < 0.2:
                nursery.start_soon(page.open.freeze, 3.0)


@_fault("everybody comes back at once")
async def clients_storm(place: Place) -> None:
    for page in place.load.pages:
        if page.open is not None:
            page.open.reset()


# The issuer of tokens


@_fault("issuer down")
async def issuer_down(place: Place) -> None:
    await _issuer_fails(place, "down")


@_fault("issuer slow")
async def issuer_slow(place: Place) -> None:
    await _issuer_fails(place, "slow")


@_fault("issuer serves garbage")
async def issuer_garbage(place: Place) -> None:
    await _issuer_fails(place, "garbage")


@_fault("issuer rotates its key")
async def issuer_rotates(place: Place) -> None:
    place.deployment.issuer.rotate()


async def _issuer_fails(place: Place, how: str) -> None:
    """While a server is started again, which wants its keys."""
    issuer = place.deployment.issuer
    issuer.fails = how
    try:
        for worker in place.deployment.nodes[place.node].workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        await place.wait(1.0, 3.0)
    finally:
        issuer.fails = None
