"""The functions that `sottovoce migrate` makes in the database, written for the tables it finds.

Each is a file in migrations/repeatable, a template whose `@names@` stand for what differs between
layouts: which column holds a message's time, whether times have a zone, how long a preview may be.
A function is made again when its text changes, for another version or another layout. Its comment
holds the digest of our text and of PostgreSQL's copy of it, so that a `chat_people` which a
deployment wrote for itself is recognised, and kept.

Nothing here asks a server.
"""

import hashlib
import re
from functools import cache
from importlib import resources
from typing import NamedTuple

from psycopg import sql

from storage.postgres.catalog import Catalog, Column
from storage.postgres.requirements import identifier_columns, is_own, unread_columns

PREVIEW_LENGTH = 100
"""Characters of the newest message that a list of channels shows, unless the column holds fewer."""

_PLACE = re.compile(r"@(\w+)@")
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class Written(NamedTuple):
    """A function as this layout needs it."""

    name: str
    text: str
    """The CREATE FUNCTION statement."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def written(catalog: Catalog) -> list[Written]:
    """Every function for the tables of a catalog in which our columns are there, or will be."""
    return [Written(name, rendered(catalog, text)) for name, text in _templates().items()]


def rendered(catalog: Catalog, template: str) -> str:
    """A template with its `@names@` filled in for the tables of a catalog."""
    places = _places(catalog)
    return _PLACE.sub(lambda match: places[match[1]], template)


def outdated(catalog: Catalog) -> list[Written]:
    """The functions that are missing or differ from what they should be. A `chat_people` that the
    deployment wrote for itself is none of them."""
    return [
        function
        for function in written(catalog)
        if not (function.name == "chat_people" and is_own(catalog, "chat_people"))
        and not _is_current(catalog, function)
    ]


def installing(catalog: Catalog, function: Written) -> list[str]:
    """The statements that make a function, to be run in one transaction: what PostgreSQL returns
    from it may have changed, which CREATE OR REPLACE refuses."""
    old = catalog.functions.get(function.name)
    # A trigger depends on its function: those are replaced in place, and return what they did.
    in_place = "RETURNS trigger" in function.text
    statements = []
    text = function.text
    if in_place:
        text = text.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)
    elif old is not None:
        statements.append(f"DROP FUNCTION {function.name}({old.arguments})")
    statements.append(text)
    if in_place:
        # It runs with its owner's rights, and would for anybody's table that has it for a trigger.
        statements.append(f"REVOKE ALL ON FUNCTION {function.name}() FROM PUBLIC")
    statements.append(
        f"""DO $do$ BEGIN EXECUTE format('COMMENT ON FUNCTION {function.name} IS %L',
        'Sottovoce {function.digest} ' || (SELECT md5(prosrc) FROM pg_proc
        WHERE oid = '{function.name}'::regproc)); END $do$"""
    )
    return statements


def _is_current(catalog: Catalog, function: Written) -> bool:
    found = catalog.functions.get(function.name)
    return (
        found is not None
        and function.digest in found.comment
        and not is_own(catalog, function.name)
    )


@cache
def _templates() -> dict[str, str]:
    """The files' texts without the comments at their head, by the functions' names."""
    folder = resources.files("storage.postgres").joinpath("migrations", "repeatable")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    found = {file.name.removesuffix(".sql"): file.read_text("utf-8") for file in files}
    # chat_people first: the trigger's function calls it.
    return {name: _COMMENT.sub("", text).strip() for name, text in found.items()}


def _places(catalog: Catalog) -> dict[str, str]:
    """What each `@name@` stands for in this layout."""
    channels = catalog.columns("chat_channels")
    messages = catalog.columns("chat_messages")
    therapists = catalog.columns("therapists")
    therapist_unread, prospect_unread = unread_columns(catalog)
    sent_at = "sent_at" if "sent_at" in messages else "created_at"
    identifiers = identifier_columns(catalog) or ("channel_identifier",)
    more = {sent_at: _in_utc(messages.get(sent_at), "f.stored_at")}
    more.setdefault("created_at", _in_utc(messages.get("created_at"), "f.stored_at"))
    known_id = "NULL::uuid"
    if "chime_message_id" in messages:
        more["chime_message_id"] = "f.message_id::text"
        known_id = f"CASE WHEN row.chime_message_id ~ '{_UUID}' THEN row.chime_message_id::uuid END"
    new_message_id = f"coalesce({known_id}, gen_random_uuid())"
    last_message_at = channels.get("last_message_at")
    schemas = [sql.Identifier(name).as_string() for name in catalog.schemas]
    return {
        # People
        "and_not_deleted": " AND t.deleted_at IS NULL" if "deleted_at" in therapists else "",
        "therapist_name": "t.name::text" if "name" in therapists else "NULL::text",
        "therapist_title": "t.title::text" if "title" in therapists else "NULL::text",
        "sponsored": _sponsored(catalog),
        # Times
        "sent_at": sent_at,
        "now": _in_utc(messages.get(sent_at), "clock_timestamp()"),
        "known_sent_at": _in_utc(messages.get(sent_at), "k.sent_at"),
        "last_message_at": _in_utc(last_message_at, "c.last_message_at"),
        "new_last_message_at": _in_utc(last_message_at, "n.at"),
        "new_updated_at": _in_utc(channels.get("updated_at"), "n.at"),
        "new_sent_at": _in_utc(last_message_at, _in_utc(messages.get(sent_at), f"NEW.{sent_at}")),
        "newest_sent_at": _in_utc(
            last_message_at, _in_utc(messages.get(sent_at), "newest.sent_at")
        ),
        "channel_created_at": _in_utc(
            messages.get(sent_at), _in_utc(channels.get("created_at"), "c.created_at")
        ),
        "created_at": _in_utc(channels.get("created_at"), "now()"),
        "updated_at": _in_utc(channels.get("updated_at"), "now()"),
        # Channels
        "identifier": identifiers[0],
        "identifiers": ", ".join(identifiers),
        "identifier_values": ", ".join(
            _cut(channels.get(name), "of_identifier") for name in identifiers
        ),
        "channel_name": _cut(channels.get("channel_name"), "of_name"),
        "active": _label(channels.get("status"), "active"),
        "preview_length": str(_shorter(PREVIEW_LENGTH, channels.get("last_message_preview"))),
        "therapist_unread": therapist_unread,
        "prospect_unread": prospect_unread,
        "count_unread": "" if therapist_unread.startswith("unread_count") else _COUNT_UNREAD,
        # Messages
        "more_columns": "".join(f", {name}" for name in more),
        "more_values": "".join(f", {value}" for value in more.values()),
        "sent": _label(messages.get("status"), "SENT"),
        "message_type": _label_of(messages.get("message_type"), "f.message_type"),
        "author_email": _given(messages.get("author_email"), "f.author_email"),
        "author_name": _given(messages.get("author_name"), "f.author_name"),
        "their_author_email": _given(messages.get("author_email"), "author.email"),
        "their_author_name": _given(messages.get("author_name"), "author.name"),
        "email_of_p": _cut(messages.get("author_email"), "p.email"),
        "email_of_person": _cut(messages.get("author_email"), "person.email"),
        "new_message_id": new_message_id.replace("row.", "NEW."),
        "old_message_id": new_message_id.replace("row.", "m."),
        "search_path": ", ".join([*schemas, "pg_temp"]),
    }


_COUNT_UNREAD = """,
        therapist_unread = c.therapist_unread
            + coalesce(NEW.sender_id = c.prospect_user_id, false)::integer,
        prospect_unread = c.prospect_unread
            + coalesce(NEW.sender_id = (SELECT t.user_id FROM therapists t
                                        WHERE t.id = c.therapist_id), false)::integer"""


def _sponsored(catalog: Catalog) -> str:
    """Whether somebody else pays for the user `u`: through a group where the main application has
    groups, else through the employer."""
    employers = catalog.columns("employers")
    if {"sponsored_groups", "sponsored_group_members"} <= set(catalog.tables):
        return """EXISTS (
               SELECT FROM sponsored_group_members gm
               JOIN sponsored_groups g ON g.id = gm.group_id
               WHERE gm.user_id = u.id AND gm.is_active AND g.is_active)"""
    if not ({"id", "is_active"} <= set(employers) and "employer_id" in catalog.columns("users")):
        return "false"
    sponsors = (
        " AND coalesce(e.sponsors_chat::boolean, true)" if "sponsors_chat" in employers else ""
    )
    return (
        f"coalesce((SELECT e.is_active{sponsors} FROM employers e "
        "WHERE e.id = u.employer_id), false)"
    )


def _has_zone(column: Column | None) -> bool:
    return column is None or column.type != "timestamp without time zone"


def _in_utc(column: Column | None, expression: str) -> str:
    """Turns the column's time into a timestamptz, or a timestamptz into what the column takes:
    where it has no zone, its times are in UTC, whatever the session's zone is."""
    return expression if _has_zone(column) else f"({expression} AT TIME ZONE 'UTC')"


def _shorter(length: int, column: Column | None) -> int:
    return length if column is None or column.length is None else min(length, column.length)


def _cut(column: Column | None, expression: str) -> str:
    """A text that the column has room for."""
    if column is None or column.length is None:
        return expression
    return f"left({expression}, {column.length})"


def _given(column: Column | None, expression: str) -> str:
    """A text that the column has room for; an empty one is NULL where the column takes that, for a
    column or domain of e-mail addresses may refuse it."""
    text = _cut(column, expression)
    return text if column is not None and column.not_null else f"nullif({text}, '')"


def _label(column: Column | None, word: str) -> str:
    """A word as the column spells it: an enum has its own case."""
    labels = (column.labels if column else None) or []
    found = next((label for label in labels if label.lower() == word.lower()), word)
    return str(sql.Literal(found).as_string())


def _label_of(column: Column | None, expression: str) -> str:
    """The value of an expression as the column spells it."""
    if column is None or not column.labels:
        return expression
    cases = " ".join(
        f"WHEN {sql.Literal(label.upper()).as_string()} THEN {sql.Literal(label).as_string()}"
        for label in column.labels
    )
    return f"(CASE upper({expression}) {cases} END)::{column.type}"
