"""PgBouncer and PostgreSQL 15 from Debian, as children of the test."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.deployment.parts import ROOT, program
from tests.support.services import Database

ACCOUNT = "postgres"
"""Neither of them runs as root; Debian's packages make this account."""
START_SECONDS = 60.0
STOP_SECONDS = 20.0
PASSWORD = "a-password-of-the-tests"
PAGE = ROOT / "docs" / "how-to" / "roles-and-poolers.md"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def pgbouncer_file() -> str:
    """The file of docs/how-to/roles-and-poolers.md, as it stands there."""
    found = re.search(r"^```ini\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@contextmanager
def run_pgbouncer(database: Database, folder: Path, **settings: str | int) -> Iterator[Database]:
    """The documented PgBouncer before a database, which is reached through it.

    Args:
        folder: its files go there.
        settings: in place of those in the file.
    """
    theirs = database.conninfo
    port = free_port()
    text = pgbouncer_file()
    for ours, other in (
        ("app = host=127.0.0.1 port=5432 dbname=app", _entry(theirs)),
        ("listen_port = 6432", f"listen_port = {port}"),
        ("auth_file = userlist.txt", f"auth_file = {folder}/userlist.txt"),
    ):
        assert ours in text, ours
        text = text.replace(ours, other)
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        text += "" if count else f"{name} = {value}\n"
    (folder / "pgbouncer.ini").write_text(text)
    (folder / "userlist.txt").write_text(f'"{theirs["user"]}" "{theirs["password"]}"\n')
    command = [program("pgbouncer"), str(folder / "pgbouncer.ini")]
    conninfo = {**theirs, "port": port}
    with _running(command, folder, conninfo):
        yield Database(conninfo, database.url.replace(f":{theirs['port']}/", f":{port}/"))


def _entry(conninfo: dict[str, Any]) -> str:
    name = conninfo["dbname"]
    return f"{name} = host={conninfo['host']} port={conninfo['port']} dbname={name}"


@contextmanager
def run_postgres_15(folder: Path) -> Iterator[Database]:
    """Debian's PostgreSQL 15 with one database; it is not durable."""
    data = folder / "data"
    password_file = folder / "password"
    password_file.write_text(PASSWORD)
    _give_away(folder)
    subprocess.run(
        [
            program("initdb"),
            *("-D", str(data), "-U", "chat", "--pwfile", str(password_file), "--no-sync"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"),
        ],
        check=True,
        capture_output=True,
        timeout=START_SECONDS,
        **_identity(),
    )
    port = free_port()
    settings = {
        "port": port,
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "fsync": "off",
        "synchronous_commit": "off",
    }
    command = [program("postgres"), "-D", str(data)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    conninfo: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "user": "chat",
        "password": PASSWORD,
        "dbname": "postgres",
        "sslmode": "disable",
    }
    with _running(command, folder, conninfo):
        with psycopg.connect(**conninfo, autocommit=True) as admin:
            admin.execute("CREATE DATABASE app")
        url = f"postgresql://chat:{PASSWORD}@127.0.0.1:{port}/app?sslmode=disable"
        yield Database({**conninfo, "dbname": "app"}, url)


@contextmanager
def _running(command: list[str], folder: Path, conninfo: dict[str, Any]) -> Iterator[None]:
    """The program, from when one can log in to it until the block ends."""
    _give_away(folder)
    log_file = folder / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
            **_identity(),
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log_file.read_text()
            try:
                psycopg.connect(**conninfo, connect_timeout=2).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, log_file.read_text()
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.send_signal(signal.SIGINT)  # PostgreSQL ends its clients' sessions, too
        try:
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()


def _identity() -> dict[str, Any]:
    """Popen's arguments that choose the account, where we are root."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(ACCOUNT)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _give_away(folder: Path) -> None:
    """Give the folder and what is in it to the account, and let it pass through its parents."""
    if os.geteuid() != 0:
        return
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, ACCOUNT, ACCOUNT)
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
