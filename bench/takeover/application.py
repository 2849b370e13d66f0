"""The main application's own chat, as its ORM writes and reads it: whom Sottovoce takes over from.

It knows nothing of us. Its inserts name no number, no message id and, in the application's layout,
no author; what it reads and the order that it reads in are its own columns. Plain and blocking:
one object is one connection of its pool, for one thread.
"""

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg

PREVIEW = 100
"""Characters of a message that the application keeps with its channel."""

_numbers = itertools.count(1)


class Member(NamedTuple):
    """One of a channel's two people, as the application knows them."""

    user_id: int
    email: str
    name: str


class Channel(NamedTuple):
    id: int
    therapist: Member
    prospect: Member


class Sent(NamedTuple):
    """A line of the application's own ledger: a message whose INSERT was committed."""

    channel_id: int
    row_id: int
    by_therapist: bool
    text: str
    at: float
    """When that was known; of `time.monotonic`."""


class Shown(NamedTuple):
    """A message as the application's pages show it."""

    row_id: int
    text: str
    author: str | int
    """An e-mail address, or a user's id."""
    status: str | None
    external_id: str | None


class Statements(NamedTuple):
    """What one layout's ORM sends."""

    insert: str
    bump: tuple[str, str]
    """Behind a message of the prospect, and of the therapist."""
    read: str
    mark_read: tuple[tuple[str, ...], tuple[str, ...]]
    """By the prospect, and by the therapist."""
    channels: str
    in_transaction: bool
    """Whether a message and its channel are written in one transaction."""


_BUMP = (
    "UPDATE chat_channels SET last_message_at = %(at)s, last_message_preview = %(preview)s,"
    " {0} = {0} + 1, updated_at = %(at)s WHERE id = %(channel_id)s"
)
_MARK = (
    (
        "UPDATE chat_messages SET read_by_{0}_at = %(at)s WHERE channel_id = %(channel_id)s"
        " AND sender_id <> %(user_id)s AND read_by_{0}_at IS NULL"
    ),
    "UPDATE chat_channels SET unread_count_{0} = 0, updated_at = %(at)s WHERE id = %(channel_id)s",
)

LAYOUTS: Mapping[str, Statements] = {
    "guide": Statements(
        insert=(
            "INSERT INTO chat_messages (channel_id, author_email, author_name, content)"
            " VALUES (%(channel_id)s, %(email)s, %(name)s, %(text)s)"
            " RETURNING id, channel_id, author_email, author_name, content, created_at"
        ),
        bump=(
            (
                "UPDATE chat_channels SET last_message_at = NOW(), updated_at = NOW()"
                " WHERE id = %(channel_id)s"
            ),
        )
        * 2,
        read=(
            "SELECT id, content, author_email, NULL, NULL FROM chat_messages"
            " WHERE channel_id = %s ORDER BY created_at DESC, id DESC LIMIT %s"
        ),
        mark_read=((), ()),
        channels="SELECT id, status, last_message_at, NULL, NULL FROM chat_channels WHERE id = %s",
        in_transaction=False,
    ),
    "application": Statements(
        insert=(
            "INSERT INTO chat_messages (channel_id, chime_message_id, sender_id, content,"
            " message_type, status, metadata, sent_at, created_at)"
            " VALUES (%(channel_id)s, %(external_id)s, %(user_id)s, %(text)s, 'STANDARD', 'sent',"
            " NULL, %(at)s, %(at)s)"
            " RETURNING id, channel_id, chime_message_id, sender_id, content, message_type, status,"
            " read_by_therapist_at, read_by_prospect_at, metadata, sent_at, created_at"
        ),
        bump=(_BUMP.format("unread_count_therapist"), _BUMP.format("unread_count_prospect")),
        read=(
            "SELECT id, content, sender_id, status::text, chime_message_id FROM chat_messages"
            " WHERE channel_id = %s ORDER BY sent_at DESC, id DESC LIMIT %s"
        ),
        mark_read=(
            tuple(text.format("prospect") for text in _MARK),
            tuple(text.format("therapist") for text in _MARK),
        ),
        channels=(
            "SELECT id, status::text, last_message_at, unread_count_therapist,"
            " unread_count_prospect FROM chat_channels WHERE id = %s"
        ),
        in_transaction=True,
    ),
}


class OldApplication:
    """One connection of the main application.

    Args:
        conninfo: libpq's keywords.
        layout: `guide` or `application`.

    Attributes:
        ledger: what it has stored, in the order in which it did.
        seconds: how long each statement took, those that PostgreSQL refused included.
    """

    def __init__(self, conninfo: Mapping[str, Any], layout: str) -> None:
        self.ledger: list[Sent] = []
        self.seconds: list[float] = []
        self._statements = LAYOUTS[layout]
        self._connection = psycopg.connect(**conninfo, autocommit=True)

    @property
    def backend_pid(self) -> int:
        """PostgreSQL's process for this connection."""
        return self._connection.info.backend_pid

    def transaction(self) -> AbstractContextManager[psycopg.Transaction]:
        """Hold what is written within the block in one transaction."""
        return self._connection.transaction()

    def close(self) -> None:
        self._connection.close()

    def send(self, channel: Channel, text: str, *, by_therapist: bool) -> Sent:
        """Store a message, and say so in its channel."""
        author = channel.therapist if by_therapist else channel.prospect
        values = {
            "channel_id": channel.id,
            "user_id": author.user_id,
            "email": author.email,
            "name": author.name,
            "text": text,
            "preview": text[:PREVIEW],
            "external_id": f"chime-{next(_numbers)}-{uuid.uuid4()}",
            "at": _now(),
        }
        if self._statements.in_transaction:
            with self.transaction():
                row_id = self._store(values, by_therapist=by_therapist)
        else:
            row_id = self._store(values, by_therapist=by_therapist)
        sent = Sent(channel.id, row_id, by_therapist, text, time.monotonic())
        self.ledger.append(sent)
        return sent

    def delete(self, sent: Sent) -> None:
        """Delete a message for good, as a moderator would."""
        self._execute("DELETE FROM chat_messages WHERE id = %s", (sent.row_id,))
        self.ledger.remove(sent)

    def read(self, channel_id: int, count: int) -> list[Shown]:
        """The newest messages of a channel as its page shows them, oldest first."""
        rows = self._execute(self._statements.read, (channel_id, count))
        return [Shown(*row) for row in reversed(rows)]

    def mark_read(self, channel: Channel, *, by_therapist: bool) -> None:
        """Note that one of the two has read everything; a layout without such columns does not."""
        reader = channel.therapist if by_therapist else channel.prospect
        values = {"channel_id": channel.id, "user_id": reader.user_id, "at": _now()}
        for statement in self._statements.mark_read[by_therapist]:
            self._execute(statement, values)

    def unread(self, channel_id: int) -> tuple[int, int] | None:
        """(the therapist's, the prospect's) unread messages; None where the layout counts none."""
        (row,) = self._execute(self._statements.channels, (channel_id,))
        return None if row[3] is None else (row[3], row[4])

    def touch(self, channel_id: int) -> None:
        """Update a channel, and nothing of what is said in it."""
        self._execute(
            "UPDATE chat_channels SET updated_at = %s WHERE id = %s", (_now(), channel_id)
        )

    def _store(self, values: Mapping[str, Any], *, by_therapist: bool) -> int:
        (row,) = self._execute(self._statements.insert, values)
        self._execute(self._statements.bump[by_therapist], values)
        return int(row[0])

    def _execute(
        self, statement: str, values: Mapping[str, Any] | Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        began = time.monotonic()
        try:
            cursor = self._connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []
        finally:
            self.seconds.append(time.monotonic() - began)


def _now() -> datetime:
    """`new Date()`: UTC without a zone, in milliseconds."""
    now = datetime.now(UTC).replace(tzinfo=None)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)
