"""redis-py's client, as it is used here: no clock but ours (`trio.fail_after` around each call)
limits a call, and it is tried again once, within its time."""

from importlib.resources import files
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from protocol.confidential import Secret
from storage.redis.url import open_async

MAX_CONNECTIONS = 8
"""Enough: a batch that is read, one that is written, a probe, the feed; and one of each that
was given up and is not closed yet."""


def open_client(url: Secret) -> "redis.asyncio.Redis":
    """A client, which connects when it is first asked. A call that is cancelled closes its
    connection, so no answer can meet another question."""
    return open_async(
        url,
        socket_timeout=None,
        socket_connect_timeout=None,
        # Once, on a new connection: an idle one may have been reset, which the driver finds out by
        # using it. All that we ask may be done twice.
        retry=Retry(NoBackoff(), 1),
        health_check_interval=0,
        protocol=2,  # what we ask has no other answers in RESP3, and HELLO would be one trip more
        max_connections=MAX_CONNECTIONS,
        client_name="sottovoce",
        driver_info=None,
    )


def load_script(client: "redis.asyncio.Redis", name: str) -> Any:
    """A script of this folder, called as `script(keys, args)`: by its digest, and with its text
    where Redis does not have it (any more)."""
    return client.register_script((files("storage.redis") / f"{name}.lua").read_bytes())
