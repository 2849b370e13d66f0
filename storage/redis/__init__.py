"""Redis, the fast path: the newest messages of each channel, and word of new ones.

Nothing in here is needed for correctness. Channels are numbered by a database, so the keys name
the database too: two deployments may share one Redis and never meet. For that, all servers of
one deployment must name their database alike; those that do not hear of each other's messages
from PostgreSQL only, some seconds later.

- `sottovoce:<database>:{42}:recent`: sorted set of channel 42's newest `Record`s by sequence
  number, with a TTL
- `sottovoce:<database>:{42}:live`: pub/sub channel, the same bytes
- `sottovoce:<database>:trial` and `…:trial:live`: a sorted set and a pub/sub channel of no use, to
  try out what is done to the other ones; in a cluster `…:trial:{0}` and the like, one for each node
- `sottovoce:<database>:control`: pub/sub channel that every worker hears; JSON, an `Eviction`

In a cluster the pub/sub channels are sharded ones (Valkey's cluster specification, "Pub/Sub"). The
braces, its hash tag, keep a channel's two in one slot. In an epoch other than 0 theirs begin with
`sottovoce:<database>:<epoch>:`, so nothing is read there of a future that was restored away.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any


class Keys:
    """The names of one database's keys and pub/sub channels."""

    def __init__(self, conninfo: Mapping[str, Any], *, epoch: int = 0) -> None:
        named = f"{conninfo['host']}:{conninfo['port']}/{conninfo['dbname']}"
        self._database = sha256(named.encode()).hexdigest()[:12].encode()
        self.control = b"sottovoce:%b:control" % self._database
        """A pub/sub channel that every feed listens to, for evictions."""
        self.trial = b"sottovoce:%b:trial" % self._database
        self.enter(epoch)

    def enter(self, epoch: int) -> None:
        """Name what is of this epoch from now on."""
        self._prefix = b"sottovoce:%b:{" % self._database
        if epoch:
            self._prefix = b"sottovoce:%b:%d:{" % (self._database, epoch)

    def trial_for(self, number: int) -> bytes:
        """One of many such keys, which are in many slots."""
        return b"%b:{%d}" % (self.trial, number)

    def recent(self, channel_id: int) -> bytes:
        return b"%b%d}:recent" % (self._prefix, channel_id)

    def live(self, channel_id: int) -> bytes:
        return b"%b%d}:live" % (self._prefix, channel_id)

    def channel_of(self, name: bytes) -> int:
        """The channel in a key or pub/sub channel of ours."""
        return int(name[len(self._prefix) : name.index(b"}")])
