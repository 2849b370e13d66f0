"""The chat on databases that are not the wheel's: behind PgBouncer, and on PostgreSQL 15."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.deployment.databases import run_pgbouncer, run_postgres_15
from tests.support.chat import Chat, Pair, environment, own_valkey, run_chat
from tests.support.running import run_command
from tests.support.services import Database, temporary_folder

pytestmark = pytest.mark.timeout(500)  # migrate, serve, doctor and a thousand requests

CLIENTS = 20
SENDS = 15
"""How many messages each client sends."""

LEFT_BEHIND = """
SELECT name, setting, reset_val FROM pg_settings
WHERE source = 'session' AND name NOT IN ('application_name', 'client_encoding')
UNION ALL
SELECT 'prepared', name, statement FROM pg_prepared_statements
UNION ALL
SELECT 'locked', classid::text, objid::text FROM pg_locks
WHERE locktype = 'advisory' AND pid = pg_backend_pid()
"""
"""What a client finds in a session that it did not leave there."""


def database_settings(database: Database) -> dict[str, str]:
    conninfo = database.conninfo
    return {
        "DB_HOST": conninfo["host"],
        "DB_PORT": str(conninfo["port"]),
        "DB_USER": conninfo["user"],
        "DB_PASSWORD": conninfo["password"],
        "DB_DATABASE": conninfo["dbname"],
        "SOTTOVOCE_DB_SSLMODE": "disable",
    }


@contextmanager
def chat_on(database: Database, folder: Path) -> Iterator[Chat]:
    """Migrated by the command, and served."""
    done = run_command("migrate", **database_settings(database))
    assert done.returncode == 0, done.stderr
    again = run_command("migrate", **database_settings(database))
    assert "nothing to" in again.stdout, again.stdout + again.stderr
    with own_valkey(folder) as valkey, run_chat(database, valkey.url, folder) as chat:
        yield chat


def converse(chat: Chat) -> None:
    """A whole conversation of two people, with everything that they can do."""
    therapist, prospect = chat.therapist(), chat.person()
    made = chat.act(
        therapist,
        "create_channel",
        therapistId=therapist.therapist_id,
        prospectUserId=prospect.user_id,
    ).json()
    channel_id = made["channelId"]
    with chat.stream(channel_id, prospect) as stream:
        assert stream.next().event == "message"  # connected
        for number in range(1, 8):
            chat.send(therapist, channel_id, f"message {number}")
        assert stream.texts(7) == [f"message {number}" for number in range(1, 8)]
    (listed,) = chat.act(prospect, "list_channels").json()["channels"]
    assert listed["unreadCount"] == 7
    assert chat.act(prospect, "mark_read", channelId=channel_id).json() == {"success": True}
    (listed,) = chat.act(prospect, "list_channels").json()["channels"]
    assert listed["unreadCount"] == 0
    with chat.stream(channel_id, prospect, {"last-event-id": "3"}) as stream:
        stream.next()
        assert stream.texts(4) == [f"message {number}" for number in range(4, 8)]
    page = chat.act(therapist, "get_messages", channelId=channel_id, maxResults=3).json()
    assert [message["content"] for message in page["messages"]] == [
        f"message {number}" for number in range(5, 8)
    ]
    export = chat.get(f"/api/chat/export?channelId={channel_id}", therapist)
    assert export.status_code == 200
    assert "message 7" in export.text
    ticket = chat.post("/api/chat/ticket", prospect)
    assert ticket.status_code == 200, ticket.text
    assert chat.audit(export.headers["x-request-id"])["outcome"] == "ok"


def talk_all_at_once(chat: Chat) -> Counter[int]:
    """Many clients send and look things up at the same time; how often each status came."""
    statuses: Counter[int] = Counter()
    pairs = [chat.pair() for _ in range(CLIENTS)]

    def talk(pair: Pair) -> None:
        with httpx.Client(base_url=chat.base, timeout=30) as client:
            who = chat.bearer(pair.prospect)

            def post(path: str, body: Any) -> None:
                statuses[client.post(path, json=body, headers=who).status_code] += 1

            for number in range(SENDS):
                post("/api/chat/send", {"channelId": pair.channel_id, "content": f"hello {number}"})
                post("/api/chat/messaging", {"action": "list_channels"})
                post(
                    "/api/chat/messaging",
                    {"action": "get_messages", "channelId": pair.channel_id},
                )
                post("/api/chat/messaging", {"action": "mark_read", "channelId": pair.channel_id})

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(talk, pairs))
    for pair in pairs:
        assert chat.stored(pair.channel_id) == SENDS
    return statuses


@contextmanager
def neighbour(database: Database) -> Iterator[list[tuple[Any, ...]]]:
    """Another client of the pooler, with the same user: what it finds that others have left.

    It throws away what is prepared in the sessions that it gets, too.
    """
    found: list[tuple[Any, ...]] = []
    stop = threading.Event()
    looks = 0

    def look() -> None:
        nonlocal looks
        with psycopg.connect(**database.conninfo, prepare_threshold=None) as connection:
            while not stop.is_set():
                found.extend(connection.execute(LEFT_BEHIND).fetchall())
                connection.commit()
                connection.execute("DEALLOCATE ALL")
                connection.commit()
                looks += 1
                time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join(30)
    assert looks > 20


@pytest.fixture
def pgbouncer_folder() -> Iterator[Path]:
    with temporary_folder() as fresh:
        yield fresh


def test_behind_pgbouncer_no_request_fails_and_nothing_is_left_in_its_sessions(
    empty_database: Database, folder: Path, pgbouncer_folder: Path, redis_url: str
):
    """The documented file, with two sessions for all connections of the worker and a neighbour."""
    with run_pgbouncer(empty_database, pgbouncer_folder, default_pool_size=2) as pooled:
        with neighbour(pooled) as found:
            with chat_on(pooled, folder) as chat:
                converse(chat)
                statuses = talk_all_at_once(chat)
                assert statuses == {200: 4 * CLIENTS * SENDS}
                assert chat.get("/readyz", None).status_code == 200
                assert chat.log_lines("postgres_pooler_found")
                for event in (
                    "statement_failed",
                    "postgres_failed",
                    "postgres_connection_replaced",
                ):
                    assert not chat.log_lines(event)
                settings = environment(pooled, redis_url, chat.signer)
            doctor = run_command("doctor", **settings)
            assert "reads and writes, through a pooler" in doctor.stdout, doctor.stdout
            restored = run_command("restored", **database_settings(pooled))
            assert restored.returncode == 0, restored.stderr
        assert not found


def test_in_session_mode_nothing_is_left_even_where_the_pooler_does_not_clean_up(
    empty_database: Database, folder: Path, pgbouncer_folder: Path
):
    """`server_reset_query` is DISCARD ALL in PgBouncer's own file; some leave it empty."""
    settings: dict[str, str | int] = {
        "pool_mode": "session",
        "default_pool_size": 12,
        "server_reset_query": "",
    }
    with run_pgbouncer(empty_database, pgbouncer_folder, **settings) as pooled:
        with chat_on(pooled, folder) as chat:
            converse(chat)
            assert talk_all_at_once(chat) == {200: 4 * CLIENTS * SENDS}
        with ExitStack() as stack:  # as many as there are sessions, so that each gets another one
            for _ in range(12):
                connection = psycopg.connect(**pooled.conninfo, prepare_threshold=None)
                stack.enter_context(connection)
                assert connection.execute(LEFT_BEHIND).fetchall() == []


def test_on_postgresql_15_a_whole_conversation_succeeds(folder: Path, pgbouncer_folder: Path):
    with run_postgres_15(pgbouncer_folder) as database, chat_on(database, folder) as chat:
        assert database.execute("SHOW server_version_num")[0][0].startswith("15")
        converse(chat)
        assert talk_all_at_once(chat) == {200: 4 * CLIENTS * SENDS}
        assert not chat.log_lines("postgres_pooler_found")
        assert chat.get("/readyz", None).status_code == 200
