"""Where Redis is: one server, a set of servers with Sentinels that say which one it is, or a
cluster, some of whose nodes are named and tell of the others.

Sentinel's form is Lettuce's, for redis-py has none:
`redis-sentinel://[user:password@]host[:port][,host[:port]…][/database]#name`, with
`rediss-sentinel` for TLS to the servers. A cluster's is the same without a name and a database,
which it does not have: `redis-cluster://[user:password@]host[:port][,host[:port]…]`, with
`rediss-cluster` for TLS. One server's is `redis://[user:password@]host[:port][/database]`, with
`rediss` for TLS, or with `?db=` for the database. Where there is TLS, a query may have
`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` and `ssl_cert_reqs`.

A URL is read here and nowhere else, so that nothing that redis-py would stumble over gets to it:
what `check_url` lets pass can be connected to, or is refused by a server.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

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

UPSTASH = ".upstash.io"
"""What the hosts of Upstash's databases end with. They have database 0 alone, and take TLS only
(Upstash's documentation: SELECT; "Error read ECONNRESET")."""

_ASK = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
_SERVER = {"redis": False, "rediss": True}
_SENTINEL = {"redis-sentinel": False, "rediss-sentinel": True}
_CLUSTER = {"redis-cluster": False, "rediss-cluster": True}
_TLS = _SERVER | _SENTINEL | _CLUSTER
"""Whether a scheme is for TLS."""
SCHEMES = tuple(f"{scheme}://" for scheme in _TLS)

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_QUERY = (*_FILES, "ssl_cert_reqs")
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_ENCODE = (
    "percent-encode what the user and the password have of # (%23), / (%2F), ? (%3F), @ (%40), "
    "% (%25) and brackets (%5B, %5D)"
)


class _Place(NamedTuple):
    """What a URL says."""

    scheme: str
    addresses: list[tuple[str, int]]
    """The server's address; or Sentinels'; or nodes', which are asked for all the others."""
    name: str
    """The name of the set of servers; empty without Sentinels."""
    options: dict[str, Any]
    """How the servers or nodes are connected to; Sentinels are asked without a password."""


def check_url(url: Secret) -> str | None:
    """What is wrong with it and what to do, without a word of it; None if nothing is."""
    try:
        _read(url)
    except ValueError as error:
        return str(error)
    return None


def upstash_url(rest_url: Secret, token: Secret) -> Secret:
    """The TCP address that belongs to Upstash's REST address: the same host, Redis' own port, the
    user `default`, the token as the password, and TLS (Upstash's documentation, "Connect Your
    Client").

    Raises:
        ValueError: it is no such address; says what to do, without a word of it.
    """
    text = rest_url.reveal()
    _check_characters(text)
    _check_characters(token.reveal())
    try:
        url = urlsplit(text)
        host = url.hostname or ""
    except ValueError:
        host = ""
    if not host or text.rstrip("/") != f"https://{host}":
        raise ValueError("expected https:// and a host alone; else set UPSTASH_REDIS_URL")
    found = Secret(f"rediss://default:{quote(token.reveal(), safe='')}@{host}:{REDIS_PORT}")
    _read(found)
    return found


def is_cluster(url: Secret) -> bool:
    return url.reveal().startswith(tuple(f"{scheme}://" for scheme in _CLUSTER))


@contextmanager
def connected(url: Secret, **options: Any) -> "Iterator[redis.Redis | redis.RedisCluster]":
    """A client that blocks, for commands.

    Raises:
        RedisError: also where redis-py says it of a cluster in a class of its own.
    """
    place = _read(url)
    options = place.options | options
    with ExitStack() as stack:
        if place.scheme in _CLUSTER:
            stack.enter_context(_as_redis_errors())
            client: redis.Redis | redis.RedisCluster = redis.RedisCluster(
                startup_nodes=[
                    redis.cluster.ClusterNode(*each)  # type: ignore[no-untyped-call]
                    for each in place.addresses
                ],
                require_full_coverage=False,
                **options,
            )
        elif place.scheme in _SENTINEL:
            manager = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
                place.addresses, sentinel_kwargs=_ASK, **options
            )
            for sentinel in manager.sentinels:
                stack.callback(sentinel.close)
            client = manager.master_for(place.name)  # type: ignore[no-untyped-call]
        else:
            ((host, port),) = place.addresses
            client = redis.Redis(host=host, port=port, **options)
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
    place = _read(url)
    nodes = [redis.asyncio.cluster.ClusterNode(*address) for address in place.addresses]
    return redis.asyncio.RedisCluster(startup_nodes=nodes, **place.options | options)


def open_node(url: Secret, host: str, port: int, **options: Any) -> "redis.asyncio.Redis":
    """A client of one node of a cluster, for asyncio."""
    return redis.asyncio.Redis(host=host, port=port, **_read(url).options | options)


def open_async(url: Secret, **options: Any) -> "redis.asyncio.Redis":
    """A client for asyncio, to be closed by `close_async`."""
    place = _read(url)
    options = place.options | options
    if place.scheme not in _SENTINEL:
        ((host, port),) = place.addresses
        return redis.asyncio.Redis(host=host, port=port, **options)
    manager = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
        place.addresses, sentinel_kwargs=_ASK, **options
    )
    client: redis.asyncio.Redis = manager.master_for(place.name)
    return client


async def close_async(client: "redis.asyncio.Redis") -> None:
    """It, and what it asks the Sentinels with."""
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for each in [client, *(manager.sentinels if manager is not None else [])]:
        await each.aclose()


def _read(secret: Secret) -> _Place:
    """Raises:
    ValueError: it is not of one of the forms above; says what to do, without a word of it.
    """
    text = secret.reveal()
    _check_characters(text)
    if text.startswith(("https://", "http://")):
        raise ValueError(
            f"expected {' or '.join(SCHEMES)}: an address for REST belongs into "
            "UPSTASH_REDIS_REST_URL, beside UPSTASH_REDIS_REST_TOKEN"
        )
    if not text.startswith(SCHEMES):
        raise ValueError(f"expected {' or '.join(SCHEMES)}")
    url = _split(text)
    login, at, hosts = url.netloc.rpartition("@")
    default = SENTINEL_PORT if url.scheme in _SENTINEL else REDIS_PORT
    addresses = [_address(host, default) for host in hosts.split(",")]
    if url.scheme in _SERVER and len(addresses) > 1:
        raise ValueError(
            "expected one host: several are Sentinels (redis-sentinel://) or nodes of a cluster "
            "(redis-cluster://)"
        )
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    if url.query and not query:
        raise ValueError(f"expected nothing after a ? but {', '.join(_QUERY)}, each with a value")
    database = _database(url.path, query.pop("db", None) if url.scheme in _SERVER else None)
    options = _tls_options(query, tls=_TLS[url.scheme])
    if at:
        options |= _login(login)
    if database:
        options["db"] = database
    if any(host.endswith(UPSTASH) for host, _ in addresses):
        if database:
            raise ValueError("expected database 0: Upstash has no other")
        if not _TLS[url.scheme]:
            raise ValueError("expected rediss://: Upstash takes connections with TLS only")
    return _Place(url.scheme, addresses, unquote(url.fragment), options)


def _check_characters(text: str) -> None:
    if text != text.strip().strip("\"'"):
        raise ValueError("there are spaces or quotation marks around it: remove them")
    if not text.isprintable() or " " in text:
        raise ValueError("there is a space or a control character in it: percent-encode it")


def _split(text: str) -> SplitResult:
    """What stands between the slashes, where no character of a password has cut it short."""
    try:
        url = urlsplit(text)
    except ValueError:  # brackets that hold no address, letters that would turn into a / or a #
        raise ValueError(_ENCODE) from None
    login = url.netloc.rpartition("@")[0]
    if "@" in login + url.path + url.query + url.fragment or _STRAY_PERCENT.search(login):
        raise ValueError(_ENCODE)
    if url.scheme in _SENTINEL:
        if not url.fragment:
            raise ValueError("expected the name of the set of servers after a #")
    elif url.scheme in _SERVER and url.fragment:
        raise ValueError(f"expected nothing after a #: {_ENCODE}")
    if url.scheme in _CLUSTER and (url.path.strip("/") or url.fragment):
        raise ValueError("expected nothing after the hosts: a cluster has one database")
    return url


def _login(login: str) -> dict[str, str]:
    user, colon, password = login.partition(":")
    if not colon:
        raise ValueError("expected user:password@ before the host, or :password@ without a user")
    words = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in words.items() if value}


def _database(path: str, asked: str | None) -> int:
    number = path.strip("/") or "0" if asked is None else asked
    if not (number.isascii() and number.isdecimal() and len(number) < 5):
        raise ValueError(f"expected the number of a database in its path, or {_ENCODE}")
    return int(number)


def _tls_options(found: dict[str, str], *, tls: bool) -> dict[str, Any]:
    if found and (not tls or found.keys() - set(_QUERY)):
        raise ValueError(
            f"expected nothing after a ? but {', '.join(_QUERY)}, and those with TLS alone"
        )
    for name in found.keys() & set(_FILES):
        if not Path(found[name]).is_file():
            raise ValueError(f"there is no file where {name} says")
    if "ssl_keyfile" in found and "ssl_certfile" not in found:
        raise ValueError("expected ssl_certfile beside ssl_keyfile")
    if found.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        raise ValueError("expected ssl_cert_reqs to be none, optional or required")
    return ({"ssl": True} if tls else {}) | found


def _address(text: str, default: int) -> tuple[str, int]:
    url = urlsplit(f"//{text}")
    try:
        port = default if url.port is None else url.port
        host = url.hostname or ""
        host.encode("idna")  # which the resolver does, and raises no OSError
    except ValueError:
        port, host = 0, ""
    if not host or not port:
        raise ValueError(
            f"expected host or host:port (1 to 65535), of several with commas between; {_ENCODE}"
        )
    return host, port
