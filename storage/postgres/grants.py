"""The rights of the two roles that a deployment has: one that migrates, one that serves.

The role that migrates owns what is Sottovoce's, the audit trail's triggers included, and may alter
the main application's two tables. The role that serves has the least that `requirements` names: it
cannot change or delete what it has audited, and creates nothing.

What is printed is SQL for an administrator to read and run. It depends on the tables that are
there, so it is made from the database's catalog.
"""

from typing import Any

import msgspec
from psycopg import sql

from storage.postgres.catalog import Catalog
from storage.postgres.migrate import connected, explained, read_catalog
from storage.postgres.queries import QUERIES
from storage.postgres.requirements import (
    FUNCTIONS,
    GIVEN,
    OUR_TABLES,
    OURS,
    PEOPLE,
    THEIRS,
    UPDATED,
    identifier_columns,
    is_own,
    unread_columns,
)

_MAIN_TABLES = ("users", "therapists", "chat_channels", "chat_messages")
"""The tables that `sottovoce migrate` indexes, alters or reads as their owner."""
_READ = {
    "users": ("employer_id",),
    "therapists": ("name", "title", "deleted_at"),
    "chat_messages": ("sent_at",),
}
"""Columns that are read where they are there, besides those that must be."""
_SPONSORS = {
    "employers": ("id", "is_active", "sponsors_chat"),
    "sponsored_groups": ("id", "is_active"),
    "sponsored_group_members": ("user_id", "group_id", "is_active"),
}
"""Columns that `chat_people` reads of the tables that say who pays for somebody."""


class Holders(msgspec.Struct, frozen=True, kw_only=True):
    """What the statement `holders` says: who owns what, and which roles there are."""

    database: str
    schema: str
    owners: dict[str, str]
    """The owner of each table of the main application that is there."""
    superusers: list[str]
    roles: list[str]
    sequences: list[str]
    """The sequences that number new channels and messages, as SQL takes their names."""
    triggers: list[str]
    """The functions of the main application's triggers on channels and messages that run with the
    rights of whoever writes a row."""


def grants(conninfo: str | dict[str, Any], *, owner: str, server: str) -> list[str]:
    """The SQL for both roles: comments and statements, a line each.

    Args:
        conninfo: libpq's string, or its keywords. Any role that may connect will do.
        owner: the name of the role that migrates.
        server: the name of the role that serves.

    Raises:
        MigrationError: the database does not answer or refuses.
    """
    with connected(conninfo) as connection:
        catalog = read_catalog(connection)
        with explained("the owners cannot be looked up"):
            row = connection.execute(QUERIES["holders"].decode()).fetchone()
    assert row is not None
    holders = msgspec.json.decode(row[0], type=Holders)
    lines = _to_owner(holders, owner)
    if set(OUR_TABLES) <= set(catalog.tables) and set(FUNCTIONS) <= set(catalog.functions):
        return [*lines, "", *_to_server(catalog, holders, server)]
    return [
        *lines,
        "",
        "-- The role that serves: migrate first, then run `sottovoce grants` again for its rights.",
    ]


def _to_owner(holders: Holders, role: str) -> list[str]:
    to = _name(role)
    lines = [
        "-- The role that migrates. It owns what is Sottovoce's; to alter a table of the main",
        "-- application it must be a member of the role that owns it.",
        *_created(holders, role),
        f"GRANT CONNECT ON DATABASE {_name(holders.database)} TO {to};",
        f"GRANT USAGE, CREATE ON SCHEMA {_name(holders.schema)} TO {to};",
    ]
    for owner in sorted({holders.owners[name] for name in _MAIN_TABLES if name in holders.owners}):
        if owner in holders.superusers:
            lines.append(
                f"-- The superuser {_name(owner)} owns tables of the main application: give them "
                "to a role of their own first."
            )
        elif owner != role:
            lines.append(f"GRANT {_name(owner)} TO {to};")
    return lines


def _to_server(catalog: Catalog, holders: Holders, role: str) -> list[str]:
    to = _name(role)
    lines = [
        "-- The role that serves. Run these as the role that migrates or as a superuser, and again",
        "-- after each `sottovoce migrate` that applied something.",
        *_created(holders, role),
        f"GRANT CONNECT ON DATABASE {_name(holders.database)} TO {to};",
        f"GRANT USAGE ON SCHEMA {_name(holders.schema)} TO {to};",
    ]
    for table, columns in _columns_read(catalog).items():
        lines.append(f"GRANT SELECT ({_names(columns)}) ON {_name(table)} TO {to};")
    for table, given in GIVEN.items():
        columns = [name for name in catalog.columns(table) if name in given and name != "id"]
        lines.append(f"GRANT INSERT ({_names(columns)}) ON {_name(table)} TO {to};")
    updated = [*UPDATED, *unread_columns(catalog)]
    lines.append(f"GRANT UPDATE ({_names(updated)}) ON chat_channels TO {to};")
    lines += [f"GRANT USAGE ON SEQUENCE {sequence} TO {to};" for sequence in holders.sequences]
    for table, rights in OUR_TABLES.items():
        lines.append(f"GRANT {', '.join(rights).upper()} ON {_name(table)} TO {to};")
    called = [f"{name}({catalog.functions[name].arguments})" for name in FUNCTIONS]
    lines.append(f"GRANT EXECUTE ON FUNCTION {', '.join(called)} TO {to};")
    if is_own(catalog, "chat_people"):
        lines.append(
            "-- chat_people is your own: grant SELECT on what it reads besides, or make it "
            "SECURITY DEFINER."
        )
    if holders.triggers:
        lines += [
            "-- Triggers of the main application run these functions with the rights of the role",
            "-- that serves. Grant what they need besides, or make them SECURITY DEFINER with a",
            "-- fixed search_path:",
            *(f"--   {function}" for function in holders.triggers),
        ]
    if catalog.version < 150000:
        lines.append(
            "-- PostgreSQL 14 and older let every role create tables in the schema public: "
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC;"
        )
    return lines


def _columns_read(catalog: Catalog) -> dict[str, list[str]]:
    """The columns of the main application's tables that a serving role reads, by table."""
    wanted: dict[str, set[str]] = {table: set(columns) for table, columns in _READ.items()}
    for need in (*PEOPLE, *THEIRS):
        wanted.setdefault(need.table, set()).add(need.column)
    for table, added in OURS.items():
        wanted[table] |= set(added)
    wanted["chat_channels"] |= {*identifier_columns(catalog), *unread_columns(catalog)}
    grouped = "sponsored_groups" in catalog.tables and "sponsored_group_members" in catalog.tables
    for table, columns in _SPONSORS.items():
        if (table == "employers") != grouped:
            wanted[table] = set(columns)
    found = {
        table: [name for name in catalog.columns(table) if name in columns]
        for table, columns in wanted.items()
    }
    return {table: columns for table, columns in found.items() if columns}


def _created(holders: Holders, role: str) -> list[str]:
    if role in holders.roles:
        return []
    return [f"CREATE ROLE {_name(role)} LOGIN;  -- and give it a password: \\password {role}"]


def _name(name: str) -> str:
    return sql.Identifier(name).as_string()


def _names(names: list[str]) -> str:
    return ", ".join(map(_name, names))
