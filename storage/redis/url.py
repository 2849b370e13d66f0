"""Where Redis is: one server, a set of servers with Sentinels that say which one it is, or a
cluster, some of whose nodes are named and tell of the others.

Sentinel's form is Lettuce's, for redis-py has none:
`redis-sentinel://[user:password@]host[:port][,host[:port]…][/database]#name`, with
`rediss-sentinel` for TLS to the servers. A cluster's is the same without a name and a database,
which it does not have: `redis-cluster://[user:password@]host[:port][,host[:port]…]`, with
`rediss-cluster` for TLS.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

from protocol.confidential import Secret

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SENTINEL_SECONDS = 0.2
"""For one Sentinel's word: one that hangs must not use up the time of those that would tell."""

_ASK = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
_SENTINEL = {"redis-sentinel": False, "rediss-sentinel": True}
_CLUSTER = {"redis-cluster": False, "rediss-cluster": True}
SCHEMES = ("redis://", "rediss://", *(f"{scheme}://" for scheme in _SENTINEL | _CLUSTER))


class _Cluster(NamedTuple):
    addresses: list[tuple[str, int]]
    """Of nodes that are asked for all the others."""
    options: dict[str, Any]
    """For connections to every node."""


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
        elif is_cluster(url):
            _cluster(text)
    except ValueError as error:
        return str(error)
    return None


def is_cluster(url: Secret) -> bool:
    return urlsplit(url.reveal()).scheme in _CLUSTER


@contextmanager
def connected(url: Secret, **options: Any) -> "Iterator[redis.Redis | redis.RedisCluster]":
    """A client that blocks, for commands.

    Raises:
        RedisError: also where redis-py says it of a cluster in a class of its own.
    """
    text = url.reveal()
    with ExitStack() as stack:
        if is_cluster(url):
            stack.enter_context(_as_redis_errors())
            nodes = _cluster(text)
            client: redis.Redis | redis.RedisCluster = redis.RedisCluster(
                startup_nodes=[
                    redis.cluster.ClusterNode(*each)  # type: ignore[no-untyped-call]
                    for each in nodes.addresses
                ],
                require_full_coverage=False,
                **nodes.options | options,
            )
        elif urlsplit(text).scheme in _SENTINEL:
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


@contextmanager
def _as_redis_errors() -> Iterator[None]:
    try:
        yield
    except RedisClusterException as error:
        raise reason(error) from None


def reason(error: Exception) -> Exception:
    """Why a cluster cannot be used: what its last node said, if redis-py says no more than that
    it cannot."""
    if not isinstance(error, RedisClusterException):
        return error
    cause = error.__cause__
    return cause if isinstance(cause, RedisError | OSError) else RedisConnectionError()


def open_cluster(url: Secret, **options: Any) -> "redis.asyncio.RedisCluster":
    """A client of a cluster, for asyncio."""
    found = _cluster(url.reveal())
    nodes = [redis.asyncio.cluster.ClusterNode(*address) for address in found.addresses]
    return redis.asyncio.RedisCluster(startup_nodes=nodes, **found.options | options)


def open_node(url: Secret, host: str, port: int, **options: Any) -> "redis.asyncio.Redis":
    """A client of one node of a cluster, for asyncio."""
    return redis.asyncio.Redis(host=host, port=port, **_cluster(url.reveal()).options | options)


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
    addresses, options = _hosts(url.netloc, SENTINEL_PORT, tls=_SENTINEL[url.scheme])
    if not url.fragment:
        raise ValueError("expected the name of the set of servers after a #")
    database = url.path.strip("/") or "0"
    if not database.isdecimal():
        raise ValueError("expected the number of a database in its path")
    return _Sentinels(addresses, unquote(url.fragment), options | {"db": int(database)})


def _cluster(text: str) -> _Cluster:
    """Raises:
    ValueError: it is not of the form above.
    """
    url = urlsplit(text)
    if url.path.strip("/") or url.query or url.fragment:
        raise ValueError("expected nothing after the hosts: a cluster has one database")
    return _Cluster(*_hosts(url.netloc, REDIS_PORT, tls=_CLUSTER[url.scheme]))


def _hosts(netloc: str, port: int, *, tls: bool) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    login, at, hosts = netloc.rpartition("@")
    addresses = [_address(host, port) for host in hosts.split(",")]
    options: dict[str, Any] = {}
    if tls:
        options["ssl"] = True
    if at:
        user, _, password = login.partition(":")
        options |= {"username": unquote(user) or None, "password": unquote(password) or None}
    return addresses, options


def _address(host: str, default: int) -> tuple[str, int]:
    found = urlsplit(f"//{host}")
    try:
        port = found.port or default
    except ValueError:
        port = 0
    if not found.hostname or not port:
        raise ValueError("expected host or host:port of each, with commas between")
    return found.hostname, port
