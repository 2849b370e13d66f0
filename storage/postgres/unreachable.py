"""Why PostgreSQL cannot be reached, in words that name the setting to correct.

A server's refusal of a login reaches psycopg as a text without its SQLSTATE, so most causes are
told apart by what libpq and the server write. That text holds names of hosts, users and databases:
it is compared here, and never passed on. A server's own sentences are in the language of its
`lc_messages`; where they are not English, what libpq knows of the login still says that it was
refused.
"""

import re
import socket
from typing import NamedTuple

import psycopg
import trio


class Unreachable(NamedTuple):
    """Why a connection failed.

    Attributes:
        cause: one word for logs, the same for every error of this kind.
        finding: what is wrong, to be read after "the database cannot be reached: ".
        remedy: what to do about it.
    """

    cause: str
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"the database cannot be reached: {self.finding}; {self.remedy}"


_LOGIN = Unreachable(
    "login", "the user or the password is refused", "correct DB_USER and DB_PASSWORD"
)
_NO_PASSWORD = Unreachable("password", "a password is asked for", "set DB_PASSWORD")
_ROLE = Unreachable(
    "role", "the user may not log in", "ALTER ROLE … LOGIN, or name another one in DB_USER"
)
_NOT_ADMITTED = Unreachable(
    "admission",
    "the server admits no such login from this address",
    "add a line to its pg_hba.conf, or see whether it wants TLS (SOTTOVOCE_DB_SSLMODE)",
)
_DATABASE = Unreachable("database", "there is no such database", "correct DB_DATABASE")
_DATABASE_CLOSED = Unreachable(
    "database", "the database takes no connections", "ALTER DATABASE … ALLOW_CONNECTIONS true"
)
_PRIVILEGE = Unreachable(
    "privilege", "the user may not connect to the database", "GRANT CONNECT ON DATABASE … TO …"
)
_CONNECTIONS = Unreachable(
    "connections",
    "no connection is left",
    "raise max_connections (or the pooler's limit, or the role's), or lower "
    "SOTTOVOCE_DB_CONNECTIONS",
)
_STARTING = Unreachable(
    "starting", "the server is starting, stopping or recovering", "wait, or look at its log"
)
_READ_ONLY = Unreachable("read_only", "the server takes no writes", "name the primary in DB_HOST")
_POOLER = Unreachable(
    "pooler",
    "a connection pooler refuses, or has no server behind it",
    "look at the pooler's log, and at the server behind it",
)
_PARAMETER = Unreachable(
    "parameter",
    "a parameter of the connection is refused",
    "see PGOPTIONS, and a pooler's ignore_startup_parameters",
)
_NAME = Unreachable(
    "name", "the host's name cannot be resolved", "correct DB_HOST, or see to the name service"
)
_REFUSED = Unreachable(
    "refused",
    "nothing listens on that port",
    "correct DB_HOST and DB_PORT, or start PostgreSQL (listen_addresses)",
)
_SOCKET = Unreachable(
    "socket",
    "there is no usable socket in that folder",
    "correct DB_HOST and DB_PORT, or start PostgreSQL (unix_socket_directories)",
)
_ROUTE = Unreachable(
    "route", "there is no way to the host", "correct DB_HOST, or see to routes and firewalls"
)
_TIMEOUT = Unreachable(
    "timeout",
    "nothing answers in time",
    "correct DB_HOST and DB_PORT, or see to firewalls and to the server's load",
)
_NOT_POSTGRES = Unreachable(
    "protocol", "something other than PostgreSQL answers there", "correct DB_PORT and DB_HOST"
)
_CLOSED = Unreachable(
    "closed",
    "the connection was closed without a word",
    "look at the server's log, and at proxies and firewalls in between; or correct DB_PORT",
)
_NO_TLS = Unreachable(
    "tls",
    "the server has no TLS",
    "turn it on there (ssl = on), or SOTTOVOCE_DB_SSLMODE=disable if nobody else sees that wire",
)
_AUTHORITY_MISSING = Unreachable(
    "certificate",
    "the authority's certificate is not where libpq looks for it",
    "PGSSLROOTCERT: the path of its PEM, or `system`",
)
_AUTHORITY = Unreachable(
    "certificate",
    "the server's certificate is of an authority that is not trusted, or has run out",
    "PGSSLROOTCERT: the PEM of the authority that signed it; or renew the certificate",
)
_CERTIFICATE_NAME = Unreachable(
    "certificate",
    "the server's certificate is for another name",
    "DB_HOST: the name that the certificate has",
)
_CLIENT_CERTIFICATE = Unreachable(
    "certificate",
    "the certificate or key of this client cannot be used",
    "see PGSSLCERT and PGSSLKEY",
)
_TLS = Unreachable(
    "tls", "TLS cannot be agreed upon", "look at the server's TLS settings and its log"
)
_SETTINGS = Unreachable(
    "settings", "libpq refuses the settings", "see DB_HOST, DB_PORT, and libpq's own PG… variables"
)
_REFUSAL = Unreachable(
    "refusal",
    "the server answers, and refuses the login",
    "see DB_USER, DB_PASSWORD and DB_DATABASE; the server's log has the reason",
)
_UNKNOWN = Unreachable(
    "unknown",
    "the connection cannot be made",
    "see DB_HOST, DB_PORT, SOTTOVOCE_DB_SSLMODE, the network and the server's log",
)

_STATES = (
    ("28", _LOGIN),
    ("3D000", _DATABASE),
    ("42501", _PRIVILEGE),
    ("53300", _CONNECTIONS),
    ("57P", _STARTING),
    ("25006", _READ_ONLY),
    ("08P01", _POOLER),
)
"""By the beginning of the SQLSTATE, where psycopg has one (PostgreSQL docs, Appendix A)."""

_TEXTS = tuple(
    (re.compile(pattern, re.IGNORECASE), why)
    for pattern, why in (
        # libpq's own words, and the system's
        (r"does not match host name|host name .* does not match", _CERTIFICATE_NAME),
        (
            r"root certificate file .*does not exist|could not read root certificate",
            _AUTHORITY_MISSING,
        ),
        (r"certificate verify failed", _AUTHORITY),
        (r"private key file|(could not|cannot) (load|read) certificate", _CLIENT_CERTIFICATE),
        (r"server does not support SSL", _NO_TLS),
        (r"expected authentication request|invalid response to SSL negotiation", _NOT_POSTGRES),
        (r"unsupported frontend protocol|protocol version .* not supported", _NOT_POSTGRES),
        (r"wrong version number|received invalid", _NOT_POSTGRES),
        (r"unexpected eof", _CLOSED),
        (r"SSL error|SSL SYSCALL error", _TLS),
        (r"could not translate host name|failed to resolve host", _NAME),
        (r"on socket .*(No such file|Permission denied|Connection refused)", _SOCKET),
        (r"Connection refused", _REFUSED),
        (r"No route to host|(Network|Host) is (unreachable|down)", _ROUTE),
        (r"timeout expired|timed out", _TIMEOUT),
        (r"no password supplied", _NO_PASSWORD),
        (
            r"session is read-only|server is in hot standby|session is not|server is not in",
            _READ_ONLY,
        ),
        (r"invalid (port|sslmode|connection option|integer value)|could not match \d+", _SETTINGS),
        # Poolers', before those of PostgreSQL that they resemble
        (r"no more connections allowed|too many client connections", _CONNECTIONS),
        (r"max client connections|MaxClientsInSessionMode", _CONNECTIONS),
        (r"no such database", _DATABASE),
        (r"no such user|tenant or user not found|no credentials for the role", _LOGIN),
        (r"unsupported startup parameter", _PARAMETER),
        (r"pgbouncer|bouncer config|server_login_retry|server login has been failing", _POOLER),
        (r"query_wait_timeout|client_login_timeout|odyssey:|pgcat", _POOLER),
        # PostgreSQL's, where it speaks English
        (r"no pg_hba\.conf entry|pg_hba\.conf rejects", _NOT_ADMITTED),
        (r"is not permitted to log in", _ROLE),
        (r"authentication failed|role .*does not exist|user name .*provided", _LOGIN),
        (r"database .*does not exist", _DATABASE),
        (r"not currently accepting connections", _DATABASE_CLOSED),
        (r"permission denied for database|CONNECT privilege", _PRIVILEGE),
        (r"too many (clients|connections)|connection slots are reserved", _CONNECTIONS),
        (r"database system is|not (yet )?accepting connections", _STARTING),
        (r"recovery|terminating connection due to administrator", _STARTING),
        (r"configuration parameter|invalid value for parameter", _PARAMETER),
        (r"server closed the connection|Connection reset|Broken pipe", _CLOSED),
    )
)
"""By the text, what is between quotation marks aside; the first that matches counts."""

_QUOTED = re.compile(r'"[^"]*"')


def why_unreachable(error: BaseException) -> Unreachable:
    """Name the cause of a connection that could not be made. Plain; repeats nothing of the error.

    Args:
        error: psycopg's, that of the name's resolution, or of a time limit.
    """
    if isinstance(error, trio.TooSlowError | TimeoutError | psycopg.errors.ConnectionTimeout):
        return _TIMEOUT
    if isinstance(error, socket.gaierror) or isinstance(error.__cause__, socket.gaierror):
        return _NAME
    if not isinstance(error, psycopg.Error):
        return _by_text(str(error)) or _UNKNOWN
    for state, why in _STATES:
        if (error.sqlstate or "").startswith(state):
            return why
    pgconn = error.pgconn
    # libpq's words of this one try: psycopg's own text tells of every address that it tried.
    text = pgconn.error_message.decode("utf-8", "replace") if pgconn is not None else str(error)
    if found := _by_text(text):
        return found
    if pgconn is not None and pgconn.needs_password:
        return _NO_PASSWORD
    return _REFUSAL if pgconn is not None and pgconn.used_password else _UNKNOWN


def _by_text(text: str) -> Unreachable | None:
    text = _QUOTED.sub('""', text)
    return next((why for pattern, why in _TEXTS if pattern.search(text)), None)
