"""The chat on the tables of main applications as they are met: both layouts of issue 13, and four
hostile ones. Each has one pair of workers, and everything is tried on it."""

import json
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis

from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import MigrationError, migrate, pending
from tests.support.chat import Chat, Events, Person, eventually
from tests.support.layouts import (
    ARCHIVED,
    ARI,
    BLOCKED,
    BO,
    GONE,
    LAPSED,
    LAYOUTS,
    LEE,
    NELE,
    NONA,
    OF_LEE,
    PIA,
    REMEDIES,
    SUE,
    TESS,
    WITH_GONE,
    WITH_LAPSED,
    WITH_NONA,
    WITH_PIA,
    WITH_SUE,
    make_layout,
    serving,
)
from tests.support.services import Database, fresh_database
from tests.support.wire import WIRE

pytestmark = pytest.mark.once

OLD = ["old 1", "old 2", "old 3", "old 4"]
"""Channel WITH_PIA's messages before the take-over, in the order in which they were sent."""


class Place(NamedTuple):
    """One layout, migrated and served."""

    layout: str
    chat: Chat
    database: Database
    valkey: EmbeddedValkey
    applied: list[list[str]]
    """What the first migration applied, and the second."""


@pytest.fixture(scope="module", params=LAYOUTS)
def place(
    request: pytest.FixtureRequest,
    postgres: EmbeddedPostgres,
    valkey: EmbeddedValkey,
    services_folder: Path,
) -> Iterator[Place]:
    with fresh_database(postgres) as database:
        make_layout(database, request.param, remedied=True)
        applied = [migrate(database.conninfo), migrate(database.conninfo)]
        with serving(database, valkey.url, services_folder) as chat:
            yield Place(request.param, chat, database, valkey, applied)


def texts(chat: Chat, person: Person, channel_id: int) -> list[str]:
    """The newest page of a channel."""
    return [message["content"] for message in page(chat, person, channel_id)]


def page(chat: Chat, person: Person, channel_id: int, **more: Any) -> list[dict[str, Any]]:
    response = chat.act(person, "get_messages", channelId=channel_id, **more)
    assert response.status_code == 200, response.text
    messages: list[dict[str, Any]] = response.json()["messages"]
    return messages


def channels(chat: Chat, person: Person) -> dict[int, dict[str, Any]]:
    """What `list_channels` says, by channel."""
    response = chat.act(person, "list_channels")
    assert response.status_code == 200, response.text
    return {channel["id"]: channel for channel in response.json()["channels"]}


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json().get("code", "")


def stream_on_each_worker(chat: Chat, channel_id: int, person: Person) -> list[Events]:
    """Streams until both workers have one; each is past its `connected`."""
    streams: list[Events] = []
    workers: set[int] = set()
    while len(workers) < 2:
        assert len(streams) < 200, "one worker takes all streams"
        stream = chat.stream(channel_id, person).connected()
        streams.append(stream)
        line = eventually(partial(_stream_opened, chat, stream.headers["x-request-id"]))
        workers.add(line["worker"])
    return streams


def _stream_opened(chat: Chat, request_id: str) -> dict[str, Any] | None:
    """The log line of a stream."""
    lines = chat.log_lines("stream_opened")
    return next((line for line in lines if line["request_id"] == request_id), None)


def test_a_second_migration_applies_nothing(place: Place):
    assert place.applied[0] != []
    assert place.applied[1] == []
    assert pending(place.database.conninfo) == []


def test_old_messages_come_in_the_order_in_which_they_were_sent(place: Place):
    messages = page(place.chat, TESS, WITH_PIA)
    assert [message["content"] for message in messages][:4] == OLD
    assert [message["seq"] for message in messages][:4] == [1, 2, 3, 4]
    assert [message["senderId"] for message in messages][:3] == [
        PIA.user_id,
        TESS.user_id,
        PIA.user_id,
    ]
    with place.chat.stream(WITH_PIA, PIA) as stream:
        assert stream.connected().texts(4) == OLD


def test_a_conversation_of_two_crosses_both_workers(place: Place):
    chat = place.chat
    streams = [
        *stream_on_each_worker(chat, WITH_PIA, PIA),
        *stream_on_each_worker(chat, WITH_PIA, TESS),
    ]
    before = len(texts(chat, TESS, WITH_PIA))
    said = [f"said {number}: üñí 🎈 {uuid.uuid4()}" for number in range(6)]
    for number, text in enumerate(said):
        chat.client.close()  # on a connection of its own, so that either worker may take it
        chat.client = httpx.Client(base_url=chat.base, timeout=10, **WIRE.client)
        message = chat.send((TESS, PIA)[number % 2], WITH_PIA, text)
        assert message["seq"] == before + 1 + number
        assert (message["status"], message["messageType"]) == ("SENT", "STANDARD")
    for stream in streams:
        with stream:
            assert stream.texts(before + len(said))[before:] == said


def test_a_stream_resumes_after_the_last_message_that_it_showed(place: Place):
    chat = place.chat
    for text in ("kept 1", "kept 2"):
        last = chat.send(TESS, WITH_PIA, text)
    resumed = {"last-event-id": str(last["seq"] - 1)}
    with chat.stream(WITH_PIA, PIA, resumed) as stream:
        assert stream.connected().texts(1) == ["kept 2"]
        chat.send(PIA, WITH_PIA, "kept 3")
        assert stream.texts(1) == ["kept 3"]


def test_pages_go_back_to_the_first_message(place: Place):
    chat = place.chat
    whole = [message["seq"] for message in page(chat, TESS, WITH_PIA, maxResults=200)]
    assert whole == list(range(1, len(whole) + 1))
    seqs: list[int] = []
    older: dict[str, Any] = {}
    for key in ("messageId", "id") * 100:
        if not (messages := page(chat, TESS, WITH_PIA, maxResults=3, **older)):
            break
        seqs = [message["seq"] for message in messages] + seqs
        older = {"lastMessageId": messages[0][key]}
    assert seqs == whole


def test_each_of_two_has_an_unread_count_of_their_own(place: Place):
    chat = place.chat
    for person in (TESS, PIA):
        assert chat.act(person, "mark_read", channelId=WITH_PIA).json() == {"success": True}
    for text in ("one", "two"):
        chat.send(PIA, WITH_PIA, text)
    chat.send(TESS, WITH_PIA, "three")
    mine, hers = channels(chat, TESS)[WITH_PIA], channels(chat, PIA)[WITH_PIA]
    assert (mine["unreadCount"], hers["unreadCount"]) == (2, 1)
    chat.act(TESS, "mark_read", channelId=WITH_PIA)
    assert channels(chat, TESS)[WITH_PIA]["unreadCount"] == 0
    assert channels(chat, PIA)[WITH_PIA]["unreadCount"] == 1


def test_a_list_of_channels_has_what_was_said_last(place: Place):
    chat = place.chat
    text = "a long text, " * 40
    sent = chat.send(PIA, WITH_PIA, text)
    channel = channels(chat, TESS)[WITH_PIA]
    assert text.startswith(channel["lastMessagePreview"]) and channel["lastMessagePreview"]
    assert channel["lastMessageAt"] == sent["sentAt"]
    assert channel["status"] == "active"
    assert (channel["therapistId"], channel["prospectUserId"]) == (11, PIA.user_id)
    assert channel["channelIdentifier"]
    assert channel["prospectEmail"] == PIA.email


def test_the_export_has_every_message(place: Place):
    chat = place.chat
    chat.send(PIA, WITH_PIA, "to be exported")
    export = chat.get(f"/api/chat/export?channelId={WITH_PIA}", TESS)
    assert export.status_code == 200
    for text in [*OLD, "to be exported"]:
        assert f"\n{text}\n" in export.text
    assert refusal(chat.get(f"/api/chat/export?channelId={WITH_PIA}", PIA))[0] == 403


def test_a_new_pair_gets_a_channel_and_uses_it(place: Place):
    chat = place.chat
    pair = {"therapistId": 11, "prospectUserId": NELE.user_id, "channelName": "Wednesdays, 10 am"}
    made = chat.act(NELE, "create_channel", **pair)
    assert made.status_code == 200, made.text
    channel_id = made.json()["channelId"]
    assert chat.act(TESS, "create_channel", **pair).json() == {
        "success": True,
        "channelId": channel_id,
        "message": "Channel already exists",
    }
    with chat.stream(channel_id, TESS) as stream:
        stream.connected()
        chat.send(NELE, channel_id, "the first")
        assert stream.texts(1) == ["the first"]
    assert channels(chat, NELE)[channel_id]["status"] == "active"


def test_a_message_sent_twice_is_stored_once(place: Place):
    chat = place.chat
    mine = {"clientMessageId": str(uuid.uuid4())}
    first = chat.send(PIA, WITH_PIA, "once", **mine)
    again = chat.send(PIA, WITH_PIA, "once", **mine)
    assert again == first
    other = chat.post("/api/chat/send", PIA, {"channelId": WITH_PIA, "content": "twice", **mine})
    assert refusal(other) == (409, "IDEMPOTENCY_CONFLICT")
    assert texts(chat, TESS, WITH_PIA).count("once") == 1


def test_a_blocked_channel_refuses_stream_and_send(place: Place):
    chat = place.chat
    for person in (TESS, BO):
        with chat.stream(BLOCKED, person) as stream:
            assert (stream.status, stream.problem()["code"]) == (403, "CHANNEL_BLOCKED")
        send = chat.post("/api/chat/send", person, {"channelId": BLOCKED, "content": "x"})
        assert refusal(send) == (403, "CHANNEL_BLOCKED")


def test_an_archived_channel_shows_its_history_and_takes_no_message(place: Place):
    chat = place.chat
    for person in (TESS, ARI):
        with chat.stream(ARCHIVED, person) as stream:
            assert stream.connected().texts(2) == OLD[:2]
        assert texts(chat, person, ARCHIVED) == OLD[:2]
        send = chat.post("/api/chat/send", person, {"channelId": ARCHIVED, "content": "x"})
        assert refusal(send) == (403, "CHANNEL_ARCHIVED")


def test_somebody_without_a_name_or_an_address_is_served(place: Place):
    chat = place.chat
    with chat.stream(WITH_NONA, NONA) as stream:
        assert stream.connected().texts(1) == ["old 1"]
        sent = chat.send(NONA, WITH_NONA, "from nobody")
        assert (sent["senderFirstName"], sent["senderLastName"], sent["senderEmail"]) == (
            "",
            "",
            "",
        )
        chat.send(TESS, WITH_NONA, "to nobody")
        event = stream.message()
        assert (event["author"], event["authorEmail"]) == ("", "")
        assert stream.texts(1) == ["to nobody"]
    for person in (NONA, TESS):
        assert texts(chat, person, WITH_NONA)[-2:] == ["from nobody", "to nobody"]
        assert channels(chat, person)[WITH_NONA]["prospectFirstName"] == ""
    export = chat.get(f"/api/chat/export?channelId={WITH_NONA}", TESS)
    assert export.status_code == 200 and "from nobody" in export.text


def test_who_may_not_is_refused_and_who_is_sponsored_may(place: Place):
    chat = place.chat
    with chat.stream(WITH_GONE, GONE) as stream:
        assert (stream.status, stream.problem()["code"]) == (403, "USER_INACTIVE")
    with chat.stream(WITH_LAPSED, LAPSED) as stream:
        assert (stream.status, stream.problem()["code"]) == (403, "SUBSCRIPTION_REQUIRED")
    with chat.stream(WITH_PIA, BO) as stream:
        assert (stream.status, stream.problem()["code"]) == (403, "NOT_YOUR_CHANNEL")
    if place.layout != "guide":  # which knows no employers
        with chat.stream(WITH_SUE, SUE) as stream:
            stream.connected()
            chat.send(SUE, WITH_SUE, "paid for")
            assert stream.texts(1) == ["paid for"]


def test_a_deleted_therapist_is_one_no_more(place: Place):
    chat = place.chat
    response = chat.post("/api/chat/send", LEE, {"channelId": OF_LEE, "content": "still here"})
    if place.layout in ("application", "busy"):
        assert refusal(response) == (403, "NOT_YOUR_CHANNEL")
    else:
        assert response.status_code == 200
    # Whom the channel belongs to besides reads on.
    assert texts(chat, PIA, OF_LEE)[0] == "old 1"
    assert OF_LEE in channels(chat, PIA)


def test_people_keep_the_names_under_which_they_sent(place: Place):
    """In streams, pages and exports, whether Redis or PostgreSQL answers."""
    chat, database = place.chat, place.database

    def everywhere() -> list[tuple[str, ...]]:
        """What each way says of the author of the first message and of `text`."""
        messages = page(chat, TESS, channel_id, maxResults=200)
        pages = [
            (m["senderFirstName"], m["senderLastName"], m["senderEmail"])
            for m in messages if m["content"] == text
        ]  # fmt: skip
        with chat.stream(channel_id, TESS, {"last-event-id": str(sent["seq"] - 1)}) as stream:
            event = stream.connected().message()
        export = chat.get(f"/api/chat/export?channelId={channel_id}", TESS).text
        line = export[: export.index(f"\n{text}\n")].rpartition("\n")[2]
        return [*pages, (event["author"], event["authorEmail"]), (line,)]

    channel_id, text = WITH_PIA, f"under this name {uuid.uuid4()}"
    sent = chat.send(PIA, channel_id, text)
    first, last = sent["senderFirstName"], sent["senderLastName"]
    before = everywhere()
    assert before[0] == (first, last, PIA.email)
    assert before[1] == (f"{first} {last}", PIA.email)
    assert before[2][0].endswith(f"] {first} {last}:")
    database.execute(
        "UPDATE users SET first_name = 'Renamed', last_name = 'Since', email = 'new@example.com'"
        " WHERE clerk_id = 'user_pia'"
    )
    try:
        assert everywhere() == before  # warm
        with redis.Redis.from_url(place.valkey.url) as client:
            client.flushall()
        assert everywhere() == before  # cold
        assert everywhere() == before  # warmed again
        # From now on, once the servers' memory of her has run out.
        eventually(lambda: chat.send(PIA, channel_id, "x")["senderFirstName"] == "Renamed")
    finally:
        database.execute(
            f"UPDATE users SET first_name = '{first}', last_name = '{last}', email = '{PIA.email}'"
            " WHERE clerk_id = 'user_pia'"
        )


def test_old_messages_name_their_authors(place: Place):
    old = page(place.chat, TESS, WITH_PIA, maxResults=200)[3]
    assert old["content"] == "old 4"
    # The application's layout has no author's name: it is the one that Tess had at the take-over.
    name = ("Tess", "Ott" if place.layout == "application" else "Before")
    assert (old["senderFirstName"], old["senderLastName"]) == name


def test_no_server_met_an_error(place: Place):
    """Runs last: what the others did left no line that says a defect."""
    lines = [
        json.loads(line) for line in place.chat.log.read_bytes().splitlines() if line[:1] == b"{"
    ]
    assert [line for line in lines if line["level"] in ("error", "critical")] == []
    assert [
        line for line in lines if line["event"] == "request" and line.get("status") == 500
    ] == []


@pytest.fixture
def tenants(empty_database: Database) -> Database:
    make_layout(empty_database, "tenants")
    return empty_database


def test_what_does_not_fit_is_refused_by_name_all_at_once_and_nothing_is_changed(tenants: Database):
    def schema() -> list[tuple[Any, ...]]:
        return tenants.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default"
            " FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
        )

    tenants.execute("ALTER TABLE users DROP COLUMN is_active, ALTER clerk_id TYPE bytea USING NULL")
    before = schema()
    with pytest.raises(MigrationError) as caught:
        migrate(tenants.conninfo)
    for said in (
        "users.is_active is missing",
        "users.clerk_id is bytea",
        "chat_messages.tenant_id is not null and has no default",
        "chat_channels.region is not null and has no default",
    ):
        assert said in str(caught.value)
    assert schema() == before


def test_what_was_refused_is_taken_once_it_fits(tenants: Database):
    with pytest.raises(MigrationError):
        migrate(tenants.conninfo)
    tenants.execute(REMEDIES["tenants"])
    assert migrate(tenants.conninfo) != []
    assert migrate(tenants.conninfo) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_main_applications_own_columns_are_left_as_they_are(
    empty_database: Database, layout: str
):
    make_layout(empty_database, layout, remedied=True)
    columns = (
        "SELECT c.table_name, c.column_name, c.udt_name, c.character_maximum_length,"
        " c.is_nullable, c.column_default FROM information_schema.columns c"
        " WHERE table_schema = 'public'"
    )
    rows = (
        "SELECT to_jsonb(m) - 'updated_at' FROM chat_messages m ORDER BY id",
        "SELECT to_jsonb(c) - 'updated_at' FROM chat_channels c ORDER BY id",
        "SELECT to_jsonb(u) FROM users u ORDER BY id",
    )
    before = set(empty_database.execute(columns))
    held = [empty_database.execute(query) for query in rows]
    migrate(empty_database.conninfo)
    assert before <= set(empty_database.execute(columns))
    for query, old in zip(rows, held, strict=True):
        for (was,), (now,) in zip(old, empty_database.execute(query), strict=True):
            kept = {name: now[name] for name in was if was[name] is not None}
            assert kept == {name: value for name, value in was.items() if value is not None}
