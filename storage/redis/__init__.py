"""Redis, the fast path: the newest messages of each channel, and word of new ones.

Nothing in here is needed for correctness. Keys, for one channel 42 (the braces keep both on one
node of a cluster):

- `sottovoce:{42}:recent`: sorted set of the newest `Record`s by sequence number, with a TTL
- `sottovoce:{42}:live`: pub/sub channel, the same bytes
"""

PREFIX = b"sottovoce:{"


def recent_key(channel_id: int) -> bytes:
    return b"sottovoce:{%d}:recent" % channel_id


def live_channel(channel_id: int) -> bytes:
    return b"sottovoce:{%d}:live" % channel_id


def channel_of(name: bytes) -> int:
    """The channel id in a key or pub/sub channel of ours."""
    return int(name[len(PREFIX) : name.index(b"}")])
