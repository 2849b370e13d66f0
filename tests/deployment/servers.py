"""Two `sottovoce serve` on one PostgreSQL and one Valkey, as a deployment has them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]

from tests.support.chat import Chat, environment
from tests.support.running import COMMAND, START_SECONDS, STOP_SECONDS, wait_until
from tests.support.services import Database
from tests.support.tokens import Signer

SETTINGS = {
    "SOTTOVOCE_ALLOWED_ORIGINS": "",  # whatever the page is shown by must do without
    "SOTTOVOCE_FORWARDED_HOPS": "1",
    "SOTTOVOCE_DRAIN_SECONDS": "1",
    "SOTTOVOCE_RETRY_MILLISECONDS": "300",
}
"""Over those of `environment`. Heartbeats come after half a second."""


class Server:
    """One `sottovoce serve` with one worker, on a port that it keeps while it is restarted."""

    def __init__(self, port: int, environ: dict[str, str], log: Path) -> None:
        self.port = port
        self._environ = environ
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def started(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it, and return when it is ready."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        assert self._process is None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "serve", "--host", "127.0.0.1", "--port", str(self.port)],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self) -> None:
        wait_until(self._ready, seconds=START_SECONDS, what="readiness")

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with suppress(httpx.HTTPError):
            url = f"http://127.0.0.1:{self.port}/readyz"
            return httpx.get(url, timeout=5).status_code == 200
        return False

    def stop(self) -> None:
        """SIGTERM: streams are drained. Returns when it has ended."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def kill(self) -> None:
        """SIGKILL to the supervisor and its workers."""
        if self._process is not None:
            processes = [*self.workers(), psutil.Process(self._process.pid)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(STOP_SECONDS)
            psutil.wait_procs(processes, STOP_SECONDS)
            self._process = None

    def roll(self) -> None:
        """SIGUSR1: a rolling restart of its workers, which it only begins."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def workers(self) -> list[psutil.Process]:
        assert self._process is not None
        return [
            child
            for child in psutil.Process(self._process.pid).children()
            if "server.engine.worker" in child.cmdline()
        ]

    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")


class Servers:
    """Two servers with one database, whose people and tokens `chat` makes."""

    def __init__(self, chat: Chat, one: Server, two: Server) -> None:
        self.chat = chat
        self.one = one
        self.two = two

    def __iter__(self) -> Iterator[Server]:
        return iter((self.one, self.two))

    @property
    def ports(self) -> tuple[int, int]:
        return self.one.port, self.two.port

    def workers(self) -> list[psutil.Process]:
        return [*self.one.workers(), *self.two.workers()]

    def start(self) -> Self:
        """Start those of the two that do not run; both are ready when it returns."""
        for server in self:
            if not server.started:
                server.launch()
        for server in self:
            server.wait_until_ready()
        return self

    def stored(self, channel_id: int) -> list[tuple[str, int]]:
        """A channel's messages as PostgreSQL has them: their ids and numbers, in order."""
        rows = self.chat.database.execute(
            "SELECT message_id::text, seq FROM chat_messages WHERE channel_id = %s ORDER BY seq",
            (channel_id,),
        )
        return [(message, seq) for message, seq in rows]


@contextmanager
def two_servers(
    database: Database, redis_url: str, folder: Path, ports: tuple[int, int], **settings: str
) -> Iterator[Servers]:
    """Two servers, ready, while the block lasts."""
    signer = Signer()
    environ = {**environment(database, redis_url, signer), **SETTINGS, **settings}
    made = [
        Server(port, environ, folder / f"server-{number}.log") for number, port in enumerate(ports)
    ]
    chat = Chat(database, signer, ports[0], folder / "server-0.log")
    servers = Servers(chat, *made)
    with ExitStack() as cleanup:
        cleanup.callback(chat.client.close)
        for server in servers:
            cleanup.callback(server.kill)
        yield servers.start()


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it, such as PostgreSQL's."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


@contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    """SIGSTOP while the block lasts: connections stay open, and nothing answers."""
    stopped = []
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                stopped.append(process)
        yield
    finally:
        for process in stopped:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
