"""A rolling restart replaces nobody by a worker in which no request could succeed."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage.embedded import EmbeddedPostgres
from storage.postgres.migrate import migrate
from tests.support.running import read_lines, wait_until
from tests.support.services import Database, fresh_database
from tests.system.test_serve import Deployment, process_of

pytestmark = pytest.mark.once

ROLL_SECONDS = 60.0
"""A successor that is not ready gives up after ten; the machine may be slow."""


@pytest.fixture
def own_postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    """One that a test may stop."""
    with EmbeddedPostgres(folder / "own", durable=False) as server:
        yield server


@pytest.fixture
def deployment(folder: Path, database: Database, redis_url: str) -> Deployment:
    return Deployment(folder, database, redis_url)


def events(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    lines = deployment.log.splitlines()
    whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
    copy = deployment.folder / "events"
    copy.write_text("\n".join(whole))
    return [line for line in read_lines(copy) if line["event"] == name]


def roll(deployment: Deployment, process: Any) -> str | None:
    """Have the workers replaced; None if they were, or the reason why not."""
    before = len(events(deployment, "rolled")), len(events(deployment, "roll_stopped"))
    process.send_signal(signal.SIGUSR1)

    def ended() -> bool:
        now = len(events(deployment, "rolled")), len(events(deployment, "roll_stopped"))
        return now != before

    wait_until(ended, seconds=ROLL_SECONDS, what="the roll's end")
    stopped = events(deployment, "roll_stopped")
    return stopped[-1]["reason"] if len(stopped) > before[1] else None


def workers(process: Any) -> set[int]:
    return {worker.pid for worker in process_of(process).children()}


def serves(client: httpx.Client) -> bool:
    return client.get("/api/chat/availability").status_code == 200


NOT_READY: dict[str, tuple[dict[str, str], str]] = {
    "password": ({"DB_PASSWORD": "canary"}, "the user or the password is refused"),
    "database": ({"DB_DATABASE": "nowhere"}, "there is no such database"),
    "keys": ({"CLERK_JWT_KEY": ""}, "the issuer's keys are not known"),
    "redis": ({"UPSTASH_REDIS_URL": "redis//canary"}, "refuses its settings"),
}


@pytest.mark.parametrize("mistake", NOT_READY)
def test_a_mistake_in_the_env_file_replaces_nobody_and_once_mended_the_roll_succeeds(
    deployment: Deployment, mistake: str
):
    changes, reason = NOT_READY[mistake]
    good = {name: str(deployment.values[name]) for name in changes}
    with deployment.serving("--workers", "2") as (process, client):
        wait_until(lambda: deployment.log.count("worker_ready") == 2)
        before = workers(process)
        deployment.write(**changes)
        said = roll(deployment, process)
        assert said is not None and reason in said
        assert workers(process) == before and serves(client)
        assert client.get("/readyz").status_code == 200
        deployment.write(**good)
        assert roll(deployment, process) is None
        assert not workers(process) & before and serves(client)
    assert "canary" not in deployment.log


def test_a_database_that_is_not_migrated_stops_the_roll(
    deployment: Deployment, empty_database: Database
):
    with deployment.serving() as (process, client):
        before = workers(process)
        good = deployment.values["DB_DATABASE"]
        deployment.write(DB_DATABASE=empty_database.conninfo["dbname"])
        said = roll(deployment, process)
        assert said is not None and "sottovoce migrate" in said
        assert workers(process) == before and serves(client)
        deployment.write(DB_DATABASE=good)
        assert roll(deployment, process) is None


def test_a_redis_that_is_gone_stops_no_roll(deployment: Deployment):
    with deployment.serving() as (process, client):
        before = workers(process)
        deployment.write(UPSTASH_REDIS_URL="redis://127.0.0.1:1")
        assert roll(deployment, process) is None
        assert not workers(process) & before and serves(client)


def test_a_postgres_that_is_down_for_everybody_stops_the_roll(
    folder: Path, own_postgres: EmbeddedPostgres, redis_url: str
):
    migrate(own_postgres.conninfo)
    own = Database(own_postgres.conninfo, own_postgres.url)
    deployment = Deployment(folder, own, redis_url)
    with deployment.serving() as (process, client):
        before = workers(process)
        channel = f"/api/chat/{deployment.people['prospect'].channel_id}"
        with client.stream("GET", channel) as stream:
            lines = stream.iter_lines()
            assert any('"connected"' in line for line in lines)
            own_postgres.stop()
            said = roll(deployment, process)
            assert said is not None and "nothing listens on that port" in said
            assert workers(process) == before
            own_postgres.start()
            wait_until(lambda: client.get("/readyz").status_code == 200, seconds=30)
            assert roll(deployment, process) is None
            assert any('"drain"' in line for line in lines), "it was open all the time"


def test_a_server_that_starts_without_its_database_says_why_and_is_ready_once_it_is_there(
    deployment: Deployment, postgres: EmbeddedPostgres
):
    with fresh_database(postgres) as empty:
        deployment.write(DB_DATABASE=empty.conninfo["dbname"])
        with deployment.serving() as (_, client):
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (503, "unready")
            assert answer.json()["postgres"] == "up"
            assert "sottovoce migrate" in answer.json()["database"][0]
            (line,) = events(deployment, "worker_not_ready")
            assert "sottovoce migrate" in line["reasons"][0]
            assert "sottovoce_ready 0" in client.get("/metrics").text
            migrate(empty.conninfo)
            wait_until(lambda: client.get("/readyz").status_code == 200, seconds=30)
            wait_until(lambda: "sottovoce_ready 1" in client.get("/metrics").text, seconds=30)
