"""What is scarce, switched off or gone: refused in order, with what lives left alone."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.postgres.migrate import migrate
from tests.support.chat import Chat, Pair, eventually, own_valkey, run_chat
from tests.support.services import Database, temporary_folder


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


def test_the_newest_stream_of_a_user_is_refused_and_the_old_ones_live(tight: Chat):
    pair = tight.pair()
    with (
        tight.stream(pair.channel_id, pair.prospect) as first,
        tight.stream(pair.channel_id, pair.prospect) as second,
    ):
        first.connected()
        second.connected()
        with tight.stream(pair.channel_id, pair.prospect) as third:
            assert third.status == 429, "said before a response starts: EventSource stops"
            assert third.headers["content-type"] == "application/problem+json"
            assert int(third.headers["retry-after"]) >= 1
            problem = third.problem()
        assert (problem["code"], problem["limit"]) == ("TOO_MANY_STREAMS", 2)
        row = tight.audit(third.headers["x-request-id"])
        assert (row["outcome"], row["detail"]) == ("refused", "TOO_MANY_STREAMS")
        with tight.stream(pair.channel_id, pair.therapist) as others:
            others.connected()
            tight.send(pair.therapist, pair.channel_id, "to all")
            for events in (first, second, others):
                assert events.message()["text"] == "to all"
        first.close()
        eventually(lambda: opens(tight, pair))
        tight.send(pair.therapist, pair.channel_id, "still there")
        assert second.message()["text"] == "still there"


def opens(chat: Chat, pair: Pair) -> bool:
    with chat.stream(pair.channel_id, pair.prospect) as events:
        return events.status == 200


def test_the_cap_is_on_the_user_and_not_on_the_channel(tight: Chat):
    one = tight.pair()
    two, three = tight.pair(prospect=one.prospect), tight.pair(prospect=one.prospect)
    with (
        tight.stream(one.channel_id, one.prospect) as first,
        tight.stream(two.channel_id, one.prospect) as second,
        tight.stream(three.channel_id, one.prospect) as third,
    ):
        assert (first.status, second.status, third.status) == (200, 200, 429)


def test_a_full_server_refuses_the_next_stream(tight: Chat):
    eventually(lambda: "sottovoce_streams_open 0.0" in tight.get("/metrics", None).text)
    pairs = [tight.pair(), tight.pair()]
    people = [(pair.channel_id, person) for pair in pairs for person in pair[1:]]
    streams = []
    try:
        for channel_id, person in people:
            streams.append(tight.stream(channel_id, person).connected())
        late = tight.pair()
        with tight.stream(late.channel_id, late.prospect) as events:
            assert events.status == 503
            assert int(events.headers["retry-after"]) >= 1
            assert events.problem()["code"] == "SERVER_FULL"
        tight.send(late.prospect, late.channel_id, "sends are no streams")
        (channel_id, person), events = people[0], streams[0]
        tight.send(person, channel_id, "alive")
        assert events.message()["text"] == "alive"
    finally:
        for events in streams:
            events.close()


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
