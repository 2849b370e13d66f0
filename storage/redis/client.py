"""redis-py's clients, as they are used here: no clock but ours (`trio.fail_after` around each call)
limits a call, and it is tried again once, within its time."""

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.event import EventDispatcher
from redis.exceptions import NoScriptError

from protocol.confidential import Secret
from storage.redis.url import open_async, open_cluster, open_node

MAX_CONNECTIONS = 8
"""Enough: a batch that is read, one that is written, a probe, the feed; and one of each that
was given up and is not closed yet."""
NODE_SECONDS = 0.5
"""For one node's word of which node has which slot: the next one is asked then."""

_OPTIONS: dict[str, Any] = {
    "health_check_interval": 0,
    "protocol": 2,  # what we ask has no other answers in RESP3, and HELLO would be one trip more
    "max_connections": MAX_CONNECTIONS,
    # How operators know our connections in CLIENT LIST. Not by a name (CLIENT SETNAME): where that
    # is refused, redis-py does not connect; where CLIENT SETINFO is, it does.
    "driver_info": DriverInfo(name="sottovoce", lib_version=None),
}
_UNLIMITED: dict[str, Any] = {
    "socket_timeout": None,
    "socket_connect_timeout": None,
    # Once, on a new connection: an idle one may have been reset, which the driver finds out by
    # using it. All that we ask may be done twice.
    "retry": Retry(NoBackoff(), 1),
}


def open_client(url: Secret) -> "redis.asyncio.Redis":
    """A client, which connects when it is first asked. A call that is cancelled closes its
    connection, so no answer can meet another question."""
    return open_async(url, **_OPTIONS, **_UNLIMITED)


def open_node_client(url: Secret, host: str, port: int) -> "redis.asyncio.Redis":
    """The same for one node of a cluster: for pub/sub, which has connections of its own."""
    return open_node(url, host, port, **_OPTIONS, **_UNLIMITED)


def open_cluster_client(url: Secret, events: EventDispatcher) -> "redis.asyncio.RedisCluster":
    """A cluster's client, for commands. It follows a slot that has moved, and does nothing else
    unasked: redis-py would close the connections to all nodes for the failure of one.

    Args:
        events: is told when it learned which node has which slot.
    """
    return open_cluster(
        url,
        **_OPTIONS,
        socket_timeout=NODE_SECONDS,
        socket_connect_timeout=NODE_SECONDS,
        retry=Retry(NoBackoff(), 0),
        reinitialize_steps=0,
        require_full_coverage=False,  # what is covered goes on
        event_dispatcher=events,
    )


class Script:
    """A script of this folder."""

    def __init__(self, name: str) -> None:
        self.text = (files("storage.redis") / f"{name}.lua").read_bytes()
        self.digest = sha1(self.text, usedforsecurity=False).hexdigest()


async def run_script(
    client: Any, script: Script, keys: Sequence[bytes], args: Sequence[Any] = ()
) -> Any:
    """Run it by its digest, and by its text where Redis does not have it (any more).

    SCRIPT LOAD, which redis-py would use, is one more command that a user may not be allowed.
    """
    arguments = (len(keys), *keys, *args)
    try:
        return await client.execute_command("EVALSHA", script.digest, *arguments)
    except NoScriptError:
        return await client.execute_command("EVAL", script.text, *arguments)
