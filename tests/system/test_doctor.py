"""The doctor names what is wrong, and only that."""

import base64
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from storage.store import REDIS_SECONDS, WATCH_SECONDS
from tests.support.running import RunningServer, run_command, running_server, wait_until

CHECKS = ["settings", "server", "ready", "flag", "redis", "postgres", "tables", "audit", "keys"]
CHECKS += ["token", "stream", "message", "export"]

OTHER_WORKER_SECONDS = WATCH_SECONDS + REDIS_SECONDS + 0.5
"""In which the one that was not asked has noticed too."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(workers=2) as running:
        yield running


def examine(server: RunningServer) -> dict[str, str]:
    """What it says of each check that failed. Green means green in the exit status as well."""
    done = server.command("doctor")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    verdicts = [line for line in lines if line.startswith(("ok ", "FAIL "))]
    remedies = [line for line in lines if line.startswith("     remedy: ")]
    assert [line.split()[1] for line in verdicts] == CHECKS
    failed = {
        line.split()[1]: line.partition(" — ")[2] for line in verdicts if line.startswith("FAIL")
    }
    assert len(remedies) == len(failed)
    assert (done.returncode == 0) == (not failed)
    for secret in (server.ready.therapist.token, server.ready.redis_url.split("@")[0][9:]):
        assert secret not in done.stdout
    return failed


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that hangs: it neither answers nor ends."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_ready(server: RunningServer) -> bool:
    with server.client() as client:
        return bool(client.get("/readyz").json()["status"] == "ready")


def test_all_is_well(server: RunningServer):
    assert examine(server) == {}


def test_keys_that_cannot_be_had_are_named_and_the_chat_goes_on(server: RunningServer):
    # The issuer is a thread of dev's own process.
    with stopped(server.process.pid):
        failed = examine(server)
    assert set(failed) == {"keys", "token"}
    assert server.ready.issuer.removeprefix("http://") in failed["keys"]


def test_a_redis_that_hangs_is_named_and_the_chat_goes_on(server: RunningServer):
    with stopped(server.ready.pids.redis):
        wait_until(lambda: not is_ready(server), what="noticing")
        time.sleep(OTHER_WORKER_SECONDS)
        failed = examine(server)
    assert set(failed) == {"ready", "redis"}
    assert "redis" in failed["ready"]
    wait_until(lambda: is_ready(server), what="recovery")
    time.sleep(OTHER_WORKER_SECONDS)


def test_an_audit_trail_that_can_be_changed_is_named(server: RunningServer):
    with psycopg.connect(server.ready.database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE chat_audit DISABLE TRIGGER chat_audit_no_change")
        failed = examine(server)
        connection.execute("ALTER TABLE chat_audit ENABLE TRIGGER chat_audit_no_change")
    assert set(failed) == {"audit"}
    assert "chat_audit_no_change" in failed["audit"]


def test_a_migration_that_is_missing_is_named(server: RunningServer):
    with psycopg.connect(server.ready.database_url, autocommit=True) as connection:
        row = connection.execute(
            "DELETE FROM chat_migrations WHERE number = 4 RETURNING name, applied_at"
        ).fetchone()
        assert row is not None
        failed = examine(server)
        connection.execute("INSERT INTO chat_migrations VALUES (4, %s, %s)", row)
    assert set(failed) - {"ready"} == {"tables", "audit"}, "the server looks each 15 s, too"
    assert row[0] in failed["tables"]


def test_postgres_and_redis_that_are_gone_are_named():
    with running_server() as server:
        os.kill(server.ready.pids.redis, signal.SIGKILL)
        wait_until(lambda: not is_ready(server), what="noticing")
        failed = examine(server)
        assert set(failed) == {"ready", "redis"}
        os.kill(server.ready.pids.postgres, signal.SIGKILL)
        failed = examine(server)
        assert {"postgres", "tables", "audit", "message", "export"} <= set(failed)
        assert "nothing listens on that port" in failed["postgres"]
        assert not {"settings", "server", "flag", "keys", "token"} & set(failed)


def test_a_chat_that_is_turned_off_is_named():
    with running_server(NEXT_PUBLIC_ENABLE_CHAT_FEATURE="false") as server:
        failed = examine(server)
    assert set(failed) == {"flag", "stream", "message", "export"}
    assert "turned off" in failed["flag"]


def test_by_the_environments_settings_it_wants_a_token_and_never_prints_a_secret(
    server: RunningServer,
):
    ready = server.ready
    database = psycopg.conninfo.conninfo_to_dict(ready.database_url)
    environ = {
        "NEXT_PUBLIC_ENABLE_CHAT_FEATURE": "true",
        "UPSTASH_REDIS_URL": ready.redis_url,
        "DB_HOST": str(database["host"]),
        "DB_PORT": str(database["port"]),
        "DB_USER": str(database["user"]),
        "DB_PASSWORD": str(database["password"]),
        "DB_DATABASE": str(database["dbname"]),
        "SOTTOVOCE_DB_SSLMODE": "disable",
        "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": publishable_key(ready.issuer),
    }
    arguments = ["doctor", "--base-url", ready.base_url]
    without = run_command(*arguments, **environ)
    assert without.returncode == 1
    assert "FAIL token — SOTTOVOCE_TOKEN is not set" in without.stdout
    assert "ok   postgres" in without.stdout and "ok   redis" in without.stdout
    arguments += ["--channel", str(ready.channel_id)]
    complete = run_command(*arguments, **environ, SOTTOVOCE_TOKEN=ready.therapist.token)
    assert (complete.returncode, complete.stderr) == (0, "")
    client = run_command(*arguments, **environ, SOTTOVOCE_TOKEN=ready.prospect.token)
    assert "FAIL export — it got 403" in client.stdout
    for done in (without, complete, client):
        for secret in (environ["DB_PASSWORD"], ready.redis_url, ready.therapist.token):
            assert secret not in done.stdout + done.stderr


def publishable_key(issuer: str) -> str:
    return "pk_test_" + base64.b64encode(f"{issuer.removeprefix('http://')}$".encode()).decode()
