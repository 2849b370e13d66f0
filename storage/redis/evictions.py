"""How an eviction is published, by whoever changes what somebody may do.

The main application does the same with one command: `PUBLISH <control channel> <JSON>`.
"""

from redis.exceptions import RedisError

from protocol.confidential import Secret
from storage.contract import Eviction, StoreUnavailable
from storage.redis import Keys
from storage.redis.url import connected

SECONDS = 3.0
"""For connecting, and for the answer."""


def publish_eviction(url: Secret, keys: Keys, eviction: Eviction) -> int:
    """Tell every worker; blocks.

    Returns:
        How many workers heard it. In a cluster Redis counts those of one node only.

    Raises:
        StoreUnavailable: Redis was not told.
    """
    options = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
    try:
        with connected(url, protocol=2, **options) as client:
            return int(client.publish(keys.control, eviction.encode()))
    except (RedisError, OSError):
        raise StoreUnavailable from None
