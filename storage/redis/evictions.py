"""How an eviction is published, by whoever changes what somebody may do.

The main application does the same with one command, which is `SPUBLISH` in a cluster:
`PUBLISH <control channel> <JSON>`.
"""

from redis.exceptions import RedisError

from protocol.confidential import Secret
from storage.contract import Eviction, StoreUnavailable
from storage.redis import Keys
from storage.redis.url import connected, is_cluster

SECONDS = 3.0
"""For connecting, and for the answer."""


def command(url: Secret) -> str:
    """What publishes there."""
    return "SPUBLISH" if is_cluster(url) else "PUBLISH"


def publish_eviction(url: Secret, keys: Keys, eviction: Eviction) -> int:
    """Tell every worker; blocks.

    Returns:
        How many workers heard it; in a cluster, of those that listen at the primary, as a rule all.

    Raises:
        StoreUnavailable: Redis was not told.
    """
    options = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
    try:
        with connected(url, protocol=2, **options) as client:
            words = (command(url), keys.control, eviction.encode())
            return int(client.execute_command(*words))  # type: ignore[no-untyped-call]
    except (RedisError, OSError):
        raise StoreUnavailable from None
