"""A server as people start it: `sottovoce dev`, a process of its own, found by its ready file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil  # type: ignore[import-untyped,unused-ignore]

from server.cli.ready import Ready
from tests.support.services import temporary_folder
from tests.support.wire import WIRE

START_SECONDS = 60.0
STOP_SECONDS = 30.0

COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]
"""`sottovoce`, whatever PATH says."""


class RunningServer:
    """A `sottovoce dev` that answers.

    Attributes:
        ready: its ready file, as it was at the start; `reload_ready` reads it again.
        log_file: what it and its workers print.
    """

    def __init__(self, process: subprocess.Popen[bytes], data_dir: Path, log_file: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self.log_file = log_file
        self.ready = self.reload_ready()

    def reload_ready(self) -> Ready:
        self.ready = msgspec.json.decode((self.data_dir / "ready.json").read_bytes(), type=Ready)
        return self.ready

    @property
    def base_url(self) -> str:
        return self.ready.base_url

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self.log_file.read_text("utf-8", "replace")

    def headers(self, person: str = "therapist") -> dict[str, str]:
        """What lets `person` (therapist, prospect, outsider, lapsed) in."""
        return {"Authorization": f"Bearer {getattr(self.ready, person).token}"}

    def client(self, person: str | None = "therapist", **options: Any) -> httpx.Client:
        """A client as that person; None: as nobody."""
        return httpx.Client(**self._client_options(person, options))

    def async_client(self, person: str | None = "therapist", **options: Any) -> httpx.AsyncClient:
        """The same for Trio."""
        return httpx.AsyncClient(**self._client_options(person, options))

    def _client_options(self, person: str | None, options: dict[str, Any]) -> dict[str, Any]:
        headers = (self.headers(person) if person else {}) | options.pop("headers", {})
        return {"base_url": self.base_url, "headers": headers, **WIRE.client, **options}

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `sottovoce` with this server's data folder."""
        return run_command(*arguments, "--data-dir", str(self.data_dir), **environ)

    def processes(self) -> list[psutil.Process]:
        """Itself and all below it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self, sign: int = signal.SIGTERM) -> int:
        """End it as Ctrl-C or a service manager would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)  # where a test has stopped it
            self.process.send_signal(sign)
            try:
                return self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()  # its children end with it
                raise
        return self.process.wait()


@contextmanager
def running_server(
    *, workers: int = 1, port: int = 0, data_dir: Path | None = None, **environ: str
) -> Iterator[RunningServer]:
    """A `sottovoce dev` on a free port, while the block lasts.

    Args:
        workers: how many processes.
        port: 0 chooses a free one.
        data_dir: kept; None: a temporary one.
        environ: settings, such as SOTTOVOCE_HEARTBEAT_SECONDS="0.2".
    """
    with temporary_folder() as folder:
        data_dir = data_dir or folder / "data"
        ready_file = folder / "ready.json"
        log_file = folder / "log"
        arguments = ["--port", str(port), "--workers", str(workers)]
        arguments += ["--data-dir", str(data_dir), "--ready-file", str(ready_file)]
        arguments += WIRE.options.arguments()
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*COMMAND, "dev", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(environ),
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready_file.exists():
                assert process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline, log_file.read_text()
                time.sleep(0.05)
            server = RunningServer(process, data_dir, log_file)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                finally:
                    process.kill()
                    process.wait()


@contextmanager
def running_serve(
    environ: dict[str, str], log_file: Path, *options: str, port: int = 0
) -> Iterator[str]:
    """`sottovoce serve` while the block lasts: its URL, once it is ready.

    Args:
        environ: all of it; see `clean_environment`.
        log_file: what it and its workers print.
        options: more of the command's.
        port: 0 chooses a free one.
    """
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), *options]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, *arguments, *WIRE.options.arguments()],
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _wait_for_url(process, log_file)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log_file: Path) -> str:
    """The URL that it prints, once it answers there that it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log_file.read_text()
        if match := re.search(r"serving on (https?://\S+)", log_file.read_text()):
            with suppress(httpx.HTTPError), httpx.Client(**WIRE.client) as client:
                if client.get(f"{match[1]}/readyz").status_code == 200:
                    return match[1]
        time.sleep(0.05)
    raise AssertionError(log_file.read_text())


def run_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`sottovoce` as a process of its own, to its end.

    Args:
        arguments: of the command.
        environ: over an environment without settings.
    """
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
        env=clean_environment(environ),
    )


def clean_environment(environ: dict[str, str]) -> dict[str, str]:
    """Ours without any setting of the machine that the tests run on, and `environ` over it.
    Who runs in it trusts this run's certificate."""
    ours = ("SOTTOVOCE_", "NEXT_PUBLIC_", "DB_", "CLERK_", "UPSTASH_", "PROMETHEUS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | WIRE.environ | environ


def wait_until(condition: Callable[[], object], *, seconds: float = 10.0, what: str = "it") -> None:
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.05)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """An NDJSON file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
