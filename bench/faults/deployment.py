"""Everything that can break: PostgreSQL, Valkey, the network to them, an issuer, two servers.

The servers are told of proxies, never of the parts themselves. Each has its own way to Valkey,
so that one of them can lose it alone; PostgreSQL they name alike, as their Redis keys ask
(README, "Running it for real").
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import redis
import trio

from bench.faults.issuer import Issuer
from bench.faults.ledger import Stored
from bench.faults.proxy_process import ProxyProcess, open_proxy_process
from bench.subjects import ROOT

NODES = 2
READY_SECONDS = 30.0
STOP_SECONDS = 20.0
START_AGAIN_SECONDS = 0.2
ASK_SECONDS = 2.0
STANDBY_SECONDS = 15.0
HEARTBEAT_SECONDS = 1.0
SOTTOVOCE = [sys.executable, "-c", "from server.cli import main; main()"]

_SEED = """
WITH numbers AS (SELECT n FROM generate_series(1, %(count)s::bigint) AS n),
therapist_users AS (
    INSERT INTO users (clerk_id, email, first_name, last_name, role, is_active)
    SELECT 'user_fault_t' || n, 't' || n || '@example.com', 'T', n::text, 'therapist', true
    FROM numbers RETURNING id, substr(clerk_id, 13)::bigint AS n
),
prospects AS (
    INSERT INTO users
        (clerk_id, email, first_name, last_name, role, is_active, subscription_status)
    SELECT 'user_fault_p' || n, 'p' || n || '@example.com', 'P', n::text, 'prospect', true,
        'active'
    FROM numbers RETURNING id, substr(clerk_id, 13)::bigint AS n
),
colleagues AS (
    INSERT INTO therapists (user_id, name, title)
    SELECT id, 'T ' || n, 'LMFT' FROM therapist_users RETURNING id, user_id
)
INSERT INTO chat_channels (channel_identifier, therapist_id, prospect_user_id)
SELECT 'fault-' || n, colleagues.id, prospects.id
FROM therapist_users
JOIN colleagues ON colleagues.user_id = therapist_users.id
JOIN prospects USING (n)
RETURNING substr(channel_identifier, 7)::bigint, id
"""


class Channel(NamedTuple):
    """A seeded channel and the Clerk ids of its two people."""

    id: int
    therapist: str
    prospect: str


class Part(NamedTuple):
    """A running PostgreSQL or Valkey."""

    name: str
    pid: int
    port: int
    url: str
    conninfo: dict[str, Any]


class Node:
    """One `sottovoce serve`: a supervisor and its worker.

    Attributes:
        log_to: where it prints; `/dev/full` is a full disk.
        env: its settings.
    """

    def __init__(self, number: int, port: int, env: Mapping[str, str], log: Path) -> None:
        self.number = number
        self.port = port
        self.log_to = self.log = log
        self.env = dict(env)
        self._process: trio.Process | None = None

    async def start(self) -> None:
        """As a service manager does: again, if it ends at once. The workers of a supervisor that
        was killed hold the port until they have drained.

        Raises:
            trio.TooSlowError: it does not serve.
        """
        with trio.fail_after(READY_SECONDS):
            while not self.workers():
                if self._process is None or self._process.poll() is not None:
                    await trio.sleep(START_AGAIN_SECONDS)
                    await self._launch()
                await trio.sleep(0.02)
            await self.answering()

    async def _launch(self) -> None:
        with self.log_to.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                [*SOTTOVOCE, "serve", "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self.env,
            )

    async def answering(self) -> None:
        """Until it takes connections and answers. The caller limits the time."""
        while not await self._says("/healthz", b"200 OK"):
            await trio.sleep(0.05)

    async def ready(self) -> None:
        """Until it has PostgreSQL and Redis, and says so. The caller limits the time."""
        while not await self._says("/readyz", b'"ready"'):
            await trio.sleep(0.05)

    async def gauge(self, name: str) -> float:
        """Of all its workers together; NaN if it does not say."""
        for line in (await self._get("/metrics")).decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return math.nan

    async def _says(self, path: str, what: bytes) -> bool:
        return what in await self._get(path)

    async def _get(self, path: str) -> bytes:
        """What it answered, all of it if there was time."""
        answer = b""
        with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(ASK_SECONDS):
            async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
                request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                await stream.send_all(request.encode())
                async for part in stream:
                    answer += part
        return answer

    def workers(self) -> list[psutil.Process]:
        """None while it is stopped."""
        if self._process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(self._process.pid).children()
                if "server.engine.worker" in child.cmdline()
            ]
        return []

    async def stop(self, sign: int = signal.SIGTERM) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(sign)
        with trio.move_on_after(STOP_SECONDS) as scope:
            await self._process.wait()
        if scope.cancelled_caught:
            self._process.kill()
            await self._process.wait()
        self._process = None


class Deployment:
    """See the module. Made by `open_deployment`.

    Attributes:
        postgres, valkey: which of the two is the primary.
    """

    def __init__(
        self,
        warden: trio.Process,
        issuer: Issuer,
        parts: dict[str, Part],
        postgres_proxy: ProxyProcess,
        redis_proxies: list[ProxyProcess],
    ) -> None:
        self.issuer = issuer
        self.parts = parts
        self.postgres_proxy = postgres_proxy
        self.redis_proxies = redis_proxies
        self.postgres = "postgres-0"
        self.valkey = "valkey-0"
        self.nodes: list[Node] = []
        self.channels: list[Channel] = []
        self._warden = warden
        self._asking = trio.Lock()

    # Parts

    async def ask(self, do: str, name: str, **options: Any) -> dict[str, Any]:
        """Have the warden do something.

        Raises:
            RuntimeError: it could not.
        """
        assert self._warden.stdin is not None and self._warden.stdout is not None
        async with self._asking:
            request = json.dumps({"do": do, "name": name, **options})
            await self._warden.stdin.send_all(request.encode() + b"\n")
            answer = b""
            with trio.fail_after(60):
                while not answer.endswith(b"\n"):
                    if not (more := await self._warden.stdout.receive_some(65536)):
                        raise RuntimeError("the warden has ended")
                    answer += more
        told: dict[str, Any] = json.loads(answer)
        if "error" in told:
            raise RuntimeError(told["error"])
        return told

    async def start(self, name: str, *, empty: bool = True) -> Part:
        part = Part(name, **await self.ask("start", name, empty=empty))
        self.parts[name] = part
        return part

    async def start_standby(self) -> str:
        """The other PostgreSQL, as a standby that has all that is acknowledged from now on.

        Raises:
            trio.TooSlowError
        """
        name = "postgres-1" if self.postgres == "postgres-0" else "postgres-0"
        self.parts[name] = Part(name, **await self.ask("stand_by", name, of=self.postgres))
        await self.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await self.sql("SELECT pg_reload_conf()")
        with trio.fail_after(STANDBY_SECONDS):
            while not await self.sql(
                "SELECT pid FROM pg_stat_replication WHERE sync_state = 'sync'"
            ):
                await trio.sleep(0.05)
            # Waits for the standby like every commit now, and all before it are there with it.
            await self.sql("SELECT pg_logical_emit_message(true, '', '')")
        return name

    async def hold_back(self, standby: str) -> None:
        """Leave a standby as it is now, a backup of this moment: nothing more reaches it, and
        nobody waits for it."""
        await self.sql("ALTER SYSTEM RESET synchronous_standby_names")
        await self.sql("SELECT pg_reload_conf()")
        await self.sql("ALTER SYSTEM SET primary_conninfo = ''", name=standby)
        await self.sql("SELECT pg_reload_conf()", name=standby)
        with trio.fail_after(STANDBY_SECONDS):
            while await self.sql("SELECT pid FROM pg_stat_wal_receiver", name=standby):
                await trio.sleep(0.02)

    async def say_restored(self) -> int:
        """The command, and the epoch that it began."""
        await trio.run_process([*SOTTOVOCE, "restored"], env=self.nodes[0].env, cwd=ROOT)
        ((epoch,),) = await self.sql("SELECT epoch FROM chat_epoch")
        return int(epoch)

    def turn_to(self, name: str) -> None:
        """Have the servers talk to the other PostgreSQL. Plain."""
        self.postgres = name
        self.postgres_proxy.target = ("127.0.0.1", self.parts[name].port)
        self.postgres_proxy.cut()
        self.postgres_proxy.resume()

    async def stop(self, name: str) -> None:
        await self.ask("stop", name)

    def signal(self, name: str, sign: int) -> None:
        """To every process of a part. Plain."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.parts[name].pid)
            for each in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(sign)

    async def valkey_say(self, *command: str, name: str | None = None) -> Any:
        """One command, to the primary unless told. None if it could not be said."""
        part = self.parts[name or self.valkey]

        def say() -> Any:
            with (
                suppress(redis.RedisError),
                redis.Redis.from_url(part.url, socket_timeout=3.0) as client,
            ):
                return client.execute_command(*command)
            return None

        return await trio.to_thread.run_sync(say)

    async def sql(
        self, query: str, params: Any = None, *, name: str | None = None
    ) -> list[tuple[Any, ...]]:
        """One statement, past the proxies; to the primary unless told."""

        def run() -> list[tuple[Any, ...]]:
            conninfo = self.parts[name or self.postgres].conninfo
            with psycopg.connect(**conninfo, connect_timeout=5, autocommit=True) as connection:
                cursor = connection.execute(query, params)
                return cursor.fetchall() if cursor.description else []

        return await trio.to_thread.run_sync(run)

    async def while_connected(
        self, do: Callable[[psycopg.Connection[Any]], None], seconds: float
    ) -> None:
        """Hold a connection of our own to PostgreSQL for so long, after `do`."""

        def connect() -> psycopg.Connection[Any]:
            connection: psycopg.Connection[Any] = psycopg.connect(
                **self.parts[self.postgres].conninfo, connect_timeout=5
            )
            do(connection)
            return connection

        connection = await trio.to_thread.run_sync(connect)
        try:
            await trio.sleep(seconds)
        finally:
            connection.close()

    async def stored(self) -> dict[int, list[Stored]]:
        """What the ledger is compared with."""
        rows = await self.sql(
            "SELECT channel_id, seq, message_id::text, coalesce(client_message_id::text, '')"
            " FROM chat_messages ORDER BY channel_id, seq"
        )
        stored: dict[int, list[Stored]] = {channel.id: [] for channel in self.channels}
        for channel_id, *row in rows:
            stored.setdefault(channel_id, []).append(Stored(*row))
        return stored

    async def seed(self, count: int) -> None:
        rows = await self.sql(_SEED, {"count": count})
        await self.sql("ANALYZE users, therapists, chat_channels")
        self.channels = [
            Channel(channel_id, f"user_fault_t{number}", f"user_fault_p{number}")
            for number, channel_id in sorted(rows)
        ]


@asynccontextmanager
async def open_deployment(folder: Path, *, channels: int) -> AsyncIterator[Deployment]:
    """All of it, running, with people in it; stopped at the end, however it comes."""
    async with AsyncExitStack() as stack:
        issuer = stack.enter_context(Issuer())
        warden = await trio.lowlevel.open_process(
            [sys.executable, "-m", "bench.faults.warden", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        stack.push_async_callback(_end, warden)
        deployment = Deployment(warden, issuer, {}, None, [])  # type: ignore[arg-type]
        postgres = await deployment.start(deployment.postgres)
        valkey = await deployment.start(deployment.valkey)
        proxy = await stack.enter_async_context(open_proxy_process("127.0.0.1", postgres.port))
        deployment.postgres_proxy = proxy
        for _ in range(NODES):
            proxy = await stack.enter_async_context(open_proxy_process("127.0.0.1", valkey.port))
            deployment.redis_proxies.append(proxy)
        for number in range(NODES):
            env = _environment(deployment, number)
            if number == 0:
                await trio.run_process([*SOTTOVOCE, "migrate"], env=env, cwd=ROOT)
                await deployment.seed(channels)
            node = Node(number, _free_port(), env, folder / f"node-{number}.log")
            deployment.nodes.append(node)
            stack.push_async_callback(_stop, node)
            await node.start()
        yield deployment


async def _stop(node: Node) -> None:
    with trio.CancelScope(shield=True):
        await node.stop()


async def _end(warden: trio.Process) -> None:
    assert warden.stdin is not None
    with trio.CancelScope(shield=True):
        await warden.stdin.aclose()
        with trio.move_on_after(STOP_SECONDS) as scope:
            await warden.wait()
        if scope.cancelled_caught:
            warden.kill()


def _environment(deployment: Deployment, node: int) -> dict[str, str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SOTTOVOCE_", "DB_", "CLERK_", "NEXT_PUBLIC_", "UPSTASH_"))
    }
    conninfo = deployment.parts[deployment.postgres].conninfo
    valkey = deployment.parts["valkey-0"]
    url = valkey.url.replace(f":{valkey.port}/", f":{deployment.redis_proxies[node].port}/")
    return {
        **clean,
        # Workers look where Python is told to, not in the folder that they are started in: without
        # this they would be those of the sources that are installed, whatever lies here.
        "PYTHONPATH": str(ROOT),
        "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": "true",
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": deployment.issuer.publishable_key,
        "UPSTASH_REDIS_URL": url,
        "DB_HOST": "127.0.0.1",
        "DB_PORT": str(deployment.postgres_proxy.port),
        "DB_USER": conninfo["user"],
        "DB_PASSWORD": conninfo["password"],
        "DB_DATABASE": conninfo["dbname"],
        "SOTTOVOCE_DB_SSLMODE": "disable",
        "SOTTOVOCE_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
        "SOTTOVOCE_DRAIN_SECONDS": "2",
        "SOTTOVOCE_MAX_STREAMS_PER_USER": "50",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
