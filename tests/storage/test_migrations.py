"""An old deployment's tables come through: nothing is lost, renamed or numbered twice."""

import hashlib
import random
import threading
import time
from typing import Any

import psycopg
import pytest

from storage.postgres import take_over
from storage.postgres.migrate import LOCK_KEY, MigrationError, migrate, migrations, pending
from tests.support.services import Database

NAMES = [migration.name for migration in migrations()]

OLD_TABLES = """
CREATE TABLE users (
    id {id} PRIMARY KEY, clerk_id text, email text NOT NULL, first_name text, last_name text,
    role text, is_active boolean NOT NULL DEFAULT true, employer_id {id},
    subscription_status text, theme text
);
CREATE TABLE therapists (
    id {id} PRIMARY KEY, user_id {id} NOT NULL REFERENCES users, name text, title text, fee numeric
);
CREATE TABLE employers (id {id} PRIMARY KEY, name text, is_active boolean);
CREATE TABLE chat_channels (
    id {serial} PRIMARY KEY, channel_identifier varchar(200) UNIQUE NOT NULL,
    therapist_id {id} NOT NULL REFERENCES therapists DEFERRABLE INITIALLY DEFERRED,
    prospect_user_id {id} NOT NULL REFERENCES users,
    status varchar(20) NOT NULL, created_at {time} NOT NULL, updated_at {time} NOT NULL,
    last_message_at {time}
);
CREATE TABLE chat_messages (
    id {serial} PRIMARY KEY,
    channel_id {id} NOT NULL REFERENCES chat_channels ON DELETE CASCADE
        DEFERRABLE INITIALLY DEFERRED,
    author_email text, author_name text, content text NOT NULL, created_at {time}
);
INSERT INTO users (id, clerk_id, email)
    SELECT n, 'user_' || n, 'Person' || n || '@example.com' FROM generate_series(1, 201) AS n;
INSERT INTO users (id, email)
    VALUES (901, 'twin@example.com'), (902, 'TWIN@example.com');
INSERT INTO therapists (id, user_id) VALUES (7, 201);
INSERT INTO chat_channels
    (channel_identifier, therapist_id, prospect_user_id, status, created_at, updated_at)
    SELECT 'channel-' || n, 7, n, 'active', '2024-01-01', '2024-01-01'
    FROM generate_series(1, 200) AS n;
"""
INT = {"id": "integer", "serial": "serial", "time": "timestamp"}
BIGINT = {"id": "bigint", "serial": "bigserial", "time": "timestamptz"}


def old_deployment(database: Database, types: dict[str, str] = INT, rows: int = 0) -> None:
    """200 channels of one therapist, and `rows` messages spread over them.

    Many share a time, some have none, and ids do not follow time.
    """
    database.execute(OLD_TABLES.format(**types))
    chance = random.Random(2)
    with (
        psycopg.connect(**database.conninfo) as connection,
        connection.cursor().copy(
            "COPY chat_messages (channel_id, author_email, content, created_at) FROM STDIN"
        ) as copy,
    ):
        for number in range(rows):
            minute = None if chance.random() < 0.01 else chance.randrange(60)
            copy.write_row(
                (
                    number % 200 + 1,
                    f"person{number % 200 + 1}@EXAMPLE.com",
                    f"{'word ' * 30}{number}",
                    None if minute is None else f"2024-02-03 04:{minute:02}:00+00",
                )
            )


def schema(database: Database) -> list[tuple]:
    return database.execute(
        "SELECT table_name, column_name, data_type, is_nullable, column_default"
        " FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
    )


def numbers(database: Database, channel: int) -> list[int]:
    query = "SELECT seq FROM chat_messages WHERE channel_id = %s ORDER BY seq"
    return [row[0] for row in database.execute(query, [channel])]


def in_thread(work: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


def test_an_empty_database_gets_every_table(empty_database):
    assert pending(empty_database.conninfo) == NAMES
    assert migrate(empty_database.conninfo)[: len(NAMES)] == NAMES
    assert pending(empty_database.conninfo) == []
    tables = {row[0] for row in schema(empty_database)}
    assert tables >= {
        "users", "therapists", "employers", "chat_channels", "chat_messages", "chat_audit",
        "chat_tickets", "chat_migrations",
    }  # fmt: skip


LANDED = {
    "0001_main_application": "a97f178d8de9accb",
    "0002_numbered_messages": "da37421a3993b37c",
    "0003_audit_and_tickets": "dcd640df96369bcf",
    "0004_append": "1353abaa9074694f",
    "0005_epoch": "8b32593db258efc3",
    "0006_ticket_reuse": "ed05a8c2ddec9e2b",
}
"""The SHA-256 of each numbered migration that has landed, its first 16 digits."""


def test_a_migration_that_has_landed_is_never_edited():
    found = {
        migration.name: hashlib.sha256(migration.sql.encode()).hexdigest()[:16]
        for migration in migrations()
    }
    assert found.items() >= LANDED.items()
    assert set(found) == set(LANDED), "a new migration is listed here when it lands"


def test_a_second_run_does_nothing_and_a_url_will_do(empty_database):
    migrate(empty_database.url)
    before = schema(empty_database)
    assert migrate(empty_database.url) == []
    assert schema(empty_database) == before


def test_four_at_once_apply_each_migration_once(empty_database):
    applied: list[str] = []
    threads = [
        in_thread(lambda: applied.extend(migrate(empty_database.conninfo))) for _ in range(4)
    ]
    for thread in threads:
        thread.join(60)
    assert len(applied) == len(set(applied))
    assert set(applied) >= set(NAMES)


@pytest.mark.parametrize("types", [INT, BIGINT], ids=["int", "bigint"])
def test_ten_thousand_old_messages_are_numbered_by_time(empty_database, types):
    old_deployment(empty_database, types, rows=10_000)
    expected: dict[int, list[int]] = {}
    for channel, id_ in empty_database.execute(
        "SELECT channel_id, id FROM chat_messages ORDER BY created_at NULLS FIRST, id"
    ):
        expected.setdefault(channel, []).append(id_)
    content = empty_database.execute("SELECT id, content FROM chat_messages ORDER BY id")

    assert "old_messages" in migrate(empty_database.conninfo)

    found: dict[int, list[int]] = {}
    for channel, seq, id_ in empty_database.execute(
        "SELECT channel_id, seq, id FROM chat_messages ORDER BY channel_id, seq"
    ):
        found.setdefault(channel, []).append(id_)
        assert seq == len(found[channel])
    assert found == expected
    after = empty_database.execute("SELECT id, content FROM chat_messages ORDER BY id")
    assert after == content

    # A time that was missing is one that keeps the order by time.
    assert empty_database.execute("""
        SELECT count(*) FROM chat_messages AS one JOIN chat_messages AS next
            ON next.channel_id = one.channel_id AND next.seq = one.seq + 1
        WHERE one.created_at IS NULL OR one.created_at > next.created_at
    """) == [(0,)]
    assert empty_database.execute("""
        SELECT count(*), count(DISTINCT message_id), min(message_type), min(status),
            bool_and(sender_id = channel_id), count(client_message_id)
        FROM chat_messages
    """) == [(10_000, 10_000, "STANDARD", "SENT", True, 0)]
    assert empty_database.execute("""
        SELECT count(*) FROM chat_channels JOIN chat_messages
            ON channel_id = chat_channels.id AND seq = last_seq
        WHERE last_message_preview = left(content, 100) AND last_seq = 50
            AND last_message_at = chat_messages.created_at
            AND therapist_unread = 0 AND prospect_unread = 0
    """) == [(200,)]


def test_old_columns_keep_their_names_and_types(empty_database):
    old_deployment(empty_database)
    before = {row[:3] for row in schema(empty_database)}
    migrate(empty_database.conninfo)
    assert before <= {row[:3] for row in schema(empty_database)}


def test_the_main_applications_own_tables_are_left_as_they_are(empty_database):
    old_deployment(empty_database)
    owned = ("users", "therapists", "employers")
    before = [row for row in schema(empty_database) if row[0] in owned]
    migrate(empty_database.conninfo)
    assert [row for row in schema(empty_database) if row[0] in owned] == before
    indexes = empty_database.execute(
        "SELECT indexdef FROM pg_indexes WHERE tablename IN ('users', 'therapists')"
    )
    assert sum("(clerk_id)" in row[0] for row in indexes) == 1
    assert sum("(user_id)" in row[0] for row in indexes) == 1
    assert empty_database.execute("SELECT to_regclass('employers')") != [(None,)]


def test_tables_of_people_are_never_made_beside_the_main_applications_own(empty_database):
    old_deployment(empty_database)
    empty_database.execute("DROP TABLE employers")
    migrate(empty_database.conninfo)
    assert empty_database.execute("SELECT to_regclass('employers')") == [(None,)]


def test_a_main_application_without_a_chat_gets_the_two_tables(empty_database):
    old_deployment(empty_database)
    empty_database.execute("DROP TABLE chat_messages, chat_channels")
    migrate(empty_database.conninfo)
    assert migrate(empty_database.conninfo) == []
    assert {row[0] for row in schema(empty_database)} >= {"chat_channels", "chat_messages"}


def test_an_index_on_clerk_id_is_not_made_twice(empty_database):
    migrate(empty_database.conninfo)  # our own table has a unique constraint
    indexes = empty_database.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'users'")
    assert sum("(clerk_id)" in row[0] for row in indexes) == 1


def test_the_author_of_an_old_message_is_one_of_its_channels_two_people_or_unknown(
    empty_database,
):
    old_deployment(empty_database)
    empty_database.execute("""
        INSERT INTO chat_messages (channel_id, author_email, content, created_at)
        SELECT 1, email, 'x', now()
        FROM unnest(ARRAY['PERSON1@example.com', 'person201@example.com', 'person5@example.com',
                          NULL]) AS email
    """)
    migrate(empty_database.conninfo)
    senders = empty_database.execute("SELECT sender_id FROM chat_messages ORDER BY id")
    assert senders == [(1,), (201,), (None,), (None,)]


def test_a_time_of_the_last_message_that_is_there_stays(empty_database):
    old_deployment(empty_database, BIGINT, rows=400)
    empty_database.execute("UPDATE chat_channels SET last_message_at = '2020-01-01Z' WHERE id = 3")
    migrate(empty_database.conninfo)
    kept = "SELECT id FROM chat_channels WHERE last_message_at = '2020-01-01Z'"
    assert empty_database.execute(kept) == [(3,)]


def test_columns_that_have_the_names_of_ours_are_refused_all_at_once_before_any_change(
    empty_database,
):
    old_deployment(empty_database, rows=400)
    empty_database.execute("""
        SET CONSTRAINTS ALL IMMEDIATE;
        ALTER TABLE chat_messages ADD seq bigint, ADD message_id text;
        ALTER TABLE chat_channels ADD last_seq integer;
    """)
    before = schema(empty_database)
    with pytest.raises(MigrationError) as caught:
        migrate(empty_database.conninfo)
    assert [finding.partition(":")[0] for finding in caught.value.findings] == [
        "chat_channels.last_seq is integer",
        "chat_messages.seq is there already, and its numbers may not be 1, 2, 3, …",
        "chat_messages.message_id is text",
    ]
    assert schema(empty_database) == before


def test_a_run_that_was_interrupted_is_gone_on_with(empty_database, monkeypatch):
    old_deployment(empty_database, rows=3000)

    def interrupted(counts):
        yield [1, 2, 3], 45
        raise ZeroDivisionError

    monkeypatch.setattr(take_over, "_batches", interrupted)
    with pytest.raises(ZeroDivisionError):
        migrate(empty_database.conninfo)
    monkeypatch.undo()
    assert numbers(empty_database, 3) == list(range(1, 16))
    assert numbers(empty_database, 4) == [None] * 15
    migrate(empty_database.conninfo)
    assert numbers(empty_database, 4) == list(range(1, 16))
    assert migrate(empty_database.conninfo) == []


def test_a_channel_of_many_messages_is_numbered_in_parts(empty_database, monkeypatch):
    old_deployment(empty_database, rows=1000)
    empty_database.execute("UPDATE chat_messages SET channel_id = 1")
    monkeypatch.setattr(take_over, "BATCH", 30)
    by_time = "SELECT id FROM chat_messages ORDER BY created_at NULLS FIRST, id"
    order = empty_database.execute(by_time)
    migrate(empty_database.conninfo)
    assert empty_database.execute("SELECT id FROM chat_messages ORDER BY seq") == order
    assert numbers(empty_database, 1) == list(range(1, 1001))


def test_the_main_applications_own_messages_are_numbered_whatever_it_inserts(empty_database):
    old_deployment(empty_database, rows=200)
    migrate(empty_database.conninfo)
    insert = "INSERT INTO chat_messages (channel_id, author_email, content, created_at) VALUES "
    empty_database.execute(insert + "(1, 'person1@example.com', 'one', now())")
    empty_database.execute(insert + "(1, NULL, 'two', now()), (1, NULL, 'three', now())")
    with psycopg.connect(**empty_database.conninfo) as connection:
        connection.execute(insert + "(1, NULL, 'taken back', now())")
        connection.rollback()
    empty_database.execute(
        "INSERT INTO chat_messages (id, channel_id, content) VALUES (1, 1, 'there')"
        " ON CONFLICT DO NOTHING"
    )
    empty_database.execute(insert + "(1, 'person201@example.com', 'four', now())")
    rows = empty_database.execute(
        "SELECT seq, content, sender_id FROM chat_messages WHERE channel_id = 1 ORDER BY seq"
    )
    assert [(seq, content[:5], sender) for seq, content, sender in rows] == [
        (1, "word ", 1), (2, "one", 1), (3, "two", None), (4, "three", None), (5, "four", 201),
    ]  # fmt: skip
    assert empty_database.execute(
        "SELECT last_seq, last_message_preview, therapist_unread, prospect_unread"
        " FROM chat_channels WHERE id = 1"
    ) == [(5, "four", 1, 1)]
    times = empty_database.execute(
        "SELECT created_at FROM chat_messages WHERE channel_id = 1 ORDER BY seq"
    )
    assert times == sorted(set(times)), "the time rises with the number"


def test_nobody_else_may_make_a_trigger_of_the_functions_that_have_their_owners_rights(
    empty_database,
):
    migrate(empty_database.conninfo)
    assert empty_database.execute(
        "SELECT count(*) FROM pg_proc p, aclexplode(p.proacl) a WHERE p.prosecdef AND a.grantee = 0"
    ) == [(0,)]
    assert empty_database.execute(
        "SELECT count(*) FROM pg_proc WHERE prosecdef AND proacl IS NOT NULL"
    ) == [(2,)]


def test_a_message_from_further_back_keeps_its_time(empty_database):
    old_deployment(empty_database, BIGINT, rows=200)
    migrate(empty_database.conninfo)
    empty_database.execute("""
        INSERT INTO chat_messages (channel_id, content, created_at)
        VALUES (1, 'now', now()), (1, 'imported', '2020-01-01Z')
    """)
    assert empty_database.execute(
        "SELECT seq FROM chat_messages WHERE created_at = '2020-01-01Z'"
    ) == [(3,)]


TWICE = {
    "seq": """
        INSERT INTO chat_messages (channel_id, seq, message_id, content)
        VALUES (1, 1, gen_random_uuid(), 'x')
    """,
    "message_id": """
        INSERT INTO chat_messages (channel_id, seq, message_id, content)
        SELECT 1, 99, message_id, 'x' FROM chat_messages LIMIT 1
    """,
    "client_message_id": """
        INSERT INTO chat_messages
            (channel_id, seq, message_id, content, sender_id, client_message_id)
        SELECT 1, n, gen_random_uuid(), 'x', 1, '00000000-0000-0000-0000-000000000001'
        FROM generate_series(98, 99) AS n
    """,
    "pair": """
        INSERT INTO chat_channels (
            channel_identifier, therapist_id, prospect_user_id, status, created_at, updated_at)
        VALUES ('again', 7, 1, 'active', now(), now())
    """,
}


@pytest.mark.parametrize("twice", TWICE.values(), ids=TWICE)
def test_what_must_be_unique_is_refused_twice(empty_database, twice):
    old_deployment(empty_database, BIGINT, rows=400)
    migrate(empty_database.conninfo)
    with pytest.raises(psycopg.errors.UniqueViolation):
        empty_database.execute(twice)


def test_a_pair_with_two_channels_stops_the_migration_and_nothing_is_changed(empty_database):
    old_deployment(empty_database, rows=400)
    empty_database.execute("""
        INSERT INTO chat_channels
            (channel_identifier, therapist_id, prospect_user_id, status, created_at, updated_at)
        SELECT 'twin-' || n, 7, n, 'active', now(), now() FROM generate_series(1, 6) AS n
    """)
    before = schema(empty_database)
    rows = empty_database.execute("SELECT * FROM chat_messages ORDER BY id")
    with pytest.raises(MigrationError) as caught:
        migrate(empty_database.conninfo)
    assert "more than one channel: 6 " in str(caught.value)
    assert "1, 201, 2, 202, 3, 203, 4, 204, 5, 205)" in str(caught.value)
    assert "merge" in str(caught.value)
    assert schema(empty_database) == before
    assert empty_database.execute("SELECT * FROM chat_messages ORDER BY id") == rows

    empty_database.execute("DELETE FROM chat_channels WHERE id > 200")
    assert "old_messages" in migrate(empty_database.conninfo)


def test_a_clerk_id_of_two_users_stops_the_migration(empty_database):
    old_deployment(empty_database)
    empty_database.execute("UPDATE users SET clerk_id = 'user_1' WHERE id IN (2, 3)")
    with pytest.raises(MigrationError, match=r"users.clerk_id: 1 Clerk ids have more than one row"):
        migrate(empty_database.conninfo)


def test_an_error_shows_its_sqlstate_and_nothing_of_a_row(empty_database):
    old_deployment(empty_database, rows=10)
    empty_database.execute("""
        CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'canary %', OLD.content; END $$;
        CREATE TRIGGER theirs BEFORE UPDATE ON chat_messages
            FOR EACH ROW EXECUTE FUNCTION theirs();
    """)
    with pytest.raises(MigrationError) as caught:
        migrate(empty_database.conninfo)
    assert (caught.value.name, caught.value.sqlstate) == ("old_messages", "P0001")
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    empty_database.execute("DROP TRIGGER theirs ON chat_messages")
    assert migrate(empty_database.conninfo)[0] == "old_messages"


def test_a_transaction_that_holds_a_table_is_waited_for_by_name_and_not_without_end(
    empty_database,
):
    old_deployment(empty_database)
    lines: list[str] = []
    backup = {**empty_database.conninfo, "application_name": "a backup"}
    with psycopg.connect(**backup) as reader:
        reader.execute("SELECT count(*) FROM chat_channels")
        with pytest.raises(
            MigrationError, match="chat_channels was held by a backup for"
        ) as caught:
            migrate(empty_database.conninfo, wait_seconds=0.5, say=lines.append)
        assert caught.value.name == "chat_columns"
    assert lines
    assert lines[0].startswith("waiting for chat_channels, held by a backup for")
    assert migrate(empty_database.conninfo)[0] == "chat_columns"


def test_nobody_waits_long_behind_a_migration_that_waits(empty_database):
    old_deployment(empty_database)
    with psycopg.connect(**empty_database.conninfo) as reader:
        reader.execute("SELECT count(*) FROM chat_channels")
        thread = in_thread(lambda: migrate(empty_database.conninfo))
        longest = 0.0
        with psycopg.connect(**empty_database.conninfo, autocommit=True) as other:
            until = time.monotonic() + 2.0
            while time.monotonic() < until:
                began = time.monotonic()
                other.execute("SELECT count(*) FROM chat_channels")
                longest = max(longest, time.monotonic() - began)
    thread.join(60)
    # One lock's wait, and a machine that is busy; waiting for the lock without its limit is 2 s.
    assert longest < 1.0
    assert pending(empty_database.conninfo) == []


def test_old_times_without_a_zone_are_read_as_utc_whatever_the_server_says(empty_database):
    empty_database.execute("ALTER ROLE sottovoce SET timezone = 'America/New_York'")
    try:
        old_deployment(empty_database, INT)
        empty_database.execute("ALTER TABLE chat_channels ALTER last_message_at TYPE timestamptz")
        empty_database.execute("""
            INSERT INTO chat_messages (channel_id, content, created_at)
            VALUES (1, 'x', '2024-02-03 04:05:06')
        """)
        migrate(empty_database.conninfo)
        row = "SELECT last_message_at = '2024-02-03 04:05:06Z' FROM chat_channels WHERE id = 1"
        assert empty_database.execute(row) == [(True,)]
    finally:
        empty_database.execute("ALTER ROLE sottovoce RESET timezone")


def test_another_running_migration_is_waited_for_and_not_without_end(empty_database):
    with psycopg.connect(**empty_database.conninfo, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
        with pytest.raises(MigrationError, match="another migration is still running"):
            migrate(empty_database.conninfo, wait_seconds=0.1)
        applied: list[str] = []
        thread = in_thread(lambda: applied.extend(migrate(empty_database.conninfo)))
        time.sleep(0.2)
        assert applied == []
    thread.join(30)  # the lock went with its connection
    assert applied[: len(NAMES)] == NAMES


def test_a_database_that_is_not_there_is_an_error_without_its_address(postgres):
    for look in (migrate, pending):
        with pytest.raises(MigrationError, match="there is no such database") as caught:
            look({**postgres.conninfo, "dbname": "nowhere"})
        assert str(postgres.port) not in str(caught.value)


def test_a_role_that_can_only_read_sees_what_is_pending(database):
    database.execute("""
        CREATE ROLE reader LOGIN PASSWORD 'only-a-test';
        GRANT SELECT ON chat_migrations TO reader;
        DELETE FROM chat_migrations WHERE number = 3;
    """)
    try:
        reader = {**database.conninfo, "user": "reader", "password": "only-a-test"}
        assert pending(reader) == ["0003_audit_and_tickets"]
        with pytest.raises(MigrationError):
            migrate(reader)
    finally:
        database.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_tables_of_another_schema_on_the_search_path_are_used(empty_database):
    empty_database.execute("CREATE SCHEMA app")
    conninfo = {**empty_database.conninfo, "options": "-c search_path=app"}
    migrate(conninfo)
    assert pending(conninfo) == []
    assert schema(empty_database) == []
    assert empty_database.execute("SELECT count(*) FROM app.chat_messages") == [(0,)]


def test_migrations_have_numbers_without_a_hole():
    assert [migration.number for migration in migrations()] == list(range(1, len(NAMES) + 1))


AUDIT_ROW = "INSERT INTO chat_audit (action, outcome, request_id) VALUES ('export', 'ok', 'r')"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE chat_audit SET outcome = 'other'",
        "DELETE FROM chat_audit",
        "TRUNCATE chat_audit",
        "MERGE INTO chat_audit USING (SELECT 1) AS x ON true WHEN MATCHED THEN DELETE",
    ],
)
def test_the_audit_cannot_be_changed_not_even_by_its_owner(database, change):
    database.execute(AUDIT_ROW)
    with pytest.raises(psycopg.Error, match="append-only") as caught:
        database.execute(change)
    assert caught.value.sqlstate == "SV002"
    assert database.execute("SELECT outcome FROM chat_audit") == [("ok",)]


def test_an_audit_row_has_its_time_and_keeps_an_address(database):
    database.execute(AUDIT_ROW)
    database.execute(
        "INSERT INTO chat_audit (action, outcome, address, request_id, channel_id)"
        " VALUES ('send', 'ok', '2001:db8::1', 'r', 999)"
    )
    rows = database.execute("SELECT at <= clock_timestamp(), host(address) FROM chat_audit")
    assert rows == [(True, None), (True, "2001:db8::1")]


def test_no_table_is_read_under_the_lock_that_makes_columns_not_null(empty_database):
    empty_database.execute("CREATE TABLE t AS SELECT n AS a, n AS b FROM generate_series(1, 9) n")
    said: list[str] = []
    with psycopg.connect(**empty_database.conninfo, autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        connection.execute("SET client_min_messages = debug1")
        session = take_over.Session(connection, deadline=time.monotonic() + 60, say=said.append)
        take_over._require(session, "t", ["a", "b"])
    # PostgreSQL says so of each column whose check spares the scan.
    assert sum("sufficient to prove" in line for line in said) == 2
    assert empty_database.execute(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = 't'::regclass AND attnotnull"
        " AND attnum > 0"
    ) == [("a",), ("b",)]
    checks = "SELECT count(*) FROM pg_constraint WHERE conrelid = 't'::regclass AND contype = 'c'"
    assert empty_database.execute(checks) == [(0,)]
