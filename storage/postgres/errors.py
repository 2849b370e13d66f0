"""To what an error of PostgreSQL belongs: the statement, the session, the connection, the server.

One table, which the pool obeys before it puts a connection back. Nothing here awaits or logs.
"""

from enum import Enum, auto

import psycopg


class Belongs(Enum):
    """What is at fault, and so what a repetition is good for."""

    STATEMENT = auto()
    """PostgreSQL refused what it was asked, and always will: a defect of ours, or data that does
    not fit. The connection is good."""
    CONTENTION = auto()
    """Somebody else was in the way. The connection and the server are good; a later try is too."""
    SESSION = auto()
    """The session has outdated state: a plan made before somebody's ALTER TABLE, a prepared
    statement that a pooler gave to another client. A new connection has none of it, so the
    statement is repeated on one. Where that fails alike, it is the statement's own fault."""
    CONNECTION = auto()
    """The connection broke, was ended, or leads to a server that is not the primary any more. The
    statement is repeated on a new one. Where that fails alike, it is the server's fault."""
    SERVER = auto()
    """The server cannot serve at the moment. The connection is as good as a new one."""


SQLSTATES: dict[str, Belongs] = {
    "08": Belongs.CONNECTION,  # connection exception; all that PgBouncer itself says is 08P01
    "0A000": Belongs.SESSION,  # "cached plan must not change result type"
    "25": Belongs.SESSION,  # in a transaction that is not ours: a pooler's client left it open
    "25006": Belongs.CONNECTION,  # read-only transaction: the primary was demoted
    "25P03": Belongs.CONNECTION,  # idle_in_transaction_session_timeout has ended the session
    "25P04": Belongs.CONNECTION,  # transaction_timeout has
    "26000": Belongs.SESSION,  # the prepared statement is not there (any more)
    "28": Belongs.SERVER,  # a pooler's login was refused; ours fails before any statement
    "3D000": Belongs.SERVER,  # no such database, as a pooler says it
    "40": Belongs.CONTENTION,  # deadlock, serialization failure
    "42P05": Belongs.SESSION,  # the prepared statement is there already
    "53": Belongs.SERVER,  # out of memory, disk or connections
    "55P03": Belongs.CONTENTION,  # lock not available
    "57": Belongs.CONNECTION,  # shutdown, crash, an administrator ended the session
    "57014": Belongs.CONTENTION,  # query canceled: its time was over
    "58": Belongs.SERVER,  # system error, such as a disk's
    "XX000": Belongs.SESSION,  # internal: mostly a cache that has not noticed another's DDL
}
"""By SQLSTATE or its class; the longer key counts. Others belong to the statement.
PostgreSQL documentation, Appendix A."""


def belongs_to(error: psycopg.Error) -> Belongs:
    """What is at fault, as far as a first failure tells.

    Without a SQLSTATE it is either libpq that lost the connection, or psycopg that could not
    put a parameter into a message, which never reached the server.
    """
    state = error.sqlstate
    if state is None:
        refused = isinstance(error, psycopg.DataError | psycopg.ProgrammingError)
        return Belongs.STATEMENT if refused else Belongs.CONNECTION
    return SQLSTATES.get(state) or SQLSTATES.get(state[:2]) or Belongs.STATEMENT


def shows_a_pooler(error: psycopg.Error) -> bool:
    """Whether prepared statements were mixed up, which only a pooler between can do."""
    return error.sqlstate in ("26000", "42P05")
