"""Canaries through every route: found in no log line, metric, problem body or audit row.

A canary stands for a name, an email, a text or a token. Each is a random word, so that a hit is
no coincidence; each is looked for as it is, in base64 and percent-encoded.
"""

import base64
import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest

from protocol.cursors import MAX_FOREIGN_BYTES
from storage.embedded import EmbeddedPostgres, EmbeddedValkey
from storage.failures import describe
from storage.postgres.migrate import migrate
from tests.support.chat import APP_ORIGIN, Chat, Pair, Person, eventually, run_chat
from tests.support.services import Database, temporary_folder
from tests.support.wire import WIRE


class Canaries:
    """Makes words, remembers them, and finds them."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def new(self, kind: str) -> str:
        word = f"{kind}{secrets.token_hex(6)}"
        self.words.append(word)
        return word

    def assert_absent(self, text: str | bytes, where: str) -> None:
        raw = text.encode() if isinstance(text, str) else text
        low = raw.lower()
        for word in self.words:
            for form in (word, quote(word), base64.b64encode(word.encode()).decode().rstrip("=")):
                assert form.lower().encode() not in low, f"a {word[:5]} is in {where}"


class Theatre:
    """A worker of its own with people whose every word is a canary."""

    def __init__(self, chat: Chat, postgres: EmbeddedPostgres, valkey: EmbeddedValkey) -> None:
        self.chat = chat
        self.postgres = postgres
        self.valkey = valkey
        self.canaries = Canaries()

    def names(self) -> dict[str, Any]:
        new = self.canaries.new
        return {
            "first_name": new("Firstname"),
            "last_name": new("Lastname"),
            "email": f"{new('email')}@example.com",
        }

    def see(self, response: httpx.Response) -> httpx.Response:
        """Whatever is no success must say nothing."""
        if response.status_code >= 400:
            text = response.text + repr(response.headers)
            self.canaries.assert_absent(text, f"a problem of {response.status_code}")
        return response


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    with (
        temporary_folder() as folder,
        EmbeddedPostgres(folder / "postgres", durable=False) as postgres,
        EmbeddedValkey(folder / "valkey", durable=False) as valkey,
    ):
        migrate(postgres.conninfo)
        database = Database(postgres.conninfo, postgres.url)
        with run_chat(database, valkey.url, folder, SOTTOVOCE_MAX_STREAMS_PER_USER="2") as running:
            yield Theatre(running, postgres, valkey)


def token_of(theatre: Theatre, person: Person) -> str:
    """A session whose token is a canary from its header to its signature."""
    token = theatre.chat.token(person)
    theatre.canaries.words += token.split(".")
    return token


def play(theatre: Theatre) -> Pair:
    """Every route, with what is right and with what is wrong."""
    chat, new, see = theatre.chat, theatre.canaries.new, theatre.see
    therapist = chat.therapist(title=new("Title"), **theatre.names())
    prospect = chat.person(**theatre.names())
    lapsed = chat.person(subscription="canceled", **theatre.names())
    inactive = chat.person(active=False, **theatre.names())
    pair = chat.pair(therapist, prospect)
    others = chat.pair(prospect=lapsed)
    people = [therapist, prospect, lapsed, inactive, Person(0, "user_gone", "", "", ""), None]
    headers = [
        {} if who is None else {"authorization": f"Bearer {token_of(theatre, who)}"}
        for who in people
    ]
    headers += [
        {"authorization": f"Bearer {new('token')}"},
        {"authorization": f"Basic {new('token')}"},
        {"cookie": f"__session={token_of(theatre, prospect)}; theme={new('cookie')}"},
        {
            "cookie": f"__session={token_of(theatre, prospect)}",
            "origin": f"https://{new('origin')}.example",
        },
        {"cookie": f"__session={token_of(theatre, prospect)}", "origin": APP_ORIGIN},
    ]
    name = secrets.token_hex(4)
    for fields in headers:
        for channel_id in (pair.channel_id, others.channel_id, 10**9):
            text = new("Text")
            own = {
                **fields,
                "user-agent": new("agent"),
                "referer": f"https://x/{new('referer')}",
                "x-request-id": new("request"),
                "x-forwarded-for": new("forwarded"),
            }

            def post(path: str, body: object, own: dict[str, str] = own) -> httpx.Response:
                return see(chat.client.post(path, json=body, headers=own))

            post("/api/chat/send", {"channelId": channel_id, "content": text})
            key = "7b2f1f0e-4b1e-4c62-8a62-5e6b" + name
            for content in (text, new("Text")):
                post(
                    "/api/chat/send",
                    {"channelId": channel_id, "content": content, "clientMessageId": key},
                )
            for body in (
                {"action": "send_message", "channelId": channel_id, "content": new("Text")},
                {"action": "get_messages", "channelId": channel_id},
                {"action": "get_messages", "channelId": channel_id, "lastMessageId": 10**12},
                {"action": "mark_read", "channelId": channel_id},
                {"action": "list_channels"},
                {
                    "action": "create_channel",
                    "therapistId": therapist.therapist_id,
                    "prospectUserId": lapsed.user_id,
                    "channelName": new("Channel"),
                },
                {"action": new("action")},
                {"action": "mark_read", "channelId": new("id")},
                {"action": "list_channels", new("field"): new("value")},
            ):
                post("/api/chat/messaging", body)
            for body in (
                {"channelId": channel_id, "content": new("Text") + "\0"},
                {"channelId": channel_id, "content": new("Text") * 2000},
                {"channelId": channel_id, "content": [new("Text")]},
                {"channelId": channel_id, "content": new("Text"), "messageType": new("type")},
                {"channelId": channel_id, "content": new("Text"), "clientMessageId": new("key")},
            ):
                post("/api/chat/send", body)
            for raw in (
                b'{"content": "%b' % new("Text").encode(),
                b'{"channelId":1,"content":"%b\\ud800"}' % new("Text").encode(),
                b'{"channelId":1,"content":"%b\xff"}' % new("Text").encode(),
                new("Text").encode() * 20_000,
            ):
                kind = {"content-type": "application/json"}
                see(chat.client.post("/api/chat/send", content=raw, headers={**own, **kind}))
            see(
                chat.client.post(
                    "/api/chat/send",
                    content=new("Text").encode(),
                    headers={**own, "content-type": f"text/{new('type')}"},
                )
            )
            see(
                chat.client.post(
                    "/api/chat/send",
                    json={"channelId": channel_id, "content": new("Text")},
                    headers={**own, "idempotency-key": new("key")},
                )
            )
            ticket = post("/api/chat/ticket", None)
            if ticket.status_code == 200:
                theatre.canaries.words.append(ticket.json()["ticket"])
            for path in (
                f"/api/chat/export?channelId={channel_id}",
                f"/api/chat/export?channelId={new('query')}",
                f"/api/chat/availability?x={new('query')}",
                f"/api/chat/availability?token={new('query')}",
                f"/api/chat/{new('path')}",
                f"/{new('path')}?{new('query')}",
                f"/api/chat/{channel_id}?lastEventId={new('cursor')}",
                f"/api/chat/{channel_id}?ticket={new('ticket')}&{new('query')}=1",
                f"/api/chat/{channel_id}?a={quote(new('query'))}",
            ):
                # A client of its own: over HTTP/2, httpx ends a stream with its connection only.
                with (
                    httpx.Client(base_url=chat.base, **WIRE.client) as client,
                    client.stream("GET", path, headers=own) as response,
                ):
                    if response.status_code >= 400:
                        response.read()
                        see(response)
            cursor = new("cursor").ljust(MAX_FOREIGN_BYTES + 1, "x")  # shorter ones are a reset
            see(chat.get(f"/api/chat/{channel_id}", None, {**own, "last-event-id": cursor}))
            see(chat.client.request(new("METHOD").upper(), "/api/chat/send", headers=own))
    return pair


def strange_requests(theatre: Theatre) -> None:
    """What does not get as far as the application."""
    new = theatre.canaries.new
    websocket = f"Sec-WebSocket-Key: {new('key')}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    for request in (
        f"GET /{new('path')} HTTP/9.9\r\n\r\n",
        f"GET /{new('path')}\r\n\r\n",
        f"{new('junk')}\r\n\r\n",
        f"GET /api/chat/1?{new('query')} HTTP/1.1\r\nHost: x\r\n{new('header')}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nX: {new('header')}\x01\r\n\r\n",
        f"POST /api/chat/send HTTP/1.1\r\nHost: x\r\nContent-Length: {new('length')}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n{websocket}",
        f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: {new('key')}\r\n\r\n",
        f"GET /{new('path')} HTTP/1.1\r\nHost: x\r\nX: {new('header') * 20_000}\r\n\r\n",
    ):
        with (
            contextlib.suppress(OSError),
            WIRE.connect(theatre.chat.port, timeout=1) as sock,
        ):
            sock.sendall(request.encode())
            theatre.canaries.assert_absent(sock.recv(65536), "an answer to junk")


def assert_silent(theatre: Theatre) -> None:
    """Nothing in the log so far, in the metrics or in the audit trail."""
    chat, canaries = theatre.chat, theatre.canaries
    canaries.assert_absent(chat.log.read_bytes(), "the log")
    canaries.assert_absent(chat.get("/metrics", None).content, "the metrics")
    rows = eventually(lambda: chat.database.execute("SELECT to_jsonb(a)::text FROM chat_audit a"))
    canaries.assert_absent("\n".join(row[0] for row in rows), "the audit trail")


def test_the_canaries_can_be_found(theatre: Theatre):
    """Otherwise everything below would pass for some other reason: they are in the answers."""
    pair = theatre.chat.pair(prospect=theatre.chat.person(**theatre.names()))
    theatre.chat.send(pair.prospect, pair.channel_id, theatre.canaries.new("Text"))
    reply = theatre.chat.act(pair.therapist, "get_messages", channelId=pair.channel_id)
    for form in (reply.text, base64.b64encode(theatre.canaries.words[-1].encode()).decode()):
        with pytest.raises(AssertionError):
            theatre.canaries.assert_absent(form, "here")


def test_a_failure_is_told_by_its_kind_and_place():
    """What no outage here happens to show: a driver's words may hold a row."""
    canaries = Canaries()
    try:
        try:
            raise psycopg.DataError(canaries.new("Text"))
        except psycopg.DataError as error:
            raise ExceptionGroup(canaries.new("Text"), [error]) from error
    except ExceptionGroup as group:
        told = repr(describe(group)) + repr(describe(group.exceptions[0]))
    assert "DataError" in told
    canaries.assert_absent(told, "what is told of a failure")


def test_every_route_is_silent(theatre: Theatre):
    pair = play(theatre)
    strange_requests(theatre)
    time.sleep(0.3)
    assert_silent(theatre)
    names = {(line["event"], line.get("route")) for line in map(json.loads, lines_of(theatre.chat))}
    assert {
        ("request", "send"),
        ("request", "messaging"),
        ("request", "export"),
        ("request", "stream"),
        ("request", "unknown"),
        ("token_refused", None),
        ("stream_opened", None),
        ("stream_closed", None),
        ("export", None),
    } <= names, "the log was not at work"
    assert theatre.chat.stored(pair.channel_id) > 0


def lines_of(chat: Chat) -> list[bytes]:
    return chat.log.read_bytes().splitlines()


def test_an_outage_of_redis_in_the_middle_is_silent(theatre: Theatre):
    chat = theatre.chat
    pair = chat.pair(chat.therapist(**theatre.names()), chat.person(**theatre.names()))
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, theatre.canaries.new("Text"))
        theatre.valkey.stop()
        for _ in range(5):
            chat.send(pair.prospect, pair.channel_id, theatre.canaries.new("Text"))
        events.texts(6)
        chat.act(pair.prospect, "get_messages", channelId=pair.channel_id)
        eventually(lambda: chat.get("/readyz", None).json()["redis"] == "down")
        degraded = chat.get("/readyz", None).json()
        since = datetime.fromisoformat(degraded["since"]).timestamp()
        assert degraded["status"] == "degraded"
        assert time.time() - 10 < since <= time.time()
        theatre.valkey.start()
        eventually(lambda: chat.get("/readyz", None).json()["redis"] == "up", seconds=20)
        assert chat.get("/readyz", None).json()["since"] is None
    assert chat.log_lines("dependency_down")
    assert_silent(theatre)


def test_an_outage_of_postgresql_in_the_middle_is_silent(theatre: Theatre):
    chat = theatre.chat
    pair = chat.pair(chat.therapist(**theatre.names()), chat.person(**theatre.names()))
    headers = [
        {"authorization": f"Bearer {token_of(theatre, who)}"}
        for who in (pair.therapist, pair.prospect)
    ]
    with chat.stream(pair.channel_id, None, headers[0]) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, theatre.canaries.new("Text"))
        theatre.postgres.stop()
        for fields in headers:
            for body in (
                {"action": "get_messages", "channelId": pair.channel_id},
                {"action": "list_channels"},
                {"action": "mark_read", "channelId": pair.channel_id},
                {
                    "action": "create_channel",
                    "therapistId": pair.therapist.therapist_id,
                    "prospectUserId": 1,
                    "channelName": theatre.canaries.new("Channel"),
                },
            ):
                theatre.see(chat.client.post("/api/chat/messaging", json=body, headers=fields))
            sent = {"channelId": pair.channel_id, "content": theatre.canaries.new("Text")}
            refused = chat.client.post("/api/chat/send", json=sent, headers=fields)
            assert refused.status_code == 503
            theatre.see(refused)
            theatre.see(chat.client.post("/api/chat/ticket", headers=fields))
            path = f"/api/chat/export?channelId={pair.channel_id}&{theatre.canaries.new('q')}"
            theatre.see(chat.client.get(path, headers=fields))
        path = f"/api/chat/{pair.channel_id}?ticket={theatre.canaries.new('ticket')}"
        theatre.see(chat.client.get(path))
        theatre.postgres.start()
        eventually(lambda: chat.get("/readyz", None).json()["postgres"] == "up", seconds=20)
    assert_silent(theatre)


def test_a_statement_that_fails_on_a_message_is_silent(theatre: Theatre):
    """PostgreSQL's own words for it repeat the row."""
    chat = theatre.chat
    pair = chat.pair()
    text = theatre.canaries.new("Text")
    chat.database.execute(
        "ALTER TABLE chat_messages ADD CONSTRAINT no_canary CHECK (content NOT LIKE '%refuse-me')"
    )
    try:
        body = {"channelId": pair.channel_id, "content": f"{text} refuse-me"}
        with pytest.raises(psycopg.errors.CheckViolation, match=text):
            chat.database.execute(
                "INSERT INTO chat_messages (channel_id, content, seq, message_id, status,"
                " message_type) VALUES (%s, %s, 1, gen_random_uuid(), 'SENT', 'STANDARD')",
                (pair.channel_id, body["content"]),
            )
        refused = chat.post("/api/chat/send", pair.prospect, body)
        assert (refused.status_code, refused.json()["code"]) == (500, "INTERNAL")
        theatre.see(refused)
        chat.send(pair.prospect, pair.channel_id, "the next one passes")
    finally:
        chat.database.execute("ALTER TABLE chat_messages DROP CONSTRAINT no_canary")
    assert chat.log_lines("statement_failed")
    assert chat.log_lines("request_failed")
    assert_silent(theatre)


def test_a_drain_with_open_streams_is_silent(theatre: Theatre):
    """The last test of this file: it ends the worker."""
    chat = theatre.chat
    pair = chat.pair(chat.therapist(**theatre.names()), chat.person(**theatre.names()))
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, theatre.canaries.new("Text"))
        events.message()
        chat.process.terminate()
        assert events.next().event == "closing"
    assert chat.process.wait(30) == 0
    theatre.canaries.assert_absent(chat.log.read_bytes(), "the log")
