"""A server of our own on this machine, for runs that are not told of another one."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]

from bench.machine import end_process

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0
STOP_SECONDS = 20.0
SEED_SECONDS = 300.0
SOTTOVOCE = [sys.executable, "-c", "from server.cli import main; main()"]
OURS = ("SOTTOVOCE_", "NEXT_PUBLIC_", "DB_", "CLERK_", "UPSTASH_", "PROMETHEUS_")


class ServerFailed(Exception):
    """It did not start, or did not take the people."""


class Pids(msgspec.Struct):
    workers: list[int]
    redis: int


class Ready(msgspec.Struct):
    """What we need of `sottovoce dev`'s ready file."""

    base_url: str
    pids: Pids

    @classmethod
    def read(cls, file: str | Path) -> "Ready":
        """
        Raises:
            OSError, msgspec.MsgspecError
        """
        return msgspec.json.decode(Path(file).read_bytes(), type=cls)


class LocalServer:
    """Attributes:
    url: of the server.
    ready_file: of `sottovoce dev`.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.ready_file = folder / "ready.json"
        self._data = folder / "data"
        self._env = env

    @property
    def url(self) -> str:
        return Ready.read(self.ready_file).base_url

    def seed(self, channels: int, out: Path) -> None:
        """Make people, and write their tokens.

        Raises:
            ServerFailed
        """
        command = [*SOTTOVOCE, "seed", "--channels", str(channels), "--out", str(out)]
        command += ["--data-dir", str(self._data)]
        try:
            subprocess.run(
                command,
                check=True,
                timeout=SEED_SECONDS,
                env=self._env,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.SubprocessError:
            raise ServerFailed("the people could not be seeded") from None

    def command(self, workers: int) -> list[str]:
        return [
            *SOTTOVOCE, "dev", "--port", "0", "--workers", str(workers),
            "--data-dir", str(self._data), "--ready-file", str(self.ready_file),
        ]  # fmt: skip


@contextmanager
def local_server(
    folder: Path, *, workers: int, settings: Mapping[str, str] | None = None
) -> Iterator[LocalServer]:
    """`sottovoce dev` with all that belongs to it, ended with the block.

    Args:
        folder: empty; its data and its log.
        workers: processes.
        settings: by their environment names.

    Raises:
        ServerFailed
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    env = kept | {"PYTHONPATH": str(ROOT), "SOTTOVOCE_LOG_FORMAT": "json"} | dict(settings or {})
    server = LocalServer(folder, env)
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            server.command(workers),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.ready_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"the server did not start: see {log_file}")
            time.sleep(0.05)
        yield server
    finally:
        end_process(process, seconds=STOP_SECONDS)


class ServerWatch:
    """What a local server's workers take.

    Args:
        ready_file: of `sottovoce dev`.

    Raises:
        OSError, msgspec.MsgspecError
    """

    def __init__(self, ready_file: Path) -> None:
        pids = Ready.read(ready_file).pids.workers
        self._processes = [psutil.Process(pid) for pid in pids]
        self._began = time.monotonic()
        self._spent = self._cpu_seconds()
        self._spent_now = self._spent
        self._looked_at = self._began
        self._most_memory = 0

    def look(self) -> None:
        """From time to time; a worker that has ended meanwhile is not looked at any more."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._spent_now = self._cpu_seconds()
            self._looked_at = time.monotonic()
            memory = sum(process.memory_info().rss for process in self._processes)
            self._most_memory = max(self._most_memory, memory)

    def figures(self) -> dict[str, float]:
        seconds = max(1e-3, self._looked_at - self._began)
        return {
            "server_cpu_percent": 100 * (self._spent_now - self._spent) / seconds,
            "server_memory_mb": self._most_memory / 1e6,
        }

    def _cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return float(sum(spent.user + spent.system for spent in times))
