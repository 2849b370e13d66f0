"""The wire contract, field by field, as the existing front end and our own clients read it."""

import json
import re
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.version import VERSION
from tests.support.chat import (
    APP_ORIGIN,
    Chat,
    Pair,
    Person,
    eventually,
    own_valkey,
    run_chat,
)

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ISO_Z = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
SECRET_ORIGIN = "https://elsewhere.example"


@pytest.fixture
def pair(chat: Chat) -> Pair:
    return chat.pair()


def milliseconds(iso: str) -> int:
    moment = datetime.strptime(iso, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """It is both: what the front end reads, and RFC 9457."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store, no-transform"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["type"] == "urn:sottovoce:problem:" + code.lower().replace("_", "-")
    for sentence in ("error", "title", "detail"):
        assert isinstance(body[sentence], str)
        assert body[sentence]
    return body


# The stream, as the front end reads it


def test_a_stream_begins_with_connected(chat: Chat, pair: Pair):
    before = time.time_ns() // 1_000_000
    with chat.stream(pair.channel_id, pair.prospect) as events:
        first = events.next()
    assert first.event == "message"
    assert first.id == ""
    data = json.loads(first.data)
    assert data.keys() == {"type", "channelId", "timestamp"}
    assert data["type"] == "connected"
    assert data["channelId"] == pair.channel_id
    assert type(data["channelId"]) is int
    assert before <= data["timestamp"] <= time.time_ns() // 1_000_000


def test_a_chat_message_has_the_fields_that_the_front_end_shows(chat: Chat, pair: Pair):
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()
        before = time.time_ns() // 1_000_000
        sent = chat.send(pair.therapist, pair.channel_id, "first line\nsecond\r\nthird \u2028 💬")
        event = events.next()
    assert event.event == "message", "only unnamed events reach onmessage"
    data = json.loads(event.data)
    assert data == {
        "id": sent["messageId"],
        "text": "first line\nsecond\r\nthird \u2028 💬",
        "author": "Tess Ott",
        "authorEmail": pair.therapist.email,
        "channelId": pair.channel_id,
        "ts": data["ts"],
        "messageType": "STANDARD",
    }
    assert UUID.fullmatch(data["id"])
    assert type(data["channelId"]) is int
    assert type(data["ts"]) is int
    assert before - 1 <= data["ts"] <= time.time_ns() // 1_000_000 + 5


def test_both_people_see_both_peoples_messages_in_order(chat: Chat, pair: Pair):
    with (
        chat.stream(pair.channel_id, pair.therapist) as left,
        chat.stream(pair.channel_id, pair.prospect) as right,
    ):
        left.connected()
        right.connected()
        texts = [f"word {number}" for number in range(20)]
        for number, text in enumerate(texts):
            sender = pair.prospect if number % 2 else pair.therapist
            chat.send(sender, pair.channel_id, text)
        for events in (left, right):
            seen = [events.message() for _ in texts]
            assert [message["text"] for message in seen] == texts
            times = [message["ts"] for message in seen]
            assert times == sorted(set(times)), "the front end sorts by ts"


def test_ids_are_the_channels_numbers_from_one_without_holes(chat: Chat, pair: Pair):
    for number in range(3):
        chat.send(pair.prospect, pair.channel_id, f"old {number}")
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        ids = [events.next().id for _ in range(3)]
        chat.send(pair.prospect, pair.channel_id, "new")
        ids.append(events.next().id)
    assert ids == ["1", "2", "3", "4"]


def test_a_stream_without_a_cursor_starts_with_the_newest_fifty(chat: Chat, long_pair: Pair):
    with chat.stream(long_pair.channel_id, long_pair.prospect) as events:
        events.connected()
        ids = [events.next().id for _ in range(50)]
        chat.send(long_pair.therapist, long_pair.channel_id, "live")
        assert json.loads(events.next().data)["text"] == "live"
    assert [int(i) for i in ids] == list(range(int(ids[0]), int(ids[0]) + 50))
    assert int(ids[-1]) >= LONG


# The stream, what is ours

LONG = 450
"""Messages: more than two of the store's pages."""


@pytest.fixture(scope="module")
def long_pair(chat: Chat) -> Pair:
    """A channel whose history was written by the store's own function."""
    pair = chat.pair()
    items = [
        {
            "ord": number,
            "channel_id": pair.channel_id,
            "message_id": str(uuid.uuid4()),
            "client_message_id": None,
            "sender_id": pair.prospect.user_id,
            "by_therapist": False,
            "author_email": pair.prospect.email,
            "author_name": "Pia Lund",
            "content": f"old {number + 1}",
            "message_type": "STANDARD",
            "request_id": "test",
        }
        for number in range(LONG)
    ]
    chat.database.execute("SELECT chat_append(%s::json)", (json.dumps(items),))
    return pair


def test_a_cursor_resumes_after_it_over_many_pages(chat: Chat, long_pair: Pair):
    headers = {"last-event-id": "3"}
    with chat.stream(long_pair.channel_id, long_pair.prospect, headers) as events:
        events.connected()
        seen = [events.next() for _ in range(LONG - 3)]
        assert [event.id for event in seen] == [str(seq) for seq in range(4, LONG + 1)]
        assert json.loads(seen[0].data)["text"] == "old 4"


def test_the_cursor_may_stand_in_the_query(chat: Chat, long_pair: Pair):
    target = f"{long_pair.channel_id}?lastEventId={LONG - 1}"
    with chat.stream(target, long_pair.prospect) as events:
        assert events.connected().next().id == str(LONG)


def test_the_header_wins_over_the_query(chat: Chat, long_pair: Pair):
    target = f"{long_pair.channel_id}?lastEventId=1"
    headers = {"last-event-id": str(LONG - 2)}
    with chat.stream(target, long_pair.prospect, headers) as events:
        assert events.connected().next().id == str(LONG - 1)


def test_an_empty_cursor_is_none(chat: Chat, long_pair: Pair):
    with chat.stream(long_pair.channel_id, long_pair.prospect, {"last-event-id": ""}) as events:
        assert int(events.connected().next().id) >= LONG - 49


def test_the_cursor_zero_starts_at_the_beginning(chat: Chat, long_pair: Pair):
    with chat.stream(long_pair.channel_id, long_pair.prospect, {"last-event-id": "0"}) as events:
        assert events.connected().next().id == "1"


@pytest.mark.parametrize("cursor", ["4", "9223372036854775807", "1.2"])
def test_a_cursor_of_no_past_of_ours_is_a_reset(chat: Chat, pair: Pair, cursor: str):
    for text in ("one", "two", "three"):
        chat.send(pair.prospect, pair.channel_id, text)
    with chat.stream(pair.channel_id, pair.prospect, {"last-event-id": cursor}) as events:
        events.connected()
        reset = events.next()
        assert reset.event == "reset"
        assert json.loads(reset.data) == {"channelId": pair.channel_id}
        assert reset.id == "", "the client must forget its cursor"
        assert events.texts(3) == ["one", "two", "three"]


def test_the_newest_cursor_is_no_reset(chat: Chat, pair: Pair):
    chat.send(pair.prospect, pair.channel_id, "one")
    with chat.stream(pair.channel_id, pair.prospect, {"last-event-id": "1"}) as events:
        events.connected()
        chat.send(pair.prospect, pair.channel_id, "two")
        event = events.next()
        assert (event.event, event.id) == ("message", "2")


def test_a_reset_on_an_empty_channel_makes_the_client_forget(chat: Chat, pair: Pair):
    with chat.stream(pair.channel_id, pair.prospect, {"last-event-id": "9"}) as events:
        assert events.connected().next().event == "reset"
        chat.send(pair.prospect, pair.channel_id, "first of all")
        assert events.next().id == "1"


def test_retry_is_said_at_the_start_and_differs_between_streams(chat: Chat, pair: Pair):
    pauses = set()
    for _ in range(6):
        with chat.stream(pair.channel_id, pair.prospect) as events:
            events.connected()
            pauses.add(events.parser.retry)
    assert all(pause is not None and 1500 <= pause <= 3000 for pause in pauses)
    assert len(pauses) > 1


def test_silence_is_broken_by_heartbeats_which_carry_no_id(chat: Chat, pair: Pair):
    chat.send(pair.prospect, pair.channel_id, "one")
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        events.message()
        began = time.monotonic()
        beats = [events.next(heartbeats=True) for _ in range(2)]
        took = time.monotonic() - began
    assert [beat.event for beat in beats] == ["heartbeat"] * 2
    assert events.parser.last_event_id == "1", "a reconnect resumes after the message"
    assert 0.8 < took < 3


def test_a_stream_has_the_headers_of_a_stream(chat: Chat, pair: Pair):
    with chat.stream(pair.channel_id, pair.prospect, {"accept-encoding": "gzip, br"}) as events:
        events.connected()
        headers = events.headers
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-store, no-transform"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers
    assert "content-length" not in headers
    assert "access-control-allow-origin" not in headers
    assert re.fullmatch(r"[0-9a-f]{16}", headers["x-request-id"])
    assert "server" not in headers


def test_an_event_carries_its_client_message_id(chat: Chat, pair: Pair):
    name = str(uuid.uuid4())
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        sent = chat.send(pair.therapist, pair.channel_id, "mine", clientMessageId=name)
        assert events.message()["clientMessageId"] == name
    assert sent["clientMessageId"] == name


# Sending


def test_the_reply_to_a_send(chat: Chat, pair: Pair):
    body = {"channelId": pair.channel_id, "content": "hello", "messageType": "STANDARD"}
    response = chat.post("/api/chat/send", pair.prospect, body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store, no-transform"
    reply = response.json()
    assert reply.keys() == {"success", "messageId", "message"}
    assert reply["success"] is True
    assert UUID.fullmatch(reply["messageId"])
    message = reply["message"]
    assert type(message["id"]) is int
    assert type(message["senderId"]) is int
    assert ISO_Z.fullmatch(message["sentAt"])
    assert abs(milliseconds(message["sentAt"]) - time.time() * 1000) < 10_000
    assert message == {
        "id": message["id"],
        "messageId": reply["messageId"],
        "senderId": pair.prospect.user_id,
        "content": "hello",
        "messageType": "STANDARD",
        "status": "SENT",
        "sentAt": message["sentAt"],
        "senderFirstName": "Pia",
        "senderLastName": "Lund",
        "senderEmail": pair.prospect.email,
        "seq": 1,
    }


def test_the_action_send_message_is_the_same_as_send(chat: Chat, pair: Pair):
    response = chat.act(
        pair.prospect,
        "send_message",
        channelId=pair.channel_id,
        content="hi",
        messageType="STANDARD",
    )
    by_action = response.json()
    by_path = chat.send(pair.prospect, pair.channel_id, "hi")
    assert by_action.keys() == {"success", "messageId", "message"}
    assert by_action["message"].keys() == by_path.keys()
    assert (by_action["message"]["seq"], by_path["seq"]) == (1, 2)


def test_the_same_client_message_id_gives_back_the_first_message(chat: Chat, pair: Pair):
    name = str(uuid.uuid4())
    first = chat.send(pair.prospect, pair.channel_id, "once", clientMessageId=name)
    again = chat.send(pair.prospect, pair.channel_id, "once", clientMessageId=name)
    assert again == first
    assert chat.stored(pair.channel_id) == 1


@pytest.mark.parametrize("form", ["{}", '"{}"'])
def test_the_idempotency_key_header_is_the_same_as_the_field(chat: Chat, pair: Pair, form: str):
    name = str(uuid.uuid4())
    body = {"channelId": pair.channel_id, "content": "once"}
    header = {"idempotency-key": form.format(name)}
    first = chat.post("/api/chat/send", pair.prospect, body, header).json()
    named = chat.send(pair.prospect, pair.channel_id, "once", clientMessageId=name)
    assert named["messageId"] == first["messageId"]
    both = chat.post("/api/chat/send", pair.prospect, {**body, "clientMessageId": name}, header)
    assert both.json() == first
    assert chat.stored(pair.channel_id) == 1


def test_an_idempotency_key_beside_another_client_message_id_is_refused(chat: Chat, pair: Pair):
    body = {
        "channelId": pair.channel_id,
        "content": "which?",
        "clientMessageId": str(uuid.uuid4()),
    }
    header = {"idempotency-key": str(uuid.uuid4())}
    refused = chat.post("/api/chat/send", pair.prospect, body, header)
    assert_problem(refused, 400, "INVALID_BODY")
    assert chat.stored(pair.channel_id) == 0


def test_the_same_client_message_id_with_other_words_is_a_conflict(chat: Chat, pair: Pair):
    name = str(uuid.uuid4())
    chat.send(pair.prospect, pair.channel_id, "one", clientMessageId=name)
    body = {"channelId": pair.channel_id, "content": "other", "clientMessageId": name}
    assert_problem(chat.post("/api/chat/send", pair.prospect, body), 409, "IDEMPOTENCY_CONFLICT")
    assert chat.stored(pair.channel_id) == 1


def test_a_client_message_id_belongs_to_its_sender_and_channel(chat: Chat, pair: Pair):
    name = str(uuid.uuid4())
    other = chat.pair(prospect=pair.prospect)
    ids = {
        chat.send(person, channel_id, "same", clientMessageId=name)["messageId"]
        for person, channel_id in (
            (pair.prospect, pair.channel_id),
            (pair.therapist, pair.channel_id),
            (pair.prospect, other.channel_id),
        )
    }
    assert len(ids) == 3


# The other actions


def test_create_channel_makes_one_and_then_finds_it(chat: Chat):
    therapist = chat.therapist(last_name="Berg", title="MD")
    prospect = chat.person(first_name="Pia", last_name="Lund")
    ids = {"therapistId": therapist.therapist_id, "prospectUserId": prospect.user_id}
    made = chat.act(therapist, "create_channel", **ids, channelName="Mondays")
    assert made.status_code == 200
    reply = made.json()
    assert reply.keys() == {"success", "channelId", "channel"}
    assert reply["success"] is True
    assert type(reply["channelId"]) is int
    assert reply["channel"] == {
        "id": reply["channelId"],
        "channelIdentifier": reply["channel"]["channelIdentifier"],
        "therapistId": therapist.therapist_id,
        "prospectUserId": prospect.user_id,
        "status": "active",
        "lastMessageAt": None,
        "lastMessagePreview": None,
        "unreadCount": 0,
        "therapistName": "Dr Berg",
        "therapistTitle": "MD",
        "prospectFirstName": "Pia",
        "prospectLastName": "Lund",
        "prospectEmail": prospect.email,
        "channelName": "Mondays",
    }
    for person in (therapist, prospect):
        again = chat.act(person, "create_channel", **ids)
        assert again.status_code == 200
        assert again.json() == {
            "success": True,
            "channelId": reply["channelId"],
            "message": "Channel already exists",
        }


def test_a_channel_that_was_created_can_be_used_at_once(chat: Chat):
    therapist, prospect = chat.therapist(), chat.person()
    ids = {"therapistId": therapist.therapist_id, "prospectUserId": prospect.user_id}
    channel_id = chat.act(prospect, "create_channel", **ids).json()["channelId"]
    with chat.stream(channel_id, therapist) as events:
        events.connected()
        chat.send(prospect, channel_id, "hello")
        assert events.message()["text"] == "hello"


def test_list_channels_has_every_field_and_counts_for_each_side(chat: Chat):
    therapist = chat.therapist(last_name="Berg", title=None)
    pair = chat.pair(therapist)
    quiet = chat.pair(therapist)
    chat.send(pair.prospect, pair.channel_id, "one")
    last = chat.send(pair.prospect, pair.channel_id, "two " + "x" * 200)
    chat.send(pair.therapist, quiet.channel_id, "earlier")
    last = chat.send(pair.prospect, pair.channel_id, "three " + "x" * 200)

    def listed(person: Person, channel_id: int) -> dict[str, Any]:
        reply = chat.act(person, "list_channels").json()
        assert reply.keys() == {"success", "channels"}
        assert reply["success"] is True
        return next(row for row in reply["channels"] if row["id"] == channel_id)

    row = listed(therapist, pair.channel_id)
    assert row == {
        "id": pair.channel_id,
        "channelIdentifier": row["channelIdentifier"],
        "therapistId": therapist.therapist_id,
        "prospectUserId": pair.prospect.user_id,
        "status": "active",
        "lastMessageAt": last["sentAt"],
        "lastMessagePreview": ("three " + "x" * 200)[:100],
        "unreadCount": 3,
        "therapistName": "Dr Berg",
        "therapistTitle": None,
        "prospectFirstName": "Pia",
        "prospectLastName": "Lund",
        "prospectEmail": pair.prospect.email,
        "channelName": None,
    }
    assert listed(pair.prospect, pair.channel_id)["unreadCount"] == 0, "their own are read"
    assert listed(quiet.prospect, quiet.channel_id)["unreadCount"] == 1
    assert listed(therapist, quiet.channel_id)["unreadCount"] == 0
    order = [row["id"] for row in chat.act(therapist, "list_channels").json()["channels"]]
    assert order == [pair.channel_id, quiet.channel_id], "the latest conversation first"

    assert chat.act(therapist, "mark_read", channelId=pair.channel_id).json() == {"success": True}
    assert listed(therapist, pair.channel_id)["unreadCount"] == 0
    chat.send(pair.therapist, pair.channel_id, "answer")
    assert listed(pair.prospect, pair.channel_id)["unreadCount"] == 1
    chat.act(therapist, "mark_read", channelId=pair.channel_id)
    assert listed(pair.prospect, pair.channel_id)["unreadCount"] == 1, "only the caller's count"
    chat.act(pair.prospect, "mark_read", channelId=pair.channel_id)
    assert listed(pair.prospect, pair.channel_id)["unreadCount"] == 0


def test_list_channels_is_empty_for_somebody_without_any(chat: Chat):
    reply = chat.act(chat.person(), "list_channels").json()
    assert reply == {"success": True, "channels": []}


def test_get_messages_gives_the_newest_fifty_oldest_first(chat: Chat):
    pair = chat.pair()
    sent = [chat.send(pair.prospect, pair.channel_id, f"m{n}") for n in range(53)]
    reply = chat.act(pair.therapist, "get_messages", channelId=pair.channel_id).json()
    assert reply.keys() == {"success", "messages"}
    assert reply["messages"] == sent[3:]


def test_get_messages_pages_back_by_id_and_by_uuid(chat: Chat, pair: Pair):
    sent = [chat.send(pair.prospect, pair.channel_id, f"m{n}") for n in range(7)]

    def page(**how: Any) -> list[dict[str, Any]]:
        reply = chat.act(pair.therapist, "get_messages", channelId=pair.channel_id, **how)
        assert reply.status_code == 200, reply.text
        messages: list[dict[str, Any]] = reply.json()["messages"]
        return messages

    assert page(maxResults=3) == sent[4:]
    assert page(maxResults=3, lastMessageId=sent[4]["id"]) == sent[1:4]
    assert page(maxResults=3, lastMessageId=sent[1]["messageId"]) == sent[:1]
    assert page(maxResults=3, lastMessageId=sent[0]["id"]) == []
    assert page(maxResults=200) == sent


def test_paging_back_from_another_channels_message_is_not_found(chat: Chat, pair: Pair):
    other = chat.pair(prospect=pair.prospect)
    foreign = chat.send(pair.prospect, other.channel_id, "elsewhere")
    for name in (foreign["id"], foreign["messageId"], str(uuid.uuid4()), 2**62):
        response = chat.act(
            pair.prospect, "get_messages", channelId=pair.channel_id, lastMessageId=name
        )
        assert_problem(response, 404, "MESSAGE_NOT_FOUND")


# Export


def test_an_export_is_a_text_file_with_everything_in_it(chat: Chat):
    therapist = chat.therapist(first_name="Tess", last_name="Berg")
    pair = chat.pair(therapist, chat.person(first_name="Zoë", last_name="O'Neill"))
    first = chat.send(pair.prospect, pair.channel_id, "two\nlines")
    second = chat.send(pair.therapist, pair.channel_id, "ünï 💬")
    response = chat.get(f"/api/chat/export?channelId={pair.channel_id}", pair.therapist)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["cache-control"] == "no-store, no-transform"
    assert re.fullmatch(
        r'attachment; filename="chat-transcript-Zoe-O-Neill-\d{8}T\d{6}Z\.txt"',
        response.headers["content-disposition"],
    )
    lines = response.content.decode("utf-8").split("\n")
    assert lines[1] == "CONFIDENTIAL"
    date = lines.index(next(line for line in lines if line.startswith("Export date: ")))
    assert re.fullmatch(r"Export date: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", lines[date])
    assert lines[date + 1 : date + 5] == [
        f"Therapist: Dr Berg <{therapist.email}>",
        f"Client: Zoë O'Neill <{pair.prospect.email}>",
        f"Channel: {pair.channel_id}",
        "Messages: 2",
    ]
    body = lines[date + 8 :]
    assert body[:7] == [
        f"[{first['sentAt']}] Zoë O'Neill:",
        "two",
        "lines",
        "",
        f"[{second['sentAt']}] Tess Berg:",
        "ünï 💬",
        "",
    ]
    assert "Confidential" in "\n".join(body[7:])


def test_an_export_of_a_long_conversation_is_whole(chat: Chat, long_pair: Pair):
    response = chat.get(f"/api/chat/export?channelId={long_pair.channel_id}", long_pair.therapist)
    exported = re.findall(r"^old (\d+)$", response.text, re.MULTILINE)
    assert [int(number) for number in exported] == list(range(1, LONG + 1))


@pytest.mark.parametrize(
    "query", ["", "?channelId=", "?channelId=x", "?channelId=0", "?channelId=-1"]
)
def test_an_export_needs_a_channels_number(chat: Chat, pair: Pair, query: str):
    assert_problem(chat.get("/api/chat/export" + query, pair.therapist), 400, "INVALID_QUERY")


# Availability and tickets


def test_availability_says_what_a_page_needs(chat: Chat):
    reply = chat.get("/api/chat/availability", chat.person()).json()
    assert reply == {
        "enabled": True,
        "role": "prospect",
        "subscription": {"active": True, "source": "subscription"},
        "upgradeUrl": "/billing",
    }
    reply = chat.get("/api/chat/availability", chat.therapist()).json()
    assert reply == {
        "enabled": True,
        "role": "therapist",
        "subscription": {"active": False, "source": None},
        "upgradeUrl": "/billing",
    }


def test_a_tickets_stream_comes_back_with_the_same_url(chat: Chat, pair: Pair):
    """An `EventSource` reconnects with the URL that it was made with, and its last id."""
    response = chat.post("/api/chat/ticket", pair.prospect)
    assert response.status_code == 200
    reply = response.json()
    assert reply.keys() == {"ticket", "expiresIn"}
    assert reply["expiresIn"] == 30
    target = f"{pair.channel_id}?ticket={reply['ticket']}"
    with chat.stream(target, None) as events:
        events.connected()
        chat.send(pair.therapist, pair.channel_id, "through a ticket")
        assert events.message()["text"] == "through a ticket"
        last = events.parser.last_event_id
    chat.send(pair.therapist, pair.channel_id, "meanwhile")
    for _ in range(3):
        with chat.stream(target, None, {"last-event-id": last}) as events:
            assert events.connected().message()["text"] == "meanwhile"


def test_a_ticket_opens_no_other_channel_than_its_first(chat: Chat, pair: Pair):
    other = chat.pair(prospect=pair.prospect)
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        events.connected()
    with chat.stream(f"{other.channel_id}?ticket={ticket}", None) as events:
        assert (events.status, events.problem()["code"]) == (401, "UNAUTHENTICATED")
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        events.connected()


def test_a_ticket_lets_nobody_in_whose_access_is_over(chat: Chat):
    pair = chat.pair()
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        events.connected()
    chat.database.execute(
        "UPDATE users SET subscription_status = null WHERE id = %s", (pair.prospect.user_id,)
    )
    eventually(lambda: ticket_status(chat, pair, ticket) == 403)


def ticket_status(chat: Chat, pair: Pair, ticket: str) -> int:
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        return events.status


def test_a_ticket_ends_with_its_sessions_lease(chat: Chat, services_folder: Path):
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database, valkey.url, services_folder, SOTTOVOCE_SESSION_LEASE_SECONDS="2"
        ) as running,
    ):
        pair = running.pair()
        headers = {
            "authorization": f"Bearer {running.token(pair.prospect, exp=int(time.time()) + 2)}"
        }
        ticket = running.post("/api/chat/ticket", None, headers=headers).json()["ticket"]
        assert ticket_status(running, pair, ticket) == 200
        eventually(lambda: ticket_status(running, pair, ticket) == 401)


def test_an_expired_ticket_is_refused(chat: Chat, pair: Pair):
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    chat.database.execute("UPDATE chat_tickets SET expires_at = now() - interval '1 second'")
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        assert events.status == 401


def test_a_ticket_is_for_streams_only(chat: Chat, pair: Pair):
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    query = f"?ticket={ticket}"
    body = {"channelId": pair.channel_id, "content": "no"}
    refusals = [
        chat.post("/api/chat/send" + query, None, body),
        chat.post("/api/chat/messaging" + query, None, {"action": "list_channels"}),
        chat.get(f"/api/chat/export{query}&channelId={pair.channel_id}", None),
        chat.get("/api/chat/availability" + query, None),
        chat.post("/api/chat/ticket" + query, None),
    ]
    for refused in refusals:
        assert_problem(refused, 401, "UNAUTHENTICATED")
    with chat.stream(f"{pair.channel_id}{query}", None) as events:
        assert events.status == 200, "and none of them has used it up"


def test_a_tickets_digest_is_stored_and_not_the_ticket(chat: Chat, pair: Pair):
    ticket = chat.post("/api/chat/ticket", pair.prospect).json()["ticket"]
    rows = chat.database.execute("SELECT to_jsonb(t)::text FROM chat_tickets t")
    assert rows
    assert ticket.encode().hex() not in repr(rows)
    assert ticket not in repr(rows)


# Refusals


def test_a_lapsed_subscription_says_where_to_renew(chat: Chat):
    pair = chat.pair(prospect=chat.person(subscription="canceled"))
    body = {"channelId": pair.channel_id, "content": "no"}
    refused = chat.post("/api/chat/send", pair.prospect, body)
    problem = assert_problem(refused, 403, "SUBSCRIPTION_REQUIRED")
    assert problem["upgradeUrl"] == "/billing"
    assert problem["message"]
    assert isinstance(problem["message"], str)


def test_no_token_is_401_and_says_what_is_expected(chat: Chat):
    refused = chat.get("/api/chat/1", None)
    assert_problem(refused, 401, "UNAUTHENTICATED")
    assert refused.headers["www-authenticate"] == "Bearer"


def test_an_unknown_user_is_404(chat: Chat):
    nobody = Person(0, "user_that_nobody_knows", "x@example.com", "X", "Y")
    assert_problem(chat.get("/api/chat/availability", nobody), 404, "USER_NOT_FOUND")


def test_every_answer_has_a_request_id_of_its_own(chat: Chat, pair: Pair):
    answers = [
        chat.get("/healthz", None),
        chat.get("/nowhere", None),
        chat.get("/api/chat/1", None),
        chat.act(pair.prospect, "list_channels"),
        chat.client.get("/healthz", headers={"x-request-id": "mine"}),
    ]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(answers)
    assert all(re.fullmatch("[0-9a-f]{16}", i) for i in ids), "the client has no say in it"


# Methods


ALLOW = {
    "/api/chat/1": "OPTIONS, GET",
    "/api/chat/send": "OPTIONS, POST",
    "/api/chat/messaging": "OPTIONS, POST",
    "/api/chat/ticket": "OPTIONS, POST",
    "/api/chat/export": "OPTIONS, GET, HEAD",
    "/api/chat/availability": "OPTIONS, GET, HEAD",
    "/healthz": "OPTIONS, GET, HEAD",
    "/openapi.json": "OPTIONS, GET, HEAD",
}


@pytest.mark.parametrize(("path", "allow"), ALLOW.items())
def test_another_method_is_405_with_what_is_allowed(chat: Chat, path: str, allow: str):
    for method in ("PUT", "DELETE", "PATCH", "PROPFIND", "POST" if "GET" in allow else "GET"):
        refused = chat.client.request(method, path)
        assert_problem(refused, 405, "METHOD_NOT_ALLOWED")
        assert refused.headers["allow"] == allow
    options = chat.client.options(path)
    assert (options.status_code, options.content) == (204, b"")
    assert options.headers["allow"] == allow


def test_head_has_the_headers_of_get_and_no_body(chat: Chat, pair: Pair):
    for path, person in (("/healthz", None), ("/api/chat/availability", pair.prospect)):
        got = chat.get(path, person)
        head = chat.client.head(path, headers=chat.bearer(person))
        assert head.status_code == got.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"]
    assert chat.get("/healthz", None).status_code == 200, "the connection is still in step"


# Other origins


@pytest.mark.parametrize("path", ["/api/chat/1", "/api/chat/send", "/api/chat/nowhere"])
def test_a_configured_origin_may_read_every_answer(chat: Chat, path: str):
    answer = chat.client.get(path, headers={"origin": APP_ORIGIN})
    assert answer.headers["access-control-allow-origin"] == APP_ORIGIN
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"


def test_a_configured_origin_may_read_a_stream(chat: Chat, pair: Pair):
    with chat.stream(pair.channel_id, pair.prospect, {"origin": APP_ORIGIN}) as events:
        assert events.headers["access-control-allow-origin"] == APP_ORIGIN
        assert events.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    "origin",
    [
        SECRET_ORIGIN,
        "null",
        "*",
        APP_ORIGIN + ".evil.example",
        APP_ORIGIN + "/",
        APP_ORIGIN.upper(),
    ],
)
def test_no_other_origin_may_read_anything(chat: Chat, origin: str):
    for method in ("GET", "OPTIONS"):
        answer = chat.client.request(method, "/api/chat/1", headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"


def test_a_preflight_says_what_a_page_may_send(chat: Chat):
    asked = {
        "origin": APP_ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = chat.client.options("/api/chat/send", headers=asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == APP_ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].lower()
    for name in (
        "authorization",
        "content-type",
        "idempotency-key",
        "last-event-id",
        "cache-control",
        "x-requested-with",
    ):
        assert name in allowed
    assert int(answer.headers["access-control-max-age"]) > 0


def test_the_operators_pages_are_not_for_other_origins(chat: Chat):
    answer = chat.client.get("/healthz", headers={"origin": APP_ORIGIN})
    assert "access-control-allow-origin" not in answer.headers


# For whoever runs it


def test_health_readiness_and_metrics_answer(chat: Chat, pair: Pair):
    chat.send(pair.prospect, pair.channel_id, "counted")
    assert chat.get("/healthz", None).json() == {"status": "ok", "version": VERSION}
    eventually(lambda: chat.get("/readyz", None).json()["status"] == "ready")
    assert chat.get("/readyz", None).json() == {
        "status": "ready",
        "enabled": True,
        "draining": False,
        "redis": "up",
        "postgres": "up",
        "keys": "known",
        "database": [],
        "since": None,
    }
    metrics = chat.get("/metrics", None)
    assert metrics.headers["content-type"].startswith("text/plain")
    for name in (
        "sottovoce_build_info",
        "sottovoce_streams_open",
        "sottovoce_stream_seconds",
        "sottovoce_sends_total",
        "sottovoce_deliveries_total",
        "sottovoce_duplicates_dropped_total",
        "sottovoce_gaps_filled_total",
        "sottovoce_slow_streams_ended_total",
        "sottovoce_delivery_seconds",
        "sottovoce_dependency_since_seconds",
        "sottovoce_tasks",
        "sottovoce_postgres_connections",
    ):
        assert f"\n{name}" in metrics.text, name
    labels = set(re.findall(r'[{,]([a-z_]+)="', metrics.text))
    assert not labels & {"user", "user_id", "channel", "channel_id", "email", "text", "path"}


def test_the_openapi_document_is_served(chat: Chat):
    answer = chat.get("/openapi.json", None)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["openapi"].startswith("3.1")


@pytest.mark.parametrize("path", ["/api/chat/send/", "/api/chat/messaging/", "/api/chat/ticket/"])
def test_a_trailing_slash_is_the_same_path_and_no_redirect(chat: Chat, pair: Pair, path: str):
    """Next.js adds it where `trailingSlash` is set; a redirect would lose a POST its body."""
    body: dict[str, Any] = {"action": "send_message"} if "messaging" in path else {}
    body |= {} if "ticket" in path else {"channelId": pair.channel_id, "content": "slashed"}
    assert chat.post(path, pair.prospect, body).status_code == 200
    with chat.stream(f"{pair.channel_id}/", pair.prospect) as events:
        events.connected()


def test_an_address_with_a_zone_or_a_port_is_stored(chat: Chat, services_folder: Path):
    """PostgreSQL's `inet` refuses both: sends were 500, and the audit trail lost rows."""
    with (
        own_valkey(services_folder) as valkey,
        run_chat(
            chat.database, valkey.url, services_folder, SOTTOVOCE_FORWARDED_HOPS="1"
        ) as running,
    ):
        pair = running.pair()
        body = {"channelId": pair.channel_id, "content": "x"}
        for forwarded, address in (
            ("fe80::1%eth0", "fe80::1"),
            ("10.9.9.9, [2001:db8::9]:443", "2001:db8::9"),
            ("203.0.113.9:4711", "203.0.113.9"),
            ("::ffff:203.0.113.9", "203.0.113.9"),
        ):
            headers = {"x-forwarded-for": forwarded}
            answer = running.post("/api/chat/send", pair.prospect, body, headers)
            assert answer.status_code == 200, answer.text
            assert running.audit(answer.headers["x-request-id"])["address"] == address
