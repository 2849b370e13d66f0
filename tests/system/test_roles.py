"""Two roles with the rights that `sottovoce grants` prints: one migrates, one serves."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.grants import grants
from storage.postgres.migrate import applied, migrate, read_catalog
from storage.postgres.requirements import unmet_by_server
from tests.support.chat import Chat, run_chat
from tests.support.layouts import LAYOUTS, NELE, PIA, TESS, WITH_PIA, make_layout
from tests.support.running import run_command
from tests.support.services import Database, fresh_database

pytestmark = pytest.mark.once

PASSWORD = "a-password-of-the-tests"
_numbers = itertools.count(1)


class Place(NamedTuple):
    """One layout, migrated by one role and served by another.

    Attributes:
        admin: as a superuser.
        owner: as the role that migrates.
        server: as the role that serves.
    """

    admin: Database
    owner: Database
    server: Database
    chat: Chat
    printed: str
    """What `sottovoce grants` printed for both roles."""


def as_role(database: Database, role: str) -> Database:
    conninfo = {**database.conninfo, "user": role, "password": PASSWORD}
    return Database(conninfo, "")


@pytest.fixture(scope="module", params=LAYOUTS)
def place(
    request: pytest.FixtureRequest,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    services_folder: Path,
) -> Iterator[Place]:
    number = next(_numbers)
    app, owner, server = (f"{name}-{number}" for name in ("app", "owner", "server"))
    with fresh_database(postgres, "template0") as admin:
        admin.execute(
            f"CREATE ROLE \"{app}\" LOGIN PASSWORD '{PASSWORD}';"
            f'GRANT CREATE ON SCHEMA public TO "{app}"'
        )
        application = as_role(admin, app)
        make_layout(application, request.param, remedied=True)
        names = {"owner": owner, "server": server}
        admin.execute("\n".join(grants(application.conninfo, **names)))
        admin.execute(f"ALTER ROLE \"{owner}\" PASSWORD '{PASSWORD}'")
        assert migrate(as_role(admin, owner).conninfo)
        printed = "\n".join(grants(as_role(admin, owner).conninfo, **names))
        admin.execute(printed)
        admin.execute(printed.replace("CREATE ROLE", "-- "))  # a second time does no harm
        admin.execute(f"ALTER ROLE \"{server}\" PASSWORD '{PASSWORD}'")
        if request.param == "busy":  # a trigger of its own counts messages
            assert "\n--   count_messages()\n" in printed
            more = "GRANT SELECT (message_count), UPDATE (message_count) ON chat_channels"
            admin.execute(f'{more} TO "{server}"')
        with run_chat(as_role(admin, server), valkey.url, services_folder) as chat:
            yield Place(admin, as_role(admin, owner), as_role(admin, server), chat, printed)
    cluster = Database({**postgres.conninfo, "dbname": "postgres"}, postgres.url)
    for role in (server, owner, app):
        cluster.execute(f'DROP ROLE "{role}"')


def test_a_whole_conversation_needs_no_right_that_was_not_granted(place: Place):
    chat = place.chat
    assert chat.get("/readyz", None).status_code == 200, chat.get("/readyz", None).text
    pair = {"therapistId": TESS.therapist_id, "prospectUserId": NELE.user_id}
    made = chat.act(TESS, "create_channel", **pair)
    assert made.status_code == 200, made.text
    for channel_id, person in ((made.json()["channelId"], NELE), (WITH_PIA, PIA)):
        with chat.stream(channel_id, person) as stream:
            stream.connected()
            chat.send(TESS, channel_id, "from Tess")
            chat.send(person, channel_id, "to Tess", clientMessageId=f"{channel_id:032x}")
            chat.send(person, channel_id, "to Tess", clientMessageId=f"{channel_id:032x}")
        listed = chat.act(TESS, "list_channels").json()["channels"]
        assert {c["id"]: c["unreadCount"] for c in listed}[channel_id] >= 1
        assert chat.act(TESS, "mark_read", channelId=channel_id).json() == {"success": True}
        page = chat.act(person, "get_messages", channelId=channel_id).json()["messages"]
        assert [message["content"] for message in page][-2:] == ["from Tess", "to Tess"]
        older = chat.act(
            person, "get_messages", channelId=channel_id, lastMessageId=page[-1]["messageId"]
        ).json()["messages"]
        assert older[-1]["content"] == "from Tess"
        resume = {"last-event-id": str(page[-2]["seq"])}
        with chat.stream(channel_id, person, resume) as stream:
            assert stream.connected().texts(1) == ["to Tess"]
    export = chat.get(f"/api/chat/export?channelId={WITH_PIA}", TESS)
    assert export.status_code == 200 and "to Tess" in export.text
    ticket = chat.post("/api/chat/ticket", PIA)
    assert ticket.status_code == 200, ticket.text
    with chat.stream(f"{WITH_PIA}?ticket={ticket.json()['ticket']}", None) as stream:
        stream.connected()
    rows = place.admin.execute(
        "SELECT outcome FROM chat_audit WHERE request_id = %s", (export.headers["x-request-id"],)
    )
    assert rows == [("ok",)] or chat.audit(export.headers["x-request-id"])["outcome"] == "ok"
    for event in ("statement_failed", "postgres_failed", "task_failed"):
        assert not chat.log_lines(event)


FORBIDDEN = (
    "UPDATE chat_audit SET actor = 'nobody'",
    "DELETE FROM chat_audit",
    "TRUNCATE chat_audit",
    "ALTER TABLE chat_audit DISABLE TRIGGER ALL",
    "DROP TRIGGER chat_audit_no_change ON chat_audit",
    "DROP FUNCTION chat_audit_is_append_only() CASCADE",
    "SET session_replication_role = replica",
    "UPDATE chat_messages SET content = 'other words'",
    "DELETE FROM chat_messages",
    "DELETE FROM chat_channels",
    "UPDATE chat_channels SET status = status",
    "UPDATE chat_channels SET therapist_id = therapist_id",
    "UPDATE users SET is_active = true",
    "INSERT INTO users (clerk_id) VALUES ('somebody')",
    "UPDATE chat_epoch SET epoch = 7",
    "DELETE FROM chat_migrations",
    "DROP TABLE chat_tickets",
    "ALTER TABLE chat_messages DROP COLUMN seq",
    "CREATE TABLE mine (id integer)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "DROP FUNCTION chat_people(text, bigint)",
    "CREATE INDEX ON chat_messages (content)",
    "SELECT setval(pg_get_serial_sequence('chat_messages', 'id'), 1)",
)


def test_the_role_that_serves_changes_no_audit_and_creates_nothing(place: Place):
    with psycopg.connect(**place.server.conninfo, autocommit=True) as connection:
        for statement in FORBIDDEN:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_the_triggers_functions_are_nobodys_tools(place: Place):
    """They run with their owner's rights: a table of somebody else must not call them."""
    for name in ("chat_number_message", "chat_count_message"):
        ((may,),) = place.server.execute(f"SELECT has_function_privilege('{name}()', 'EXECUTE')")
        assert not may


def test_a_right_that_is_taken_away_is_named(place: Place):
    place.admin.execute(f'REVOKE INSERT ON chat_audit FROM "{place.server.conninfo["user"]}"')
    try:
        with psycopg.connect(**place.server.conninfo, autocommit=True) as connection:
            catalog = read_catalog(connection)
            numbers = applied(connection, catalog)
        assert unmet_by_server(catalog, applied=numbers, known=numbers) == [
            "no right to insert in chat_audit: run sottovoce grants"
        ]
    finally:
        place.admin.execute(place.printed.replace("CREATE ROLE", "-- "))


def test_before_the_first_migration_the_migrating_role_alone_is_told_of(
    empty_database: Database,
):
    conninfo = empty_database.conninfo
    done = run_command(
        "grants",
        DB_HOST=conninfo["host"],
        DB_PORT=str(conninfo["port"]),
        DB_USER=conninfo["user"],
        DB_PASSWORD=conninfo["password"],
        DB_DATABASE=conninfo["dbname"],
        SOTTOVOCE_DB_SSLMODE="disable",
    )
    assert done.returncode == 0, done.stderr
    assert 'CREATE ROLE "sottovoce_owner" LOGIN' in done.stdout
    assert "sottovoce_server" not in done.stdout
    assert "migrate first" in done.stdout
