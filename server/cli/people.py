"""The people of a dev database: four to try things with, and pairs by the thousand for load."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

from storage.postgres.migrate import CONNECT_SECONDS

PEOPLE = ("therapist", "prospect", "outsider", "lapsed")

# One row per person who plays a part; played again at each start, whatever was changed.
_SEED_USERS = """
INSERT INTO users (clerk_id, email, first_name, last_name, role, is_active, subscription_status)
VALUES
    ('user_dev_therapist', 'therapist@example.com', 'Thea', 'Hart', 'therapist', true, NULL),
    ('user_dev_prospect', 'prospect@example.com', 'Pat', 'Lowe', 'prospect', true, 'active'),
    ('user_dev_outsider', 'outsider@example.com', 'Otis', 'Reed', 'prospect', true, 'active'),
    ('user_dev_lapsed', 'lapsed@example.com', 'Lana', 'Moss', 'prospect', true, 'canceled')
ON CONFLICT (clerk_id) DO UPDATE SET
    is_active = true, employer_id = NULL, subscription_status = excluded.subscription_status
"""

_SEED_THERAPIST = """
INSERT INTO therapists (user_id, name, title)
SELECT id, 'Thea Hart', 'LMFT' FROM users
WHERE clerk_id = 'user_dev_therapist'
    AND NOT EXISTS (SELECT FROM therapists WHERE user_id = users.id)
"""

_SEED_CHANNELS = """
INSERT INTO chat_channels (channel_identifier, therapist_id, prospect_user_id)
SELECT 'dev-' || prospect.clerk_id, therapist.id, prospect.id
FROM users AS prospect, therapists AS therapist
JOIN users AS colleague ON colleague.id = therapist.user_id
WHERE prospect.clerk_id IN ('user_dev_prospect', 'user_dev_lapsed')
    AND colleague.clerk_id = 'user_dev_therapist'
ON CONFLICT (therapist_id, prospect_user_id) DO NOTHING
"""

_SEEDED = """
SELECT users.clerk_id, users.id, email, chat_channels.id
FROM users LEFT JOIN chat_channels ON prospect_user_id = users.id
WHERE clerk_id LIKE 'user\\_dev\\_%'
ORDER BY chat_channels.id DESC
"""

_SEED_PAIRS = """
WITH numbers AS (
    SELECT n FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
),
therapist_users AS (
    INSERT INTO users (clerk_id, email, first_name, last_name, role, is_active)
    SELECT 'user_load_t' || n, 'therapist' || n || '@example.com', 'Therapist', n::text,
        'therapist', true
    FROM numbers RETURNING id, substr(clerk_id, 12)::bigint AS n
),
prospects AS (
    INSERT INTO users
        (clerk_id, email, first_name, last_name, role, is_active, subscription_status)
    SELECT 'user_load_p' || n, 'client' || n || '@example.com', 'Client', n::text,
        'prospect', true, 'active'
    FROM numbers RETURNING id, substr(clerk_id, 12)::bigint AS n
),
colleagues AS (
    INSERT INTO therapists (user_id, name, title)
    SELECT id, 'Therapist ' || n, 'LMFT' FROM therapist_users RETURNING id, user_id
)
INSERT INTO chat_channels (channel_identifier, therapist_id, prospect_user_id)
SELECT 'load-' || n, colleagues.id, prospects.id
FROM therapist_users
JOIN colleagues ON colleagues.user_id = therapist_users.id
JOIN prospects USING (n)
RETURNING substr(channel_identifier, 6)::bigint, id
"""


class Seeded(NamedTuple):
    user_id: int
    email: str
    channel_id: int | None
    """Where they are the prospect."""


class Pair(NamedTuple):
    channel_id: int
    therapist: str
    """Clerk id."""
    prospect: str
    """Clerk id."""


def clerk_id_of(person: str) -> str:
    """`therapist` is a part that somebody plays; anything else is a Clerk id already."""
    return f"user_dev_{person}" if person in PEOPLE else person


def seed_people(conninfo: dict[str, Any]) -> dict[str, Seeded]:
    """Make the four, or find them as they were left. The database is migrated.

    Raises:
        psycopg.Error
    """
    with psycopg.connect(**conninfo, connect_timeout=CONNECT_SECONDS) as connection:
        for statement in (_SEED_USERS, _SEED_THERAPIST, _SEED_CHANNELS):
            connection.execute(statement)
        rows = connection.execute(_SEEDED).fetchall()
    found = {clerk_id: Seeded(*rest) for clerk_id, *rest in rows}
    return {person: found[clerk_id_of(person)] for person in PEOPLE}


def seed_pairs(url: str, count: int) -> Iterator[Pair]:
    """Make new pairs, each of a therapist and a client with a channel.

    Raises:
        psycopg.Error
    """
    with psycopg.connect(url, connect_timeout=CONNECT_SECONDS) as connection:
        # Two seeds at once must not take the same numbers.
        connection.execute("LOCK TABLE users IN SHARE ROW EXCLUSIVE MODE")
        row = connection.execute(
            "SELECT coalesce(max(substr(clerk_id, 12)::bigint), 0) FROM users"
            " WHERE clerk_id LIKE 'user\\_load\\_t%'"
        ).fetchone()
        assert row is not None
        numbers = {"first": row[0] + 1, "last": row[0] + count}
        rows = connection.execute(_SEED_PAIRS, numbers).fetchall()
    with psycopg.connect(url, connect_timeout=CONNECT_SECONDS, autocommit=True) as connection:
        # The server's plans must know that the tables have grown.
        connection.execute("ANALYZE users, therapists, chat_channels")
    for number, channel_id in sorted(rows):
        yield Pair(channel_id, f"user_load_t{number}", f"user_load_p{number}")
