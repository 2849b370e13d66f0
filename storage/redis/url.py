"""Where Redis is: one server, or a set of servers with Sentinels that say which one it is.

Sentinel's form is Lettuce's, for redis-py has none:
`redis-sentinel://[user:password@]host[:port][,host[:port]…][/database]#name`, with
`rediss-sentinel` for TLS to the servers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel

from protocol.confidential import Secret

SENTINEL_PORT = 26379
SENTINEL_SECONDS = 0.2
"""For one Sentinel's word: one that hangs must not use up the time of those that would tell."""

_ASK = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
_SENTINEL = {"redis-sentinel": False, "rediss-sentinel": True}
SCHEMES = ("redis://", "rediss://", *(f"{scheme}://" for scheme in _SENTINEL))


class _Sentinels(NamedTuple):
    addresses: list[tuple[str, int]]
    name: str
    """Of the set of servers."""
    options: dict[str, Any]
    """For connections to the servers; the Sentinels are asked without a password."""


def check_url(url: Secret) -> str | None:
    """What is wrong with it, without a word of it; None if nothing is."""
    text = url.reveal()
    if not text.startswith(SCHEMES):
        return f"expected {' or '.join(SCHEMES)}"
    try:
        if urlsplit(text).scheme in _SENTINEL:
            _sentinels(text)
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def connected(url: Secret, **options: Any) -> "Iterator[redis.Redis]":
    """A client that blocks, for commands."""
    text = url.reveal()
    with ExitStack() as stack:
        if urlsplit(text).scheme in _SENTINEL:
            found = _sentinels(text)
            manager = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
                found.addresses, sentinel_kwargs=_ASK, **found.options | options
            )
            for sentinel in manager.sentinels:
                stack.callback(sentinel.close)
            client = manager.master_for(found.name)  # type: ignore[no-untyped-call]
        else:
            client = redis.Redis.from_url(text, **options)
        yield stack.enter_context(client)


def open_async(url: Secret, **options: Any) -> "redis.asyncio.Redis":
    """A client for asyncio, to be closed by `close_async`."""
    text = url.reveal()
    if urlsplit(text).scheme not in _SENTINEL:
        return redis.asyncio.Redis.from_url(text, **options)
    found = _sentinels(text)
    manager = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        found.addresses, sentinel_kwargs=_ASK, **found.options | options
    )
    client: redis.asyncio.Redis = manager.master_for(found.name)
    return client


async def close_async(client: "redis.asyncio.Redis") -> None:
    """It, and what it asks the Sentinels with."""
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for each in [client, *(manager.sentinels if manager is not None else [])]:
        await each.aclose()


def _sentinels(text: str) -> _Sentinels:
    """Raises:
    ValueError: it is not of the form above.
    """
    url = urlsplit(text)
    login, at, hosts = url.netloc.rpartition("@")
    addresses = [_address(host) for host in hosts.split(",")]
    if not url.fragment:
        raise ValueError("expected the name of the set of servers after a #")
    database = url.path.strip("/") or "0"
    if not database.isdecimal():
        raise ValueError("expected the number of a database in its path")
    options: dict[str, Any] = {"db": int(database)}
    if _SENTINEL[url.scheme]:
        options["ssl"] = True
    if at:
        user, _, password = login.partition(":")
        options |= {"username": unquote(user) or None, "password": unquote(password) or None}
    return _Sentinels(addresses, unquote(url.fragment), options)


def _address(host: str) -> tuple[str, int]:
    found = urlsplit(f"//{host}")
    try:
        port = found.port or SENTINEL_PORT
    except ValueError:
        port = 0
    if not found.hostname or not port:
        raise ValueError("expected host or host:port of each Sentinel, with commas between")
    return found.hostname, port
