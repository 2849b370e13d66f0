"""Tries out, once, all that a server does with Redis: for `sottovoce doctor`.

It asks with the server's own clients, scripts and subscriptions, on keys and channels of the
server's own names that no chat uses. So what is refused here is refused there, and nothing else is.
"""

import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from socket import gaierror
from typing import Any, NamedTuple

import trio
from redis.exceptions import RedisClusterException, RedisError

from protocol.confidential import Secret
from storage.breaker import Breaker
from storage.bridge import Bridge, open_bridge
from storage.redis import Keys
from storage.redis.client import open_client
from storage.redis.cluster import Cluster, ClusterMessages, NodeFeed
from storage.redis.feed import CLOSE_SECONDS, Feed
from storage.redis.recent import RecentMessages
from storage.redis.refusal import Refusal, refusal_of
from storage.redis.url import close_async, is_cluster, reason

_LIMITS: dict[str, Any] = {"size": 1, "ttl": 60, "seconds": 1.0}
_POLICIES = ("noeviction", *(f"{a}-{b}" for a in ("allkeys", "volatile") for b in ("lru", "lfu")))
_POLICIES += ("allkeys-random", "volatile-random", "volatile-ttl")
_CLUSTER_RIGHTS = "+spublish +ssubscribe +sunsubscribe +ping +command +cluster|slots +asking"
_RIGHTS = "+publish +pubsub|numsub +subscribe +unsubscribe +ping"
_SCRIPT_RIGHTS = "+eval +evalsha +zrange +zadd +zremrangebyscore +zremrangebyrank +expire"


class Examined(NamedTuple):
    refusals: list[Refusal]
    """Each once; empty if all is allowed."""
    policy: str
    """What it does when its memory is full; `unknown` where it does not tell."""


def rights(url: Secret, keys: Keys) -> str:
    """All that the server's user needs, as ACL SETUSER takes it."""
    pattern = key_pattern(keys)
    more = _CLUSTER_RIGHTS if is_cluster(url) else _RIGHTS
    return f"~{pattern} &{pattern} {_SCRIPT_RIGHTS} {more}"


def key_pattern(keys: Keys) -> str:
    """What all its keys and pub/sub channels are like."""
    return keys.control.decode().removesuffix("control") + "*"


async def examine(url: Secret, keys: Keys) -> Examined:
    """Try it out. It has no time limit of its own.

    Raises:
        RedisError, OSError: it cannot be reached, or fails in another way than by refusing.
        trio.TooSlowError: it hangs.
    """
    look = _examine_cluster if is_cluster(url) else _examine_server
    async with open_bridge() as bridge:
        try:
            return await look(bridge, url, keys)
        except (RedisError, OSError, trio.TooSlowError) as error:
            failure = error  # raised outside, where it does not become a group
    raise failure


async def _examine_server(bridge: Bridge, url: Secret, keys: Keys) -> Examined:
    found: list[Refusal] = []
    breaker = _breaker()
    client = open_client(url)
    try:
        recent = RecentMessages(bridge, client, keys, breaker=breaker, **_LIMITS)
        await _attempt(found, bridge.run, recent.try_out)
        if Refusal("login") not in found:
            feed = Feed(bridge, client, keys, breaker=breaker, **_deaf())
            await _attempt(found, feed.try_out)
        return Examined(found, await bridge.run(_policy, client))
    finally:
        await _close(bridge, close_async, client)


async def _examine_cluster(bridge: Bridge, url: Secret, keys: Keys) -> Examined:
    found: list[Refusal] = []
    policy = "unknown"
    cluster = Cluster(bridge, url, keys, breaker=_breaker())
    try:
        await _attempt(found, bridge.run, cluster.ask_for_slots)
        messages = ClusterMessages(cluster, keys, **_LIMITS)
        for node in cluster.nodes.values():
            await _attempt(found, bridge.run, messages.try_out, node)
            client = cluster.client_of(node)
            try:
                await _attempt(found, NodeFeed(cluster, node, keys, **_deaf()).try_out)
                policy = await bridge.run(_policy, client)
            finally:
                await _close(bridge, client.aclose)
        return Examined(found, policy)
    finally:
        await _close(bridge, cluster.aclose)


async def _attempt(found: list[Refusal], step: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Do it, and note what was refused."""
    try:
        await step(*args)
    except (RedisError, RedisClusterException) as error:
        refusal = refusal_of(reason(error))
        if refusal is None:
            if (why := reason(error)) is error:
                raise
            raise why from error
        if refusal not in found:
            found.append(refusal)


def _breaker() -> Breaker:
    """One that nobody looks at."""
    return Breaker("redis", tolerance=1, on_change=lambda _: None)


def why_unreachable(error: BaseException | None) -> str:
    """Why it cannot be reached, as far as it can be told: a kind, no text of anybody's."""
    kinds: list[tuple[type[BaseException], str]] = [
        (ssl.SSLCertVerificationError, "its certificate is not trusted for that host"),
        (ssl.SSLError, "no TLS with it"),
        (gaierror, "its host's name is not known"),
        (ConnectionRefusedError, "nobody listens there"),
    ]
    first = error
    seen: list[BaseException] = []  # an error may have itself for a cause
    while error is not None and error not in seen:
        for kind, word in kinds:
            if isinstance(error, kind):
                return word
        seen.append(error)
        error = error.__cause__ or error.__context__
    return type(first).__name__


def _deaf() -> dict[str, Any]:
    return dict.fromkeys(("on_records", "on_evicted"), lambda _: None) | {"on_missed": lambda: None}


async def _policy(client: Any) -> str:
    """Asyncio-flavoured."""
    try:
        answer = await client.config_get("maxmemory-policy")
        policy = answer.get("maxmemory-policy", "")
    except (RedisError, AttributeError):  # hosted ones do not tell
        policy = ""
    return policy if policy in _POLICIES else "unknown"


async def _close(bridge: Bridge, close: Callable[..., Awaitable[Any]], *args: Any) -> None:
    with trio.move_on_after(CLOSE_SECONDS, shield=True), suppress(RedisError, OSError):
        await bridge.run(close, *args)
