"""`sottovoce serve` as a service manager uses it: settings from a file, SIGHUP, SIGTERM."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from server.cli.people import Seeded, seed_people
from tests.support.disks import on_disk_of, on_read_only_disk
from tests.support.running import (
    COMMAND,
    START_SECONDS,
    clean_environment,
    run_command,
    wait_until,
)
from tests.support.services import Database
from tests.support.tokens import Signer
from tests.support.wire import WIRE

FLAG = "NEXT_PUBLIC_ENABLE_CHAT_FEATURE"


class Deployment:
    """What `serve` needs, in an env file."""

    def __init__(self, folder: Path, database: Database, redis_url: str) -> None:
        self.folder = folder
        self.env_file = folder / "env"
        self.signer = Signer()
        self.people: dict[str, Seeded] = seed_people(database.conninfo)
        conninfo = database.conninfo
        self.values = {
            FLAG: "true",
            "UPSTASH_REDIS_URL": redis_url,
            "DB_HOST": conninfo["host"],
            "DB_PORT": conninfo["port"],
            "DB_USER": conninfo["user"],
            "DB_PASSWORD": conninfo["password"],
            "DB_DATABASE": conninfo["dbname"],
            "SOTTOVOCE_DB_SSLMODE": "disable",
            # clerk.example.com$
            "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_live_Y2xlcmsuZXhhbXBsZS5jb20k",
            "CLERK_JWT_KEY": self.signer.pem.replace("\n", "\\n"),
            "SOTTOVOCE_DRAIN_SECONDS": "0.2",
        }
        self.write()

    def write(self, **changes: str) -> None:
        self.values |= changes
        lines = [f"{name}='{value}'\n" for name, value in self.values.items()]
        self.env_file.write_text("".join(lines))

    @contextmanager
    def serving(
        self, *arguments: str, prefix: Callable[[list[str]], list[str]] = list, **environ: str
    ) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
        """`serve` with this file; `prefix` makes of its command another one that runs it."""
        log_file = self.folder / "log"
        command = [
            *COMMAND,
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            *WIRE.options.arguments(),
        ]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                prefix([*command, *arguments, "--env-file", str(self.env_file)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(environ),
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while "worker_ready" not in self.log:
                assert process.poll() is None and time.monotonic() < deadline, self.log
                time.sleep(0.05)
            (url,) = [line.split()[-1] for line in self.log.splitlines() if "serving on" in line]
            token = self.signer.mint(sub="user_dev_prospect", exp=int(time.time()) + 600)
            headers = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=url, headers=headers, timeout=20, **WIRE.client) as client:
                yield process, client
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def deployment(folder: Path, database: Database, redis_url: str) -> Deployment:
    return Deployment(folder, database, redis_url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:canary#word@cache", "percent-encode"),
        ("redis://:canary/word@cache", "percent-encode"),
        ("redis://:canary[word@cache", "percent-encode"),
        ("redis://canary:port", "host:port"),
        ("redis://canary/first", "number of a database"),
        ("redis://canary?word=1", "nothing after a ?"),
        ("https://canary.upstash.io", "UPSTASH_REDIS_REST_URL"),
    ],
)
@pytest.mark.once
def test_a_url_of_redis_that_is_wrong_ends_it_with_one_line_before_any_worker(
    deployment: Deployment, url: str, said: str
):
    deployment.write(UPSTASH_REDIS_URL=url)
    ended = run_command("serve", "--port", "0", "--env-file", str(deployment.env_file))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("sottovoce: UPSTASH_REDIS_URL is wrong: ")
    assert said in line and "canary" not in line


def test_a_reload_turns_the_chat_off_for_open_streams_too_and_on_again(deployment: Deployment):
    channel = f"/api/chat/{deployment.people['prospect'].channel_id}"

    def status() -> int:
        return client.get("/api/chat/availability").status_code

    with deployment.serving("--workers", "2") as (process, client):
        with client.stream("GET", channel) as response:
            lines = response.iter_lines()
            assert any('"connected"' in line for line in lines)
            deployment.write(**{FLAG: "false"})
            process.send_signal(signal.SIGHUP)
            assert any('"chat_disabled"' in line for line in lines)
        wait_until(lambda: all(status() == 404 for _ in range(8)), what="turning off")
        deployment.write(**{FLAG: "true"})
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: all(status() == 200 for _ in range(8)), what="turning on")


def test_sigterm_drains_and_leaves_no_process(deployment: Deployment):
    channel = f"/api/chat/{deployment.people['prospect'].channel_id}"
    with deployment.serving("--workers", "2") as (process, client):
        family = [process_of(process), *process_of(process).children(recursive=True)]
        with client.stream("GET", channel) as response:
            lines = response.iter_lines()
            assert any('"connected"' in line for line in lines)
            process.terminate()
            assert any('"drain"' in line for line in lines)
        assert process.wait(20) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    for secret in (deployment.values["DB_PASSWORD"], deployment.values["UPSTASH_REDIS_URL"]):
        assert secret not in deployment.log


def test_all_workers_count_into_one_set_of_metrics(deployment: Deployment):
    def requests() -> float:
        prefix = 'sottovoce_request_seconds_count{route="availability"'
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(prefix))

    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        workers = process_of(process).children()
        for _ in range(20):  # on connections of their own, so that both workers get some
            with httpx.Client(**WIRE.client) as another:
                another.get(f"{client.base_url}/api/chat/availability")
        wait_until(lambda: requests() == 20, what="counting")
        folders = {worker.environ()["PROMETHEUS_MULTIPROC_DIR"] for worker in workers}
        assert len(folders) == 1
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.once
@pytest.mark.parametrize("kilobytes", [None, 64, 700])
def test_a_full_or_read_only_disk_under_the_metrics_ends_no_worker(
    deployment: Deployment, folder: Path, kilobytes: int | None
):
    small = folder / "small"
    small.mkdir()
    mounted = on_read_only_disk if kilobytes is None else partial(on_disk_of, kilobytes)
    with deployment.serving(
        "--workers", "2", prefix=partial(mounted, small), TMPDIR=str(small)
    ) as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        workers = {worker.pid for worker in process_of(process).children()}
        for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT"):  # a series for each answer
            for path in ("/healthz", "/nowhere", "/openapi.json", "/api/chat/99999", "/readyz"):
                assert client.request(method, path, headers={"connection": "close"}).status_code
        assert "sottovoce_build_info" in client.get("/metrics").text
        assert {worker.pid for worker in process_of(process).children()} == workers
    said = deployment.log.count("metrics_not_shared")
    assert said == {None: 0, 64: 2, 700: 0}[kilobytes], "read-only: another folder is found"


def test_a_rolling_restart_takes_no_more_room_for_metrics(deployment: Deployment):
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        (worker, _) = process_of(process).children()
        metrics = Path(worker.environ()["PROMETHEUS_MULTIPROC_DIR"])
        for rolls in (1, 2, 3):
            process.send_signal(signal.SIGUSR1)
            wait_until(lambda: deployment.log.count('"rolled"') == rolls, seconds=60)  # noqa: B023
        assert len(list(metrics.glob("counter_*.db"))) <= 3, "of both workers and a successor"
        assert 'version="' in client.get("/metrics").text


def test_a_database_that_is_not_migrated_is_warned_of_and_served(
    folder: Path, empty_database: Database, database: Database, redis_url: str
):
    deployment = Deployment(folder, database, redis_url)
    deployment.write(DB_DATABASE=empty_database.conninfo["dbname"])
    with deployment.serving() as (_, client):
        assert client.get("/healthz").status_code == 200
    assert "warning: not migrated (0001_main_application" in deployment.log


def process_of(process: "subprocess.Popen[bytes]") -> Any:
    return psutil.Process(process.pid)


def test_a_full_disk_under_the_log_keeps_no_server_from_starting(deployment: Deployment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--host", "127.0.0.1", "--port", str(port), *WIRE.options.arguments()]
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            [*COMMAND, "serve", *arguments, "--env-file", str(deployment.env_file)],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
            env=clean_environment({}),
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, "it has ended"
            with suppress(httpx.TransportError), httpx.Client(**WIRE.client) as client:
                url = f"{WIRE.scheme}://127.0.0.1:{port}/healthz"
                return client.get(url).status_code == 200
            return False

        wait_until(answers, what="an answer")
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
