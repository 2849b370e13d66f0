"""What is needed of the database: the one place that says it.

`sottovoce migrate` asks before it changes anything, `sottovoce doctor` when somebody wants to know,
and every worker for `/readyz`. What does not fit is named by table and column, all of it at once.
Names of tables, columns and functions are no secrets; no value of any row is ever named.

Nothing here asks a server: these are functions of a `Catalog`.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from storage.postgres.catalog import Catalog, Column, Table

OLDEST_VERSION = 130000
"""PostgreSQL 13 is the oldest release with `gen_random_uuid()` built in."""
LONGEST_MESSAGE = 8000
"""Characters that a column for a message's text must hold: SOTTOVOCE_MAX_MESSAGE_CHARACTERS."""

INTEGER = ("smallint", "integer", "bigint")
TEXT = ("text", "character varying", "character", "citext")
TIME = ("timestamp without time zone", "timestamp with time zone")
BOOLEAN = ("boolean",)


class Need(NamedTuple):
    """A column that must be there."""

    table: str
    column: str
    types: tuple[str, ...] | None
    """The types that will do; None: any type that can be written as text, an enum too."""


THEIRS = (
    Need("therapists", "id", INTEGER),
    Need("therapists", "user_id", INTEGER),
    Need("chat_channels", "id", INTEGER),
    Need("chat_channels", "therapist_id", INTEGER),
    Need("chat_channels", "prospect_user_id", INTEGER),
    Need("chat_channels", "status", None),
    Need("chat_channels", "created_at", TIME),
    Need("chat_channels", "updated_at", TIME),
    Need("chat_channels", "last_message_at", TIME),
    Need("chat_messages", "id", INTEGER),
    Need("chat_messages", "channel_id", INTEGER),
    Need("chat_messages", "content", TEXT),
    Need("chat_messages", "created_at", TIME),
)
"""What the servers and the functions use of the main application's tables."""

PEOPLE = (
    Need("users", "id", INTEGER),
    Need("users", "clerk_id", TEXT),
    Need("users", "email", TEXT),
    Need("users", "first_name", TEXT),
    Need("users", "last_name", TEXT),
    Need("users", "is_active", BOOLEAN),
    Need("users", "subscription_status", None),
)
"""What our `chat_people` uses besides; a deployment that has its own needs none of it."""

IDENTIFIERS = ("channel_identifier", "chime_channel_arn")
"""The columns that name a channel for the main application: one of them must be there."""


class Added(NamedTuple):
    """A column that `sottovoce migrate` adds where it is not there yet."""

    types: tuple[str, ...] | None
    """The types that will do where it is there; None: any that can be written as text."""
    definition: str
    """What it is added as: nothing that would write the rows that are there."""


OURS: dict[str, dict[str, Added]] = {
    "chat_channels": {
        "last_seq": Added(("bigint",), "bigint"),
        "last_message_preview": Added(TEXT, "text"),
        "channel_name": Added(TEXT, "text"),
    },
    "chat_messages": {
        "seq": Added(("bigint",), "bigint"),
        "message_id": Added(("uuid",), "uuid"),
        "sender_id": Added(INTEGER, "bigint"),
        "client_message_id": Added(("uuid",), "uuid"),
        "message_type": Added(None, "text NOT NULL DEFAULT 'STANDARD'"),
        "status": Added(None, "text NOT NULL DEFAULT 'SENT'"),
        "author_email": Added(TEXT, "text"),
        "author_name": Added(TEXT, "text"),
        "author_first_name": Added(("text",), "text"),
        "author_last_name": Added(("text",), "text"),
        "is_adopted": Added(("boolean",), "boolean"),
    },
}
"""What `sottovoce migrate` adds to the main application's tables.

sender_id has no foreign key: users.id may be of another integer type, and a message outlives its
author's account. is_adopted is true for a message that the main application stored, NULL for ours.
"""

GIVEN = {
    "chat_channels": {
        *("id", "therapist_id", "prospect_user_id", "status", "created_at", "updated_at"),
        *("last_message_at", *IDENTIFIERS, *OURS["chat_channels"]),
        *("therapist_unread", "prospect_unread"),
    },
    "chat_messages": {
        *("id", "channel_id", "content", "created_at", "sent_at", "chime_message_id"),
        *OURS["chat_messages"],
    },
}
"""The columns that a new row of ours is given a value for."""

UPDATED = ("last_seq", "last_message_at", "updated_at", "last_message_preview")
"""The columns of chat_channels that a message changes, besides the unread counts."""

UNREAD = (
    ("unread_count_therapist", "unread_count_prospect"),
    ("therapist_unread", "prospect_unread"),
)
"""The names that the unread counts may have: the main application's own, else ours."""

OUR_TABLES = {
    "chat_audit": ("select", "insert"),
    "chat_tickets": ("select", "insert", "update", "delete"),
    "chat_epoch": ("select",),
    "chat_migrations": ("select",),
}
"""The tables that are ours alone, and what a serving role does with each."""

FUNCTIONS = (
    *("chat_people", "chat_history", "chat_channel", "chat_create_channel", "chat_mark_read"),
    "chat_append",
)
"""The functions that the servers' statements call."""
TRIGGERS = ("chat_number_message", "chat_count_message")
"""The triggers of chat_messages that number the main application's own messages."""


def unread_columns(catalog: Catalog) -> tuple[str, str]:
    """The columns that count the therapist's and the prospect's unread messages."""
    columns = catalog.columns("chat_channels")
    return next((pair for pair in UNREAD if set(pair) <= set(columns)), UNREAD[-1])


def identifier_columns(catalog: Catalog) -> tuple[str, ...]:
    """The columns of chat_channels that name a channel for the main application."""
    columns = catalog.columns("chat_channels")
    return tuple(name for name in IDENTIFIERS if name in columns)


def unmet_by_tables(catalog: Catalog, *, fresh: bool, adopted: bool, own_people: bool) -> list[str]:
    """What keeps `sottovoce migrate` from taking these tables over, a sentence each.

    Args:
        fresh: nothing of the main application is there; migrate makes all of it.
        adopted: an earlier run has added our columns already.
        own_people: the deployment has a `chat_people` of its own.
    """
    found = [*_server(catalog)]
    if fresh:
        if not catalog.may_create:
            found.append("the role may not create tables: GRANT CREATE ON SCHEMA, or use its owner")
        return found
    found += _columns(catalog, own_people=own_people)
    for name in ("chat_channels", "chat_messages"):
        table = catalog.tables.get(name)
        if table is None:
            continue
        if not table.owned:
            found.append(f"{name} belongs to another role: migrate as its owner")
        found += _unfilled(name, table)
        found += _taken(name, table, adopted=adopted)
    return found


def unmet_by_server(
    catalog: Catalog, *, applied: Collection[int], known: Collection[int]
) -> list[str]:
    """Why a request of the current role could not succeed, a sentence each; none: it would.

    Args:
        applied: the numbers of the migrations that the database has.
        known: the numbers of the migrations that this version has.
    """
    found = [*_server(catalog)]
    if catalog.read_only:
        found.append("the database is read-only: name the primary in DB_HOST")
    if missing := set(known) - set(applied):
        found.append(f"{len(missing)} migrations are missing: run sottovoce migrate")
        return found
    if newer := set(applied) - set(known):
        found.append(
            f"the database was migrated by a newer version (migration {max(newer)}): "
            "update this server"
        )
    absent = [name for name in FUNCTIONS if name not in catalog.functions]
    found += [f"function {name} is missing: run sottovoce migrate" for name in absent]
    found += [
        f"function {name} may not be executed by this role: run sottovoce grants"
        for name in FUNCTIONS
        if name in catalog.functions and not catalog.functions[name].may_execute
    ]
    own_people = is_own(catalog, "chat_people")
    found += _columns(catalog, own_people=own_people)
    for name in ("chat_channels", "chat_messages"):
        found += _unfilled(name, catalog.tables[name]) if name in catalog.tables else []
    for name, added in OURS.items():
        there = catalog.columns(name)
        columns = [*added, *(unread_columns(catalog) if name == "chat_channels" else ())]
        found += [
            f"{name}.{column} is missing: run sottovoce migrate"
            for column in columns
            if there and column not in there
        ]
    for name in OUR_TABLES:
        if name not in catalog.tables:
            found.append(f"{name} is missing: restore it from a backup")
    found += _rights(catalog, own_people=own_people)
    return found


def is_own(catalog: Catalog, function: str) -> bool:
    """Whether a function is there as `sottovoce migrate` did not write it."""
    found = catalog.functions.get(function)
    return found is not None and found.body not in found.comment


def _server(catalog: Catalog) -> Iterator[str]:
    if catalog.encoding != "UTF8":
        yield f"the database is encoded in {catalog.encoding}: it must be UTF8"
    if catalog.version < OLDEST_VERSION:
        yield (
            f"PostgreSQL {catalog.version // 10000} is too old: "
            f"{OLDEST_VERSION // 10000} is the oldest that will do"
        )


def _columns(catalog: Catalog, *, own_people: bool) -> Iterator[str]:
    """What is missing of the main application's tables, or of another type."""
    needs = THEIRS if own_people else (*PEOPLE, *THEIRS)
    chat_is_absent = not {"chat_channels", "chat_messages"} & set(catalog.tables)
    absent: set[str] = set()
    for need in needs:
        if need.table.startswith("chat_") and chat_is_absent:
            continue  # migrate makes both
        if need.table not in catalog.tables:
            if need.table not in absent:
                absent.add(need.table)
                yield f"table {need.table} is missing"
            continue
        column = catalog.columns(need.table).get(need.column)
        if column is None:
            yield f"{need.table}.{need.column} is missing"
        elif need.types and column.type not in need.types:
            yield (
                f"{need.table}.{need.column} is {column.type}: it must be {' or '.join(need.types)}"
            )
    content = catalog.columns("chat_messages").get("content")
    if content and content.length and content.length < LONGEST_MESSAGE:
        yield (
            f"chat_messages.content holds {content.length} characters: "
            f"it must hold {LONGEST_MESSAGE}"
        )
    if "chat_channels" in catalog.tables and not identifier_columns(catalog):
        yield f"chat_channels has no {' and no '.join(IDENTIFIERS)}"
    for name, column_name, label in (
        ("chat_channels", "status", "active"),
        ("chat_messages", "status", "sent"),
        ("chat_messages", "message_type", "standard"),
    ):
        column = catalog.columns(name).get(column_name)
        if column and column.labels and label not in map(str.lower, column.labels):
            yield f"{name}.{column_name} is an enum without {label}: add the label"


def _unfilled(name: str, table: Table) -> Iterator[str]:
    """Columns that a new row of ours would leave empty, and must not."""
    for column_name, column in table.columns.items():
        if column.not_null and not column.filled and column_name not in GIVEN[name]:
            yield (
                f"{name}.{column_name} is not null and has no default: "
                "give it a default, or the chat cannot insert a row"
            )


def _taken(name: str, table: Table, *, adopted: bool) -> Iterator[str]:
    """Columns that have the name of one of ours, and are something else."""
    for column_name, (types, _) in OURS[name].items():
        column: Column | None = table.columns.get(column_name)
        if column is None:
            continue
        if types and column.type not in types:
            yield (
                f"{name}.{column_name} is {column.type}: "
                f"it must be {' or '.join(types)}, or have another name"
            )
        elif column_name in ("seq", "last_seq") and not adopted:
            yield (
                f"{name}.{column_name} is there already, and its numbers may not be 1, 2, 3, …: "
                "drop the column or rename it"
            )


def _rights(catalog: Catalog, *, own_people: bool) -> Iterator[str]:
    """What the current role may not do, and must."""
    for name, rights in OUR_TABLES.items():
        table = catalog.tables.get(name)
        lacking = [right for right in rights if table is not None and not table.may[right]]
        if lacking:
            yield f"no right to {', '.join(lacking)} in {name}: run sottovoce grants"
    for need in THEIRS if own_people else (*PEOPLE, *THEIRS):
        column = catalog.columns(need.table).get(need.column)
        if column is not None and not column.may_select:
            yield f"no right to read {need.table}.{need.column}: run sottovoce grants"
    for name, given in GIVEN.items():
        for column_name, column in catalog.columns(name).items():
            if column_name in given and column_name != "id" and not column.may_insert:
                yield f"no right to insert {name}.{column_name}: run sottovoce grants"
    for column_name in (*UPDATED, *unread_columns(catalog)):
        column = catalog.columns("chat_channels").get(column_name)
        if column is not None and not column.may_update:
            yield f"no right to update chat_channels.{column_name}: run sottovoce grants"
