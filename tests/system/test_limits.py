"""What is scarce, switched off or gone: refused in order, with what lives left alone."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from protocol.problems import PROBLEMS
from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import migrate
from tests.support.chat import (
    APP_ORIGIN,
    Chat,
    Events,
    Pair,
    eventually,
    own_valkey,
    run_chat,
)
from tests.support.services import Database, temporary_folder
from tests.support.tokens import Signer


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"


# Streams and sends


@pytest.fixture(scope="module")
def tight(chat: Chat, services_folder: Path) -> Iterator[Chat]:
    """A worker with little room, on the shared database."""
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database,
            valkey.url,
            services_folder,
            SOTTOVOCE_MAX_STREAMS_PER_USER="2",
            SOTTOVOCE_MAX_STREAMS="4",
            SOTTOVOCE_MAX_SENDS_PER_SECOND="2",
        ) as running,
    ):
        yield running


def test_one_stream_more_ends_the_oldest_of_that_person(tight: Chat):
    """A phone that vanished behind a proxy counts for minutes; nobody is locked out by it."""
    pair = tight.pair()
    with (
        tight.stream(pair.channel_id, pair.therapist) as others,
        tight.stream(pair.channel_id, pair.prospect) as first,
        tight.stream(pair.channel_id, pair.prospect) as second,
    ):
        for events in (others, first, second):
            events.connected()
        with tight.stream(pair.channel_id, pair.prospect) as third:
            third.connected()
            assert closed(first) == "too_many_streams"
            assert 120_000 <= (first.parser.retry or 0) <= 240_000, "minutes: no tabs in a chase"
            tight.send(pair.therapist, pair.channel_id, "to all")
            for events in (second, third, others):
                assert events.message()["text"] == "to all"
    [line] = [
        line
        for line in tight.log_lines("stream_closed")
        if line["request_id"] == first.headers["x-request-id"]
    ]
    assert line["reason"] == "too_many_streams"


def closed(events: Events, *, reconnect: bool = True) -> str:
    """The reason of a stream that ends with it."""
    closing = events.next()
    assert closing.event == "closing", closing
    said = json.loads(closing.data)
    assert said["reconnect"] is reconnect
    with pytest.raises(EOFError):
        events.next()
    reason: str = said["reason"]
    return reason


def assert_told_to_come_back(
    chat: Chat, events: Events, reason: str, code: str, *, milliseconds: int
) -> None:
    """An `EventSource` is told with a 200, and whoever reads the log what it was."""
    assert (events.status, events.headers["content-type"]) == (200, "text/event-stream")
    assert events.headers["cache-control"] == "no-store, no-transform"
    assert closed(events) == reason
    assert milliseconds <= (events.parser.retry or 0) <= 2 * milliseconds
    request_id = events.headers["x-request-id"]
    [line] = eventually(
        lambda: [line for line in chat.log_lines("request") if line["request_id"] == request_id]
    )
    assert (line["status"], line["closing"]) == (PROBLEMS[code].status, reason)
    assert not [
        line for line in chat.log_lines("stream_opened") if line["request_id"] == request_id
    ]


ANYTHING = {"accept": "*/*"}
"""The headers of a client that asks for no event stream by name."""


def test_the_cap_is_on_the_user_and_not_on_the_channel(tight: Chat):
    one = tight.pair()
    two, three = tight.pair(prospect=one.prospect), tight.pair(prospect=one.prospect)
    with (
        tight.stream(one.channel_id, one.prospect) as first,
        tight.stream(two.channel_id, one.prospect) as second,
        tight.stream(three.channel_id, one.prospect) as third,
    ):
        assert closed(first.connected()) == "too_many_streams"
        second.connected()
        third.connected()


def test_a_full_server_refuses_the_next_stream(tight: Chat):
    eventually(lambda: "sottovoce_streams_open 0.0" in tight.get("/metrics", None).text)
    pairs = [tight.pair(), tight.pair()]
    people = [(pair.channel_id, person) for pair in pairs for person in pair[1:]]
    streams = []
    try:
        for channel_id, person in people:
            streams.append(tight.stream(channel_id, person).connected())
        late = tight.pair()
        with tight.stream(late.channel_id, late.prospect, ANYTHING) as events:
            assert events.status == 503
            assert int(events.headers["retry-after"]) >= 1
            assert events.problem()["code"] == "SERVER_FULL"
        with tight.stream(late.channel_id, late.prospect) as events:
            assert_told_to_come_back(tight, events, "server_full", "SERVER_FULL", milliseconds=5000)
        tight.send(late.prospect, late.channel_id, "sends are no streams")
        (channel_id, person), events = people[0], streams[0]
        tight.send(person, channel_id, "alive")
        assert events.message()["text"] == "alive"
    finally:
        for events in streams:
            events.close()


@pytest.mark.once
def test_a_server_without_room_for_a_connection_says_so_to_each_in_its_way(
    chat: Chat, services_folder: Path
):
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database, valkey.url, services_folder, SOTTOVOCE_MAX_CONNECTIONS="2"
        ) as running,
    ):
        pair = running.pair()
        with (
            running.stream(pair.channel_id, pair.prospect) as one,
            running.stream(pair.channel_id, pair.therapist) as two,
        ):
            one.connected()
            two.connected()
            origin = {"origin": APP_ORIGIN}
            with running.stream(pair.channel_id, pair.prospect, origin) as events:
                assert events.headers["access-control-allow-origin"] == APP_ORIGIN
                assert_told_to_come_back(
                    running, events, "server_full", "SERVER_FULL", milliseconds=5000
                )
            with running.stream(pair.channel_id, pair.prospect, ANYTHING) as events:
                assert (events.status, events.problem()["code"]) == (503, "SERVER_FULL")
            body = {"channelId": pair.channel_id, "content": "x"}
            refused = running.post("/api/chat/send", pair.prospect, body)
            assert_problem(refused, 503, "SERVER_FULL")
            assert refused.headers["connection"] == "close"


# A token that has run out


@pytest.mark.parametrize("seconds", [6, 3600, 12 * 3600 - 60])
def test_a_stream_with_a_token_that_merely_expired_comes_back(chat: Chat, seconds: int):
    """A tab that slept comes back with its old cookie, and has a new one seconds later."""
    pair = chat.pair()
    expired = chat.token(pair.prospect, exp=int(time.time()) - seconds)
    for credential in ({"authorization": f"Bearer {expired}"}, {"cookie": f"__session={expired}"}):
        with chat.stream(pair.channel_id, None, credential) as events:
            assert_told_to_come_back(
                chat, events, "session_ended", "TOKEN_EXPIRED", milliseconds=5000
            )
        row = chat.audit(events.headers["x-request-id"])
        assert (row["action"], row["outcome"], row["detail"]) == (
            "stream",
            "refused",
            "TOKEN_EXPIRED",
        )
        with chat.stream(pair.channel_id, None, {**credential, **ANYTHING}) as events:
            assert (events.status, events.problem()["code"]) == (401, "TOKEN_EXPIRED")


def test_a_stream_with_a_token_that_waiting_cannot_mend_is_refused_for_good(chat: Chat):
    pair = chat.pair()
    now = int(time.time())
    stranger = Signer("stranger")
    for token in (
        chat.token(pair.prospect, exp=now - 12 * 3600 - 60),
        chat.token(pair.prospect, exp=now - 60, iss="https://clerk.evil.example"),
        chat.token(pair.prospect, exp=now - 60, sts="pending"),
        stranger.mint(sub=pair.prospect.clerk_id, exp=now - 60),
        chat.token(pair.prospect, exp=now - 60)[:-8] + "AAAAAAAA",
    ):
        with chat.stream(pair.channel_id, None, {"authorization": f"Bearer {token}"}) as events:
            assert (events.status, events.problem()["code"]) == (401, "UNAUTHENTICATED")


def test_sends_over_the_rate_are_refused_for_a_moment(tight: Chat):
    pair = tight.pair()
    body = {"channelId": pair.channel_id, "content": "fast"}
    answers = [tight.post("/api/chat/send", pair.prospect, body) for _ in range(12)]
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 4 <= len(taken) < 12
    for answer in refused:
        assert_problem(answer, 429, "RATE_LIMITED")
        assert answer.headers["retry-after"] == "1"
    assert tight.stored(pair.channel_id) == len(taken)
    tight.send(pair.therapist, pair.channel_id, "the other one may")
    time.sleep(float(refused[-1].headers["retry-after"]))
    tight.send(pair.prospect, pair.channel_id, "again")
    row = tight.audit(refused[0].headers["x-request-id"])
    assert (row["outcome"], row["detail"]) == ("refused", "RATE_LIMITED")


def test_the_action_send_message_is_held_to_the_same_rate(tight: Chat):
    pair = tight.pair()
    how = {"channelId": pair.channel_id, "content": "fast"}
    answers = [tight.act(pair.prospect, "send_message", **how) for _ in range(10)]
    assert 429 in {answer.status_code for answer in answers}


# The flag

CHAT_PATHS = {
    "GET": ("/api/chat/1", "/api/chat/export?channelId=1", "/api/chat/availability"),
    "POST": ("/api/chat/send", "/api/chat/messaging", "/api/chat/ticket"),
}


def all_answers(chat: Chat, pair: Pair) -> list[httpx.Response]:
    return [
        chat.client.request(method, path, headers=chat.bearer(pair.prospect))
        for method, paths in CHAT_PATHS.items()
        for path in paths
    ]


def assert_off(chat: Chat, pair: Pair) -> None:
    for answer in all_answers(chat, pair):
        assert_problem(answer, 404, "NOT_FOUND")
    for person in (pair.prospect, None):
        availability = chat.get("/api/chat/availability", person)
        assert availability.status_code == 404
        assert availability.json()["enabled"] is False
    assert chat.get("/healthz", None).status_code == 200
    ready = chat.get("/readyz", None)
    assert (ready.status_code, ready.json()["enabled"]) == (200, False)


def write_flag(file: Path, value: str) -> None:
    file.write_text(f"NEXT_PUBLIC_ENABLE_CHAT_FEATURE={value}\n")


def test_the_flag_is_off_and_on_and_off_again(chat: Chat, services_folder: Path):
    """From the start, and at run time: SIGHUP reads the env file again."""
    file = services_folder / "flag.env"
    write_flag(file, "false")
    with (
        own_valkey(services_folder) as valkey,
        run_chat(chat.database, valkey.url, services_folder, env_file=file) as running,
    ):
        pair = running.pair()
        assert_off(running, pair)

        write_flag(file, "true")
        running.process.send_signal(signal.SIGHUP)
        eventually(lambda: running.get("/readyz", None).json()["enabled"])
        with running.stream(pair.channel_id, pair.prospect) as events:
            events.connected()
            running.send(pair.therapist, pair.channel_id, "on")
            assert events.message()["text"] == "on"

            write_flag(file, "True")
            running.process.send_signal(signal.SIGHUP)
            closing = events.next()
            assert closing.event == "closing"
            assert closing.data == '{"reason":"chat_disabled","reconnect":false}'
            with pytest.raises(EOFError):
                events.next()
        assert_off(running, pair)


# Without the audit trail, without PostgreSQL, without Redis


class Outage(NamedTuple):
    """A worker whose PostgreSQL and Valkey may be stopped."""

    chat: Chat
    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey

    def readiness(self) -> dict[str, Any]:
        body: dict[str, Any] = self.chat.get("/readyz", None).json()
        return body

    def restore(self) -> None:
        for server in (self.postgres, self.valkey):
            if not server.running:
                server.start()
        eventually(lambda: self.readiness()["status"] == "ready", seconds=20)


@pytest.fixture(scope="module")
def own_services() -> Iterator[Outage]:
    with (
        temporary_folder() as folder,
        EmbeddedPostgres(folder / "postgres", durable=False) as postgres,
        EmbeddedValkey(folder / "valkey", durable=False) as valkey,
    ):
        migrate(postgres.conninfo)
        database = Database(postgres.conninfo, postgres.url)
        with run_chat(database, valkey.url, folder) as running:
            yield Outage(running, postgres, valkey)


@pytest.fixture
def outage(own_services: Outage) -> Iterator[Outage]:
    own_services.restore()
    yield own_services
    own_services.restore()


def test_an_export_that_cannot_be_audited_does_not_happen(outage: Outage):
    chat = outage.chat
    pair = chat.pair()
    chat.send(pair.prospect, pair.channel_id, "cAnArY words")
    path = f"/api/chat/export?channelId={pair.channel_id}"
    assert "cAnArY words" in chat.get(path, pair.therapist).text
    chat.database.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no room'; END $$;"
        " CREATE TRIGGER fail BEFORE INSERT ON chat_audit FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    try:
        refused = chat.get(path, pair.therapist)
        assert_problem(refused, 503, "UNAVAILABLE")
        assert "cAnArY" not in refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert chat.log_lines("export_not_audited")
    finally:
        chat.database.execute("DROP FUNCTION fail CASCADE")
    assert "cAnArY words" in chat.get(path, pair.therapist).text


def test_without_postgresql_streams_stay_and_sends_get_503_until_it_is_back(outage: Outage):
    chat, postgres = outage.chat, outage.postgres
    pair = chat.pair()
    body = {"channelId": pair.channel_id, "content": "during"}
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        before = chat.send(pair.prospect, pair.channel_id, "before")
        assert events.message()["text"] == "before"
        for person in pair[1:]:
            chat.act(person, "get_messages", channelId=pair.channel_id)
        postgres.stop()

        refused = chat.post("/api/chat/send", pair.prospect, body)
        assert_problem(refused, 503, "UNAVAILABLE")
        assert int(refused.headers["retry-after"]) >= 1
        eventually(lambda: outage.readiness()["postgres"] == "down")
        ready = chat.get("/readyz", None)
        assert (ready.status_code, ready.json()["status"]) == (503, "unready")
        assert chat.get("/healthz", None).status_code == 200

        began = time.monotonic()
        assert_problem(chat.post("/api/chat/send", pair.prospect, body), 503, "UNAVAILABLE")
        assert time.monotonic() - began < 1, "once it is known, nobody waits"

        read = chat.act(pair.prospect, "get_messages", channelId=pair.channel_id)
        assert read.status_code == 200, "read from Redis, within what is remembered of access"
        assert read.json()["messages"] == [before]
        with chat.stream(pair.channel_id, pair.prospect) as late:
            late.connected()
            assert late.message()["text"] == "before"
        stranger = chat.client.get(
            "/api/chat/availability",
            headers={"authorization": f"Bearer {chat.signer.mint(sub='nobody')}"},
        )
        assert_problem(stranger, 503, "UNAVAILABLE")
        assert events.next(heartbeats=True).event == "heartbeat", "through the outage"

        postgres.start()
        eventually(
            lambda: chat.post("/api/chat/send", pair.prospect, body).status_code == 200, seconds=20
        )
        assert events.message()["text"] == "during"
    outage.restore()
    [(refusals,)] = chat.database.execute(
        "SELECT count(*) FROM chat_messages WHERE channel_id = %s", (pair.channel_id,)
    )
    assert refusals == 2, "what was refused was not stored"


def test_a_refused_send_may_be_repeated_with_its_client_message_id(outage: Outage):
    chat = outage.chat
    pair = chat.pair()
    chat.send(pair.prospect, pair.channel_id, "before")
    body = {
        "channelId": pair.channel_id,
        "content": "once",
        "clientMessageId": "7b2f1f0e-4b1e-4c62-8a62-5e6b8f0a1a11",
    }
    outage.postgres.stop()
    assert chat.post("/api/chat/send", pair.prospect, body).status_code == 503
    outage.postgres.start()
    eventually(
        lambda: chat.post("/api/chat/send", pair.prospect, body).status_code == 200, seconds=20
    )
    assert chat.post("/api/chat/send", pair.prospect, body).status_code == 200
    assert chat.stored(pair.channel_id) == 2


def test_without_redis_everything_works_and_readiness_says_so(outage: Outage):
    chat = outage.chat
    pair = chat.pair()
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, "before")
        outage.valkey.stop()
        chat.send(pair.prospect, pair.channel_id, "during")
        assert events.texts(2) == ["before", "during"]
        eventually(lambda: outage.readiness()["redis"] == "down")
        ready = chat.get("/readyz", None)
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        read = chat.act(pair.therapist, "get_messages", channelId=pair.channel_id).json()
        assert [message["content"] for message in read["messages"]] == ["before", "during"]
        with chat.stream(pair.channel_id, pair.prospect, {"last-event-id": "1"}) as late:
            assert late.connected().message()["text"] == "during"
        outage.valkey.start()
        eventually(lambda: outage.readiness()["status"] == "ready", seconds=20)
        chat.send(pair.prospect, pair.channel_id, "after")
        assert events.message()["text"] == "after"


@pytest.mark.parametrize("how", ["gone", "hung"])
def test_without_postgresql_a_new_stream_is_told_to_come_back(outage: Outage, how: str):
    """In a channel of which nothing is remembered, so that PostgreSQL is needed."""
    chat, pair = outage.chat, outage.chat.pair()
    postmaster = psutil.Process(outage.postgres.pid)
    processes = [postmaster, *postmaster.children(recursive=True)]
    if how == "gone":
        outage.postgres.stop()
    else:
        for process in processes:
            process.suspend()
    try:
        with chat.stream(pair.channel_id, pair.prospect) as events:
            assert_told_to_come_back(chat, events, "unavailable", "UNAVAILABLE", milliseconds=5000)
        with chat.stream(pair.channel_id, pair.prospect, ANYTHING) as events:
            assert (events.status, events.problem()["code"]) == (503, "UNAVAILABLE")
    finally:
        for process in processes if how == "hung" else []:
            process.resume()
    outage.restore()
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()


def test_a_worker_that_drains_tells_a_new_stream_to_come_back(chat: Chat, services_folder: Path):
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database, valkey.url, services_folder, SOTTOVOCE_DRAIN_SECONDS="5"
        ) as running,
    ):
        pair = running.pair()
        with ExitStack() as stack:
            for _ in range(5):  # the last of them is ended after four seconds
                stack.enter_context(running.stream(pair.channel_id, pair.therapist)).connected()
            running.process.terminate()
            eventually(lambda: running.log_lines("draining"))
            with running.stream(pair.channel_id, pair.prospect) as events:
                assert_told_to_come_back(running, events, "drain", "DRAINING", milliseconds=1500)
            with running.stream(pair.channel_id, pair.prospect, ANYTHING) as events:
                assert (events.status, events.problem()["code"]) == (503, "DRAINING")


def test_a_defect_of_ours_does_not_end_an_event_source(outage: Outage):
    """What broke may be mended, by a restart or by whoever changed a table."""
    chat, pair = outage.chat, outage.chat.pair()
    chat.database.execute("ALTER TABLE users RENAME COLUMN is_active TO is_awake")
    try:
        with chat.stream(pair.channel_id, pair.prospect, ANYTHING) as events:
            code = events.problem()["code"]
        with chat.stream(pair.channel_id, pair.prospect) as events:
            assert_told_to_come_back(chat, events, "unavailable", code, milliseconds=5000)
    finally:
        chat.database.execute("ALTER TABLE users RENAME COLUMN is_awake TO is_active")
