"""Why PostgreSQL cannot be reached is named: real servers, and poolers' known words."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import structlog.testing
import trio

from storage.embedded import EmbeddedPostgres
from storage.postgres.connection import connect
from storage.postgres.unreachable import why_unreachable
from tests.storage.stores import opened_store
from tests.support.services import Database, database_named, temporary_folder
from tests.support.wire import certificate


def refused(conninfo: dict[str, Any]) -> Exception:
    """psycopg's error, by the connection of the commands."""
    with pytest.raises(psycopg.Error) as caught:
        psycopg.connect(**{"connect_timeout": 2, **conninfo}).close()
    return caught.value


async def refused_on_trio(conninfo: dict[str, Any]) -> Exception:
    """Returns the error with which the pool's own kind of connection is refused."""
    with pytest.raises((psycopg.Error, trio.TooSlowError)) as caught, trio.fail_after(2):
        await connect(conninfo)
    return caught.value


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port at which something else than PostgreSQL answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def speak_http(client: socket.socket) -> None:
    client.recv(1000)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def hang_up(client: socket.socket) -> None:
    client.recv(1000)


SQL = """
CREATE ROLE unlucky LOGIN PASSWORD 'x' CONNECTION LIMIT 0;
CREATE ROLE nobody NOLOGIN PASSWORD 'x';
CREATE ROLE guest LOGIN PASSWORD 'x';
"""


def speak_tls(client: socket.socket) -> None:
    """As a server with TLS, which the embedded one has not, up to the handshake's end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate())
    if client.recv(8)[4:] == b"\x04\xd2\x16\x2f":  # SSLRequest
        client.sendall(b"S")
    with suppress(OSError), context.wrap_socket(client, server_side=True) as secured:
        secured.recv(1000)


@pytest.fixture(scope="module")
def strict() -> Iterator[EmbeddedPostgres]:
    """One of our own, with roles and databases for every kind of refusal."""
    with temporary_folder() as folder, EmbeddedPostgres(folder / "postgres", durable=False) as own:
        with psycopg.connect(**own.conninfo, autocommit=True) as connection:
            connection.execute(SQL)
            connection.execute("CREATE DATABASE shut ALLOW_CONNECTIONS false")
            connection.execute("CREATE DATABASE private")
            connection.execute("REVOKE CONNECT ON DATABASE private FROM public")
        yield own


@pytest.mark.parametrize(
    ("changes", "cause", "finding"),
    [
        ({"password": "wrong"}, "login", "password is refused"),
        ({"user": "someone"}, "login", "password is refused"),
        ({"password": None}, "password", "a password is asked for"),
        ({"user": "nobody", "password": "x"}, "role", "may not log in"),
        ({"user": "unlucky", "password": "x"}, "connections", "no connection is left"),
        ({"dbname": "elsewhere"}, "database", "no such database"),
        ({"dbname": "shut"}, "database", "takes no connections"),
        ({"user": "guest", "password": "x", "dbname": "private"}, "privilege", "may not connect"),
        ({"host": "no.such.host.invalid"}, "name", "cannot be resolved"),
        ({"host": "/nowhere"}, "socket", "no usable socket"),
        ({"options": "-c bogus=1"}, "parameter", "parameter of the connection"),
    ],
)
async def test_what_a_real_server_refuses_is_named(
    strict: EmbeddedPostgres, changes: dict[str, Any], cause: str, finding: str
):
    conninfo = strict.conninfo | changes
    for error in (refused(conninfo), await refused_on_trio(conninfo)):
        why = why_unreachable(error)
        assert why.cause == cause and finding in why.finding
        assert not {str(value) for value in changes.values()} & {*str(why).split()}


@pytest.mark.parametrize(
    ("changes", "cause", "finding"),
    [
        ({"sslrootcert": "/no/file"}, "certificate", "looks for it"),
        ({"sslrootcert": "system"}, "certificate", "authority that is not trusted"),
        ({"host": "db.example", "hostaddr": "127.0.0.1"}, "certificate", "for another name"),
        ({}, "closed", "without a word"),  # what came after the handshake
    ],
)
async def test_a_certificate_that_does_not_fit_is_named(
    postgres: EmbeddedPostgres, changes: dict[str, Any], cause: str, finding: str
):
    with answering(speak_tls) as port:
        tls = {"port": port, "sslmode": "verify-full", "sslrootcert": str(certificate()[0])}
        conninfo = postgres.conninfo | tls | changes
        errors = [refused(conninfo)]
        if "hostaddr" not in changes:  # the pool resolves by itself
            errors.append(await refused_on_trio(conninfo))
        for error in errors:
            why = why_unreachable(error)
            assert why.cause == cause and finding in why.finding


async def test_a_server_without_tls_is_named(postgres: EmbeddedPostgres):
    conninfo = postgres.conninfo | {"sslmode": "require"}
    for error in (refused(conninfo), await refused_on_trio(conninfo)):
        assert why_unreachable(error).cause == "tls"
        assert "SOTTOVOCE_DB_SSLMODE" in why_unreachable(error).remedy


async def test_a_port_at_which_nothing_listens_is_named(postgres: EmbeddedPostgres):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    conninfo = postgres.conninfo | {"port": port}
    for error in (refused(conninfo), await refused_on_trio(conninfo)):
        assert why_unreachable(error).cause == "refused"


@pytest.mark.parametrize("sslmode", ["disable", "require"])
@pytest.mark.parametrize(("answer", "cause"), [(speak_http, "protocol"), (hang_up, "closed")])
async def test_what_is_not_postgres_is_named(
    postgres: EmbeddedPostgres, answer: Callable[[socket.socket], None], cause: str, sslmode: str
):
    with answering(answer) as port:
        conninfo = postgres.conninfo | {"port": port, "sslmode": sslmode}
        for error in (refused(conninfo), await refused_on_trio(conninfo)):
            assert why_unreachable(error).cause == cause


async def test_a_port_that_never_answers_is_named(postgres: EmbeddedPostgres):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conninfo = postgres.conninfo | {"port": silent.getsockname()[1]}
        for error in (refused(conninfo), await refused_on_trio(conninfo)):
            assert why_unreachable(error).cause == "timeout"


async def test_the_pool_logs_each_new_cause_once_and_forgets_it_when_it_is_mended(
    database: Database, postgres: EmbeddedPostgres
):
    def causes() -> list[str]:
        return [line["cause"] for line in logs if line["event"] == "postgres_failed"]

    admin = database_named(postgres, "postgres")
    role = f"role_{database.conninfo['dbname']}"
    admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'old' SUPERUSER")
    try:
        with structlog.testing.capture_logs() as logs:
            conninfo = database.conninfo | {"user": role, "password": "canary"}
            async with opened_store(database, conninfo=conninfo) as opened:
                pool = opened.store._pool
                for _ in range(3):
                    assert not await pool.probe()
                assert causes() == ["login"]
                admin.execute(f"ALTER ROLE {role} NOLOGIN PASSWORD 'canary'")
                for _ in range(3):
                    assert not await pool.probe()
                assert causes() == ["login", "role"]
                admin.execute(f"ALTER ROLE {role} LOGIN")
                assert await pool.probe()
                assert pool.unreachable is None
        assert "canary" not in str(logs)
    finally:
        admin.execute(f"DROP ROLE {role}")


def libpq(text: str, **facts: bool) -> psycopg.OperationalError:
    """An error as psycopg makes it of a login that failed."""
    pgconn: Any = SimpleNamespace(
        error_message=text.encode(),
        **{"needs_password": False, "used_password": False, **facts},
    )
    return psycopg.OperationalError(f"connection failed: {text}", pgconn=pgconn)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("FATAL:  sorry, too many clients already", "connections"),
        (
            "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER",
            "connections",
        ),
        ("FATAL:  the database system is starting up", "starting"),
        ("FATAL:  the database system is not yet accepting connections", "starting"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "u", no encryption', "admission"),
        ('FATAL:  role "u" does not exist', "login"),
        ("session is read-only", "read_only"),
        ("server is in hot standby mode", "read_only"),
        ("could not receive data from server: No route to host", "route"),
        ("failed: Network is unreachable", "route"),
        ("SSL error: certificate verify failed", "certificate"),
        ("SSL error: tlsv1 alert protocol version", "tls"),
        # PgBouncer, Supavisor, Odyssey, RDS Proxy
        ("FATAL:  no such database: nowhere", "database"),
        ("FATAL:  no such user: someone", "login"),
        ("FATAL:  SASL authentication failed", "login"),
        ("FATAL:  no more connections allowed (max_client_conn)", "connections"),
        ("FATAL:  unsupported startup parameter: options", "parameter"),
        ("FATAL:  server login has been failing, try again later (server_login_retry)", "pooler"),
        ("FATAL:  pgbouncer cannot connect to server", "pooler"),
        ("ERROR:  query_wait_timeout", "pooler"),
        ("FATAL:  Tenant or user not found", "login"),
        ("FATAL:  MaxClientsInSessionMode: max clients reached", "connections"),
        ("FATAL:  This RDS proxy has no credentials for the role u", "login"),
        # What somebody else called their database says nothing
        ('FATAL:  database "Connection refused" does not exist', "database"),
        ("something entirely new", "unknown"),
    ],
)
def test_each_known_sentence_has_its_cause(text: str, cause: str):
    assert (
        why_unreachable(libpq(f'connection to server at "h", port 1 failed: {text}\n')).cause
        == cause
    )


def test_a_refusal_in_another_language_is_still_one():
    text = "failed: FATAL:  Passwort-Authentifizierung für Benutzer »u« fehlgeschlagen"
    assert why_unreachable(libpq(text, used_password=True)).cause == "refusal"
    assert why_unreachable(libpq("falta la contraseña", needs_password=True)).cause == "password"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (psycopg.errors.InvalidPassword(), "login"),
        (psycopg.errors.InvalidCatalogName(), "database"),
        (psycopg.errors.TooManyConnections(), "connections"),
        (psycopg.errors.CannotConnectNow(), "starting"),
        (psycopg.errors.ReadOnlySqlTransaction(), "read_only"),
        (psycopg.errors.ProtocolViolation(), "pooler"),
        (psycopg.errors.ConnectionTimeout(), "timeout"),
        (trio.TooSlowError(), "timeout"),
        (socket.gaierror(-2, "canary"), "name"),
        (ConnectionRefusedError(111, "Connection refused"), "refused"),
    ],
)
def test_each_kind_of_error_has_its_cause_and_nothing_of_its_text(error: Exception, cause: str):
    why = why_unreachable(error)
    assert why.cause == cause
    assert "canary" not in str(why)
