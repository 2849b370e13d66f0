"""Stores on a test's own database, the people in it, and their messages."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from protocol.confidential import Secret
from storage.contract import Draft, Origin, Record, User
from storage.store import Store, StoreConfig, open_store
from tests.support.services import Database

ORIGIN = Origin(
    actor="user_actor",
    impersonator=None,
    user_id=1,
    address="203.0.113.9",
    request_id="request-1",
)
NOWHERE = "redis://127.0.0.1:1/0"
"""Nobody listens on port 1."""


class Room(NamedTuple):
    """A channel and its two people."""

    channel_id: int
    therapist: User
    prospect: User


class Opened(NamedTuple):
    store: Store
    delivered: list[tuple[int, Record]]
    """(channel id, record), as the store handed them out."""


@asynccontextmanager
async def opened_store(
    database: Database, redis_url: str = NOWHERE, *, conninfo: Any = None, **options: Any
) -> AsyncIterator[Opened]:
    delivered: list[tuple[int, Record]] = []
    config = StoreConfig(
        conninfo=conninfo or database.conninfo,
        redis_url=Secret(redis_url),
        history_size=50,
        history_ttl_seconds=3600,
        seconds=3.0,
        connections=3,
    )._replace(**options)
    async with open_store(config, deliver=delivered.extend) as store:
        yield Opened(store, delivered)


def user(user_id: int, name: str, *, therapist_id: int | None = None) -> User:
    return User(
        id=user_id,
        clerk_id=f"clerk_{name}",
        email=f"{name}@example.com",
        first_name=name.title(),
        last_name="Smith",
        is_active=True,
        subscription_status="active",
        sponsored=False,
        therapist_id=therapist_id,
    )


def make_rooms(database: Database, count: int = 1) -> list[Room]:
    """Channels of one therapist, each with a prospect of its own."""
    insert = (
        "INSERT INTO users (clerk_id, email, first_name, last_name, subscription_status)"
        " VALUES (%s, %s, %s, 'Smith', 'active') RETURNING id"
    )

    def person(name: str) -> int:
        values = (f"clerk_{name}", f"{name}@example.com", name.title())
        return int(database.execute(insert, values)[0][0])

    therapist_user = person("tess")
    ((therapist_id,),) = database.execute(
        "INSERT INTO therapists (user_id, name, title) VALUES (%s, 'Dr Tess', 'PhD') RETURNING id",
        (therapist_user,),
    )
    rooms: list[Room] = []
    for number in range(count):
        prospect = person(f"pat{number}")
        ((channel_id,),) = database.execute(
            "INSERT INTO chat_channels (channel_identifier, therapist_id, prospect_user_id)"
            " VALUES (%s, %s, %s) RETURNING id",
            (f"channel-{number}", therapist_id, prospect),
        )
        rooms.append(
            Room(
                channel_id,
                user(therapist_user, "tess", therapist_id=therapist_id),
                user(prospect, f"pat{number}"),
            )
        )
    return rooms


def make_channels(database: Database, count: int, *, messages: int) -> list[tuple[str, int]]:
    """(clerk id, channel id) of as many prospects of one therapist, with so many messages each."""
    database.execute(f"""
        INSERT INTO users (clerk_id, email, first_name, last_name, subscription_status)
        SELECT 'user_' || n, 'p' || n || '@example.com', 'Pat', 'Smith', 'active'
        FROM generate_series(0, {count}) AS n;
        INSERT INTO therapists (user_id, name, title)
        SELECT id, 'Dr Tess', 'PhD' FROM users WHERE clerk_id = 'user_0';
        INSERT INTO chat_channels
            (channel_identifier, therapist_id, prospect_user_id, last_seq)
        SELECT 'channel-' || u.id, t.id, u.id, {messages}
        FROM users u, therapists t WHERE u.clerk_id <> 'user_0';
        INSERT INTO chat_messages (channel_id, seq, message_id, sender_id, author_email,
            author_name, content, message_type, status, created_at)
        SELECT c.id, n, gen_random_uuid(), c.prospect_user_id, 'pat@example.com', 'Pat Smith',
            'text ' || n, 'STANDARD', 'SENT', now() + n * interval '1 ms'
        FROM chat_channels c, generate_series(1, {messages}) AS n;
        ANALYZE;
    """)
    return database.execute(
        "SELECT u.clerk_id, c.id FROM chat_channels c JOIN users u ON u.id = c.prospect_user_id"
    )


def draft(
    room: Room,
    content: str,
    *,
    by_therapist: bool = False,
    client_id: str | None = None,
    message_id: str | None = None,
) -> Draft:
    return Draft(
        channel_id=room.channel_id,
        message_id=message_id or str(uuid.uuid4()),
        client_message_id=client_id,
        sender=room.therapist if by_therapist else room.prospect,
        by_therapist=by_therapist,
        content=content,
        message_type="STANDARD",
        origin=ORIGIN,
    )


def stored(database: Database, channel_id: int) -> list[tuple[int, str]]:
    """(number, text) of each message of a channel, as the database has them."""
    return database.execute(
        "SELECT seq, content FROM chat_messages WHERE channel_id = %s ORDER BY seq", (channel_id,)
    )


def insert_messages(database: Database, room: Room, count: int) -> None:
    """Messages 1..count of an empty channel, as another process would have stored them."""
    database.execute(
        "INSERT INTO chat_messages (channel_id, seq, message_id, sender_id, author_email,"
        " author_name, content, message_type, status, created_at)"
        " SELECT %s, n, gen_random_uuid(), %s, 'pat0@example.com', 'Pat0 Smith', 'text ' || n,"
        " 'STANDARD', 'SENT', now() - interval '1 day' + n * interval '1 second'"
        " FROM generate_series(1, %s) AS n",
        (room.channel_id, room.prospect.id, count),
    )
    database.execute(
        "UPDATE chat_channels SET last_seq = %s WHERE id = %s", (count, room.channel_id)
    )
