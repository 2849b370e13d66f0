"""What a database says of itself: the tables, columns and functions that we use, as the statement
`catalog` reads them, and what the current role may do with them.

Nothing here asks a server or judges what it said; `requirements` judges.
"""

import msgspec


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A column; of a domain, its base type."""

    type: str
    """The type as `format_type` writes it, without its length: `character varying`."""
    length: int | None
    """The most characters of a varchar or char, or None."""
    labels: list[str] | None
    """The labels of an enum, in their order."""
    not_null: bool
    filled: bool
    """Whether it has a default, is an identity, or is generated."""
    may_select: bool
    may_insert: bool
    may_update: bool


class Index(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    """The name as SQL takes it: qualified and quoted where it must be."""
    unique: bool
    valid: bool
    """Whether it is complete: CREATE INDEX CONCURRENTLY leaves an invalid one when it fails."""
    partial: bool
    columns: list[str]
    """The key columns in their order; expressions are left out."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    owned: bool
    """Whether the current role owns it, and so may alter it."""
    may: dict[str, bool]
    """The current role's privileges on the whole table: select, insert, update, delete."""
    columns: dict[str, Column]
    indexes: list[Index]
    triggers: list[str]
    """The names of the triggers that fire."""

    def has_index(self, *columns: str, unique: bool = False) -> bool:
        """Whether a complete index begins with these columns.

        Args:
            columns: in the index's order.
            unique: whether it must hold these columns alone, and each combination once.
        """
        wanted = list(columns)
        return any(
            index.valid
            and not index.partial
            and (
                index.unique and index.columns == wanted
                if unique
                else index.columns[: len(wanted)] == wanted
            )
            for index in self.indexes
        )


class Function(msgspec.Struct, frozen=True, kw_only=True):
    comment: str
    body: str
    """The MD5 of its text, as PostgreSQL keeps it."""
    owned: bool
    arguments: str
    """The types that tell it from others of its name, as DROP FUNCTION takes them."""
    may_execute: bool


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """What one database says of itself."""

    encoding: str
    version: int
    """PostgreSQL's version: 150018 is 15.18."""
    read_only: bool
    """Whether it takes no writes: a standby, or a database that was set so."""
    schemas: list[str]
    """The schemas of the search path that exist, in their order."""
    may_create: bool
    """Whether the current role may create tables in the first of them."""
    tables: dict[str, Table]
    """The tables that are there, by the names that we know them by."""
    functions: dict[str, Function]

    def columns(self, table: str) -> dict[str, Column]:
        """The columns of a table; none where it is absent."""
        found = self.tables.get(table)
        return found.columns if found else {}


decode_catalog = msgspec.json.Decoder(Catalog).decode
"""Turns the one value of the statement `catalog` into a `Catalog`."""
