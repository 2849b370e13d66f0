"""The epoch that PostgreSQL holds: which past the messages' numbers belong to.

Blocking, with psycopg's plain connection, for a command. The servers are told it by each `ping`
and name it in each `append`.
"""

import time
from typing import Any, NamedTuple

import psycopg

from storage.postgres.migrate import CONNECT_SECONDS
from storage.postgres.unreachable import why_unreachable

# For the transaction alone: a pooler gives the session to somebody else.
_LIMITS = "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = '20s'"

# A send has read the epoch and so holds a lock on its table until it is committed: those under way
# are waited for, and those that come find the new epoch.
_LOCK = "LOCK TABLE chat_epoch IN ACCESS EXCLUSIVE MODE"

# The clock, for the number alone says nothing: two restores of one backup both find the same old
# one, and clients and Redis still hold the epoch that followed it the first time.
_BEGIN = """
WITH old AS (SELECT epoch FROM chat_epoch)
UPDATE chat_epoch
SET epoch = greatest(old.epoch + 1, floor(extract(epoch FROM clock_timestamp()))::bigint)
FROM old RETURNING old.epoch, chat_epoch.epoch
"""


SETTLE_SECONDS = 1.0
"""After it began: then its number is in the past, whatever it was made of, and the next one, which
may follow a restore that forgets this one, is higher."""


class EpochError(Exception):
    """The epoch is as it was. The text says why, and holds nothing of the connection."""


class Begun(NamedTuple):
    old: int
    new: int
    """Seconds since 1970 when it began, or one more than `old`, whichever is more."""


def begin_epoch(conninfo: str | dict[str, Any]) -> Begun:
    """Begin a new epoch, in one transaction; at most 36 seconds, nearly always one.

    Args:
        conninfo: libpq's string, or its keywords.

    Raises:
        EpochError
    """
    keywords: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "prepare_threshold": None}
    text = conninfo if isinstance(conninfo, str) else ""
    if not isinstance(conninfo, str):
        keywords |= conninfo
    connection: psycopg.Connection | None = None
    try:
        with psycopg.connect(text, **keywords) as connection:
            connection.execute(_LIMITS)
            connection.execute(_LOCK)
            row = connection.execute(_BEGIN).fetchone()
    except psycopg.errors.UndefinedTable:
        raise EpochError("there is no epoch in it yet: run sottovoce migrate first") from None
    except psycopg.errors.LockNotAvailable:
        raise EpochError("a statement holds the epoch for over ten seconds: try again") from None
    except psycopg.Error as error:
        if connection is None or error.sqlstate is None:
            raise EpochError(str(why_unreachable(error))) from None
        raise EpochError(f"the database refuses (SQLSTATE {error.sqlstate})") from None
    if row is None:
        raise EpochError("chat_epoch has lost its row: INSERT INTO chat_epoch VALUES (0)")
    time.sleep(SETTLE_SECONDS)
    return Begun(*row)
