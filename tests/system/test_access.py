"""Who may do what: the table of WIRE.md, every endpoint with everybody, against a real worker."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from storage.embedded import EmbeddedValkey
from tests.support.chat import (
    WAIT_SECONDS,
    Chat,
    Events,
    Pair,
    Person,
    eventually,
    own_valkey,
    run_chat,
)

OK = "OK"
NO_TOKEN = "UNAUTHENTICATED"
UNKNOWN = "USER_NOT_FOUND"
INACTIVE = "USER_INACTIVE"
LAPSED = "SUBSCRIPTION_REQUIRED"
NOT_YOURS = "NOT_YOUR_CHANNEL"
NOT_FOR_PROSPECTS = "THERAPIST_ONLY"

STATUS = {
    OK: 200,
    NO_TOKEN: 401,
    UNKNOWN: 404,
    INACTIVE: 403,
    LAPSED: 403,
    NOT_YOURS: 403,
    NOT_FOR_PROSPECTS: 403,
}

ENDPOINTS = (
    "stream",
    "send",
    "send_message",
    "get_messages",
    "mark_read",
    "export",
    "list_channels",
    "create_channel",
    "availability",
    "ticket",
)
ACTIONS_AUDITED = {"send_message", "get_messages", "mark_read", "list_channels", "create_channel"}


class Rule(NamedTuple):
    """What one kind of person gets. `channel`: stream, send, read and mark read."""

    channel: str
    export: str
    list_channels: str
    create: str
    """Their own channel with somebody: as the therapist that they are, else as prospect."""
    account: str
    """Availability and tickets: they need an account and no channel."""


def everywhere(code: str) -> Rule:
    return Rule(code, code, code, code, code)


TABLE = {
    "therapist": Rule(OK, OK, OK, OK, OK),
    "prospect": Rule(OK, NOT_FOR_PROSPECTS, OK, OK, OK),
    "outsider": Rule(NOT_YOURS, NOT_YOURS, OK, OK, OK),
    "lapsed": Rule(LAPSED, LAPSED, LAPSED, LAPSED, OK),
    "never subscribed": Rule(LAPSED, LAPSED, LAPSED, LAPSED, OK),
    "lapsed outsider": Rule(NOT_YOURS, NOT_YOURS, LAPSED, LAPSED, OK),
    "therapist of another channel": Rule(NOT_YOURS, NOT_YOURS, OK, OK, OK),
    "prospect of another channel": Rule(NOT_YOURS, NOT_YOURS, OK, OK, OK),
    "unknown user": everywhere(UNKNOWN),
    "inactive therapist": everywhere(INACTIVE),
    "inactive prospect": everywhere(INACTIVE),
    "of an active employer": Rule(OK, NOT_FOR_PROSPECTS, OK, OK, OK),
    "of an inactive employer": Rule(LAPSED, LAPSED, LAPSED, LAPSED, OK),
    "of an employer without chat": Rule(LAPSED, LAPSED, LAPSED, LAPSED, OK),
    "trialing": Rule(LAPSED, LAPSED, LAPSED, LAPSED, OK),
    "nobody": everywhere(NO_TOKEN),
}


class Cast(NamedTuple):
    """Somebody, and the channel that they try to get at."""

    person: Person | None
    pair: Pair


def employer(chat: Chat, *, active: bool, sponsors: bool) -> int:
    [(employer_id,)] = chat.database.execute(
        "INSERT INTO employers (name, is_active, sponsors_chat) VALUES ('Mill', %s, %s)"
        " RETURNING id",
        (active, sponsors),
    )
    return int(employer_id)


def cast_as(chat: Chat, kind: str) -> Cast:
    def prospect(**about: Any) -> Cast:
        pair = chat.pair(prospect=chat.person(**about))
        return Cast(pair.prospect, pair)

    def sponsored(**about: Any) -> Cast:
        return prospect(subscription=None, employer=employer(chat, **about))

    match kind:
        case "therapist":
            pair = chat.pair()
            return Cast(pair.therapist, pair)
        case "prospect":
            return prospect()
        case "outsider":
            return Cast(chat.person(), chat.pair())
        case "lapsed":
            return prospect(subscription="canceled")
        case "never subscribed":
            return prospect(subscription=None)
        case "lapsed outsider":
            return Cast(chat.person(subscription="past_due"), chat.pair())
        case "therapist of another channel":
            return Cast(chat.pair().therapist, chat.pair())
        case "prospect of another channel":
            return Cast(chat.pair().prospect, chat.pair())
        case "unknown user":
            return Cast(Person(0, "user_unknown", "?", "?", "?"), chat.pair())
        case "inactive therapist":
            pair = chat.pair(chat.therapist(active=False))
            return Cast(pair.therapist, pair)
        case "inactive prospect":
            return prospect(active=False)
        case "of an active employer":
            return sponsored(active=True, sponsors=True)
        case "of an inactive employer":
            return sponsored(active=False, sponsors=True)
        case "of an employer without chat":
            return sponsored(active=True, sponsors=False)
        case "trialing":
            return prospect(subscription="trialing")
        case "nobody":
            return Cast(None, chat.pair())
        case _:
            raise ValueError(kind)


class Answer(NamedTuple):
    status: int
    code: str
    headers: httpx.Headers


def ask(chat: Chat, endpoint: str, cast: Cast, *, channel_id: int | None = None) -> Answer:
    """One request; the code of its problem, or OK."""
    person, pair = cast
    channel_id = channel_id or pair.channel_id
    match endpoint:
        case "stream":
            with chat.stream(channel_id, person) as events:
                code = OK if events.status == 200 else events.problem()["code"]
                return Answer(events.status, code, events.headers)
        case "send":
            body = {"channelId": channel_id, "content": "words"}
            response = chat.post("/api/chat/send", person, body)
        case "send_message":
            response = chat.act(person, "send_message", channelId=channel_id, content="words")
        case "get_messages" | "mark_read":
            response = chat.act(person, endpoint, channelId=channel_id)
        case "export":
            response = chat.get(f"/api/chat/export?channelId={channel_id}", person)
        case "list_channels":
            response = chat.act(person, "list_channels")
        case "create_channel" if person is not None and person.therapist_id is not None:
            other = chat.person().user_id
            response = chat.act(
                person, "create_channel", therapistId=person.therapist_id, prospectUserId=other
            )
        case "create_channel":
            own = person.user_id if person and person.user_id else 1
            therapist_id = chat.therapist().therapist_id
            response = chat.act(
                person, "create_channel", therapistId=therapist_id, prospectUserId=own
            )
        case "availability":
            response = chat.get("/api/chat/availability", person)
        case "ticket":
            response = chat.post("/api/chat/ticket", person)
        case _:
            raise ValueError(endpoint)
    code = OK if response.status_code == 200 else response.json()["code"]
    return Answer(response.status_code, code, response.headers)


def expected(rule: Rule, endpoint: str) -> str:
    match endpoint:
        case "export":
            return rule.export
        case "list_channels":
            return rule.list_channels
        case "create_channel":
            return rule.create
        case "availability" | "ticket":
            return rule.account
        case _:
            return rule.channel


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("kind", TABLE)
def test_the_table(chat: Chat, kind: str, endpoint: str):
    cast = cast_as(chat, kind)
    answer = ask(chat, endpoint, cast)
    code = expected(TABLE[kind], endpoint)
    assert (answer.status, answer.code) == (STATUS[code], code)
    sends = endpoint in ("send", "send_message")
    assert chat.stored(cast.pair.channel_id) == (1 if sends and code == OK else 0)
    if code == OK:
        return
    row = chat.audit(answer.headers["x-request-id"])
    assert row["outcome"] == "refused"
    assert row["action"] == ("messaging" if endpoint in ACTIONS_AUDITED else endpoint)
    assert row["detail"] == code
    assert row["address"] == "127.0.0.1"
    assert row["actor"] == (cast.person.clerk_id if cast.person else None)
    assert row["user_id"] == (cast.person.user_id or None if cast.person else None)
    if cast.person and endpoint not in (
        "list_channels",
        "create_channel",
        "availability",
        "ticket",
    ):
        assert row["channel_id"] == cast.pair.channel_id


@pytest.mark.parametrize("endpoint", ["stream", "send", "get_messages", "mark_read", "export"])
@pytest.mark.parametrize("kind", ["outsider", "lapsed outsider", "therapist of another channel"])
def test_a_channel_of_others_and_none_at_all_look_the_same(chat: Chat, kind: str, endpoint: str):
    cast = cast_as(chat, kind)

    def words(channel_id: int) -> tuple[int, Any]:
        body = {"action": endpoint, "channelId": channel_id}
        match endpoint:
            case "stream":
                with chat.stream(channel_id, cast.person) as events:
                    return events.status, events.problem()
            case "send":
                body = {"channelId": channel_id, "content": "words"}
                response = chat.post("/api/chat/send", cast.person, body)
            case "export":
                response = chat.get(f"/api/chat/export?channelId={channel_id}", cast.person)
            case _:
                response = chat.post("/api/chat/messaging", cast.person, body)
        return response.status_code, response.json()

    there = words(cast.pair.channel_id)
    assert there[0] == 403
    assert words(2**62) == there
    assert words(2**63 - 1) == there


# Creating channels


@pytest.mark.parametrize("kind", ["therapist", "prospect", "outsider"])
def test_nobody_creates_a_channel_for_somebody_else(chat: Chat, kind: str):
    person = cast_as(chat, kind).person
    other, somebody = chat.therapist(), chat.person()
    before = chat.database.execute("SELECT count(*) FROM chat_channels")
    ids = {"therapistId": other.therapist_id, "prospectUserId": somebody.user_id}
    response = chat.act(person, "create_channel", **ids)
    assert (response.status_code, response.json()["code"]) == (403, NOT_YOURS)
    assert chat.database.execute("SELECT count(*) FROM chat_channels") == before


def test_nobody_creates_a_channel_with_themselves(chat: Chat):
    both = chat.as_therapist(chat.person())
    ids = {"therapistId": both.therapist_id, "prospectUserId": both.user_id}
    assert chat.act(both, "create_channel", **ids).status_code == 403


def test_a_channel_with_nobody_or_an_inactive_person_is_refused(chat: Chat):
    therapist, prospect = chat.therapist(), chat.person()
    gone = chat.person(active=False)
    for person, ids in (
        (therapist, {"therapistId": therapist.therapist_id, "prospectUserId": 2**62}),
        (therapist, {"therapistId": therapist.therapist_id, "prospectUserId": gone.user_id}),
        (prospect, {"therapistId": 2**62, "prospectUserId": prospect.user_id}),
    ):
        response = chat.act(person, "create_channel", **ids)
        assert (response.status_code, response.json()["code"]) == (403, NOT_YOURS)


# One person, two roles


def test_the_role_comes_from_the_channel_and_not_from_the_person(chat: Chat):
    both = chat.as_therapist(chat.person(subscription="canceled"))
    as_therapist = chat.pair(therapist=both)
    as_prospect = chat.pair(prospect=both)

    def code(endpoint: str, pair: Pair) -> str:
        return ask(chat, endpoint, Cast(both, pair)).code

    for endpoint in ("stream", "send", "get_messages", "mark_read", "export"):
        assert code(endpoint, as_therapist) == OK
        assert code(endpoint, as_prospect) == LAPSED
    listed = chat.act(both, "list_channels").json()["channels"]
    assert [row["id"] for row in listed] == [as_therapist.channel_id]

    chat.database.execute(
        "UPDATE users SET subscription_status = 'active' WHERE id = %s", (both.user_id,)
    )
    assert code("send", as_prospect) == OK
    assert code("export", as_prospect) == NOT_FOR_PROSPECTS
    listed = chat.act(both, "list_channels").json()["channels"]
    assert {row["id"] for row in listed} == {as_therapist.channel_id, as_prospect.channel_id}


def test_list_channels_shows_nothing_of_others(chat: Chat):
    mine, others = chat.pair(), chat.pair()
    for person in (mine.therapist, mine.prospect):
        listed = chat.act(person, "list_channels").json()["channels"]
        assert [row["id"] for row in listed] == [mine.channel_id]
    assert others.channel_id != mine.channel_id


# Trials


@pytest.fixture(scope="module")
def with_trials(chat: Chat, services_folder: Path, trial_valkey: EmbeddedValkey) -> Iterator[Chat]:
    with run_chat(
        chat.database,
        trial_valkey.url,
        services_folder,
        SOTTOVOCE_TRIALS="true",
        SOTTOVOCE_SESSION_LEASE_SECONDS="1",
        SOTTOVOCE_ACCESS_CACHE_SECONDS="60",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def trial_valkey(services_folder: Path) -> Iterator[EmbeddedValkey]:
    with own_valkey(services_folder) as server:
        yield server


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_trial_counts_where_trials_are_on(with_trials: Chat, endpoint: str):
    rule = Rule(OK, NOT_FOR_PROSPECTS, OK, OK, OK)
    answer = ask(with_trials, endpoint, cast_as(with_trials, "trialing"))
    assert answer.code == expected(rule, endpoint)


def test_availability_names_the_source_of_a_subscription(chat: Chat, with_trials: Chat):
    def source(of: Chat, kind: str) -> Any:
        return of.get("/api/chat/availability", cast_as(of, kind).person).json()["subscription"]

    assert source(chat, "prospect") == {"active": True, "source": "subscription"}
    assert source(chat, "of an active employer") == {"active": True, "source": "employer"}
    assert source(chat, "trialing") == {"active": False, "source": None}
    assert source(chat, "lapsed") == {"active": False, "source": None}
    assert source(with_trials, "trialing") == {"active": True, "source": "trial"}


# An open stream is looked at again


def assert_ends(events: Events, reason: str, *, reconnect: bool) -> None:
    closing = events.next()
    assert closing.event == "closing"
    assert closing.data == f'{{"reason":"{reason}","reconnect":{str(reconnect).lower()}}}'
    with pytest.raises(EOFError):
        events.next()


def closed_row(chat: Chat, events: Events) -> Any:
    request_id = events.headers["x-request-id"]

    def look() -> Any:
        rows = chat.database.execute(
            "SELECT action, detail, outcome FROM chat_audit WHERE request_id = %s ORDER BY id",
            (request_id,),
        )
        return rows if len(rows) > 1 else None

    return eventually(look)


REVOCATIONS = {
    "the account is deactivated": (
        "UPDATE users SET is_active = false WHERE id = %(user)s",
        "access_revoked",
        INACTIVE,
    ),
    "the subscription ends": (
        "UPDATE users SET subscription_status = 'canceled' WHERE id = %(user)s",
        "subscription_ended",
        LAPSED,
    ),
    "the channel is given to somebody else": (
        "UPDATE chat_channels SET prospect_user_id = %(other)s WHERE id = %(channel)s",
        "access_revoked",
        NOT_YOURS,
    ),
    "the channel is deleted": (
        "DELETE FROM chat_channels WHERE id = %(channel)s",
        "access_revoked",
        NOT_YOURS,
    ),
}


@pytest.mark.parametrize("change", REVOCATIONS)
def test_an_open_stream_ends_when(chat: Chat, change: str):
    query, reason, code = REVOCATIONS[change]
    pair = chat.pair()
    other = chat.person()
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()
        chat.database.execute(
            query,
            {"user": pair.prospect.user_id, "other": other.user_id, "channel": pair.channel_id},
        )
        assert_ends(events, reason, reconnect=False)
    for endpoint in ("stream", "send", "get_messages"):
        answer = ask(chat, endpoint, Cast(pair.prospect, pair))
        assert (answer.status, answer.code) == (403, code)
    assert closed_row(chat, events) == [
        ("stream_opened", None, "ok"),
        ("stream_closed", reason, "ok"),
    ]


def test_an_open_stream_ends_when_its_channel_is_blocked_and_both_can_still_read_it(chat: Chat):
    pair = chat.pair()
    chat.send(pair.therapist, pair.channel_id, "before")
    for person in (pair.prospect, pair.therapist):
        chat.database.execute(
            "UPDATE chat_channels SET status = 'active' WHERE id = %s", (pair.channel_id,)
        )
        with chat.stream(pair.channel_id, person) as events:
            events.connected()
            chat.database.execute(
                "UPDATE chat_channels SET status = 'BLOCKED' WHERE id = %s", (pair.channel_id,)
            )
            assert events.message()["text"] == "before"
            assert_ends(events, "channel_blocked", reconnect=False)
        for endpoint in ("stream", "send"):
            answer = ask(chat, endpoint, Cast(person, pair))
            assert (answer.status, answer.code) == (403, "CHANNEL_BLOCKED")
        assert ask(chat, "get_messages", Cast(person, pair)).status == 200


def test_an_archived_channel_is_shown_and_takes_no_message_but_one_that_it_has(chat: Chat):
    pair = chat.pair()
    client_id = str(uuid.uuid4())
    body = {"channelId": pair.channel_id, "content": "before", "clientMessageId": client_id}

    def send(content: dict[str, Any]) -> httpx.Response:
        return chat.client.post("/api/chat/send", json=content, headers=chat.bearer(pair.prospect))

    first = send(body)
    chat.database.execute(
        "UPDATE chat_channels SET status = 'archived' WHERE id = %s", (pair.channel_id,)
    )
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()
        assert events.message()["text"] == "before"
        refused = send({"channelId": pair.channel_id, "content": "after"})
        assert (refused.status_code, refused.json()["code"]) == (403, "CHANNEL_ARCHIVED")
        assert send(body).json() == first.json()


def test_what_is_sent_after_the_end_of_access_is_not_seen(chat: Chat):
    pair = chat.pair()
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()
        chat.database.execute(
            "UPDATE users SET is_active = false WHERE id = %s", (pair.prospect.user_id,)
        )
        time.sleep(1.2)  # two rounds of looks
        chat.send(pair.therapist, pair.channel_id, "not for them")
        assert_ends(events, "access_revoked", reconnect=False)


def test_a_sponsored_stream_ends_with_the_employer(chat: Chat):
    mill = employer(chat, active=True, sponsors=True)
    pair = chat.pair(prospect=chat.person(subscription=None, employer=mill))
    with chat.stream(pair.channel_id, pair.prospect) as events:
        events.connected()
        chat.database.execute("UPDATE employers SET is_active = false WHERE id = %s", (mill,))
        assert_ends(events, "subscription_ended", reconnect=False)


def test_the_therapists_stream_does_not_depend_on_the_clients_subscription(chat: Chat):
    pair = chat.pair()
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
        chat.database.execute(
            "UPDATE users SET subscription_status = null WHERE id = %s", (pair.prospect.user_id,)
        )
        time.sleep(1.2)
        chat.send(pair.therapist, pair.channel_id, "still there")
        assert events.message()["text"] == "still there"


def test_a_stream_ends_with_its_session_and_the_lease(with_trials: Chat):
    chat = with_trials
    pair = chat.pair()
    token = chat.token(pair.therapist, exp=int(time.time()) + 2)
    began = time.monotonic()
    with Events(
        chat.port, f"/api/chat/{pair.channel_id}", {"authorization": f"Bearer {token}"}
    ) as events:
        events.connected()
        assert_ends(events, "session_ended", reconnect=True)
    assert 0.5 < time.monotonic() - began < WAIT_SECONDS


def test_a_ticket_stream_ends_with_the_session_that_asked_for_it(with_trials: Chat):
    chat = with_trials
    pair = chat.pair()
    token = chat.token(pair.therapist, exp=int(time.time()) + 2)
    headers = {"authorization": f"Bearer {token}"}
    ticket = chat.client.post("/api/chat/ticket", headers=headers).json()["ticket"]
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        assert_ends(events.connected(), "session_ended", reconnect=True)


def test_a_ticket_is_the_person_who_asked_for_it(chat: Chat):
    pair, other = chat.pair(), chat.pair()
    ticket = chat.post("/api/chat/ticket", other.prospect).json()["ticket"]
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        assert (events.status, events.problem()["code"]) == (403, NOT_YOURS)


@pytest.mark.parametrize(
    "endpoint", ["stream", "send", "get_messages", "mark_read", "list_channels", "create_channel"]
)
def test_who_has_just_paid_does_not_wait(with_trials: Chat, endpoint: str):
    """However long the memory of who may do what: refusals are not in it."""
    chat = with_trials
    cast = cast_as(chat, "lapsed")
    assert cast.person is not None
    assert ask(chat, "availability", cast).code == OK
    assert ask(chat, endpoint, cast).code == LAPSED
    chat.database.execute(
        "UPDATE users SET subscription_status = 'active' WHERE id = %s", (cast.person.user_id,)
    )
    assert ask(chat, endpoint, cast).code == OK


def test_what_lets_somebody_in_is_remembered_for_as_long_as_configured(with_trials: Chat):
    chat = with_trials
    cast = cast_as(chat, "prospect")
    assert cast.person is not None
    assert ask(chat, "send", cast).code == OK
    chat.database.execute(
        "UPDATE users SET subscription_status = null WHERE id = %s", (cast.person.user_id,)
    )
    assert ask(chat, "send", cast).code == OK


# The audit trail of what is allowed


def test_every_allowed_action_leaves_its_row(chat: Chat):
    pair = chat.pair()
    third = chat.person()
    with chat.stream(pair.channel_id, pair.therapist) as events:
        events.connected()
    opened = closed_row(chat, events)
    assert [row[0] for row in opened] == ["stream_opened", "stream_closed"]
    ids = {"therapistId": pair.therapist.therapist_id, "prospectUserId": third.user_id}
    body = {"channelId": pair.channel_id, "content": "words"}
    made = chat.act(pair.therapist, "create_channel", **ids)
    for response, action, channel_id in (
        (chat.post("/api/chat/send", pair.therapist, body), "message_sent", pair.channel_id),
        (
            chat.act(pair.therapist, "get_messages", channelId=pair.channel_id),
            "history_read",
            pair.channel_id,
        ),
        (
            chat.get(f"/api/chat/export?channelId={pair.channel_id}", pair.therapist),
            "export",
            pair.channel_id,
        ),
        (made, "channel_created", made.json()["channelId"]),
    ):
        row = chat.audit(response.headers["x-request-id"])
        assert row["action"] == action
        assert row["outcome"] == "ok"
        assert row["actor"] == pair.therapist.clerk_id
        assert row["impersonator"] is None
        assert row["user_id"] == pair.therapist.user_id
        assert row["channel_id"] == channel_id
        assert row["address"] == "127.0.0.1"
        assert row["at"]


def test_an_impersonators_name_is_in_every_row(chat: Chat):
    pair = chat.pair()
    token = chat.token(pair.therapist, act={"sub": "user_admin"})
    headers = {"authorization": f"Bearer {token}"}
    body = {"channelId": pair.channel_id, "content": "words"}
    sent = chat.client.post("/api/chat/send", headers=headers, json=body)
    refused = chat.client.get("/api/chat/export?channelId=99999999", headers=headers)
    ticket = chat.client.post("/api/chat/ticket", headers=headers).json()["ticket"]
    with chat.stream(f"{pair.channel_id}?ticket={ticket}", None) as events:
        events.connected()
    for request_id in (
        sent.headers["x-request-id"],
        refused.headers["x-request-id"],
        events.headers["x-request-id"],
    ):
        row = chat.audit(request_id)
        assert row["impersonator"] == "user_admin"
        assert row["actor"] == pair.therapist.clerk_id
