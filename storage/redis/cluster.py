"""Redis Cluster: the same messages and the same word of them, spread over nodes by channel.

What makes a node fail or hang is its own affair: each has a breaker, a time limit for each call and
a feed with a connection of its own. Its channels then do without Redis, all others go on.

redis-py's client knows which node has which slot, sends each command there and follows one that
was moved. Its `ClusterPubSub` is not used: it asks one node after the other for messages, each
with a time-out, and reconnects without a word of it. Here a reader stays at each node.

When a slot moves, its old node ends the subscriptions in it (a `sunsubscribe` that nobody asked
for), or refuses them (`MOVED`). Then the nodes are asked again which of them has which slot, and
the new one is told; until all of them know, that may take some turns. What was said meanwhile is
read from PostgreSQL. See Valkey's documentation, "Sharded Pub/Sub" and SSUBSCRIBE, and the cluster
specification, "Redirection and resharding".
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import structlog
import trio
from redis.asyncio.cluster import ClusterNode
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.event import (
    AsyncAfterSlotsCacheRefreshEvent,
    AsyncEventListenerInterface,
    EventDispatcher,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MovedError, NoScriptError, RedisClusterException, RedisError

from protocol.confidential import Secret
from storage.breaker import Breaker, Event
from storage.bridge import Bridge
from storage.contract import Eviction, Record, StoreUnavailable
from storage.failures import describe
from storage.metrics import REDIS_ROUND_TRIPS, REDIS_WRITES_DROPPED
from storage.redis import Keys
from storage.redis.client import Script, open_cluster_client, open_node_client
from storage.redis.feed import CLOSE_SECONDS, SILENCE_SECONDS, Feed, PubSub
from storage.redis.recent import (
    Write,
    attempt,
    decode_records,
    trial_arguments,
    write_arguments,
)
from storage.redis.refusal import describe_refusal, refusal_of
from storage.redis.url import reason

log = structlog.get_logger("storage")

TOPOLOGY_SECONDS = 3.0
"""For an answer to which node has which slot, of whichever node has one."""
TOPOLOGY_PAUSE_SECONDS = 0.25
"""Between two such questions, jittered by half: nodes take about as long to tell each other."""
TOPOLOGY_AGE_SECONDS = 30.0
"""An answer is asked for again, though nobody had reason to doubt it."""
PLACE_AT_ONCE = 500
"""Channels that are looked at between two checkpoints, in about a millisecond."""
MAX_TRIALS = 10_000
"""Keys that are tried until one is a node's, in 20 ms at most. Whoever has just one slot or two of
the 16384 may be judged by another node's key."""
CONTROL = 0
"""The number of the channel of evictions, which no other channel has."""


class Node:
    """A primary that has slots."""

    __slots__ = ("breaker", "host", "name", "port", "trial")

    def __init__(self, node: ClusterNode, breaker: Breaker) -> None:
        self.name = node.name
        self.host = node.host
        self.port = int(node.port)
        self.trial = b""
        """A key in one of its slots, to try out what is done to the others."""
        self.breaker = breaker


class _Listener(AsyncEventListenerInterface):
    def __init__(self, listen: Callable[[], None]) -> None:
        self._listen = listen

    async def listen(self, event: object) -> None:  # noqa: ARG002
        self._listen()


class Cluster:
    """Which node has which slot, and commands to the nodes.

    Args:
        breaker: of all nodes together. It is told of every failure, and is up only while every
            node is: it decides how often missed messages are looked for, and what an operator is
            told. Whether a channel's node is asked is up to that node's own.
    """

    def __init__(self, bridge: Bridge, url: Secret, keys: Keys, *, breaker: Breaker) -> None:
        self.bridge = bridge
        self.breaker = breaker
        self.nodes: dict[str, Node] = {}
        """By their addresses. Those that left are not in it any more."""
        self.learned = trio.Event()
        """Set when the nodes were asked, whether anything was new or not."""
        self.owners: dict[int, str] = {}
        """The name of each slot's node; another object after each change."""
        self._url = url
        self._keys = keys
        self._doubted = trio.Event()
        listener = _Listener(self._learn)
        events = EventDispatcher()
        events.register_listeners({AsyncAfterSlotsCacheRefreshEvent: [listener]})
        self._client = open_cluster_client(url, events)

    @property
    def covered(self) -> bool:
        """Whether every slot has a node."""
        return len(self.owners) == REDIS_CLUSTER_HASH_SLOTS

    def doubt(self) -> None:
        """What is known of the nodes may not be so any more. Plain."""
        self._doubted.set()

    def node_of(self, name: bytes) -> Node | None:
        """The node that a key or a pub/sub channel belongs to, if it is known. Plain."""
        owner = self.owners.get(self._client.keyslot(name))
        return None if owner is None else self.nodes.get(owner)

    def client_of(self, node: Node) -> Any:
        """A client of that node alone, to be closed by whoever asked for it."""
        return open_node_client(self._url, node.host, node.port)

    async def serve(self) -> None:
        """Ask the nodes which of them has which slot, when there is reason to."""
        while True:
            self._doubted = trio.Event()
            try:
                with trio.fail_after(TOPOLOGY_SECONDS):
                    await self.bridge.run(self.ask_for_slots)
            except (RedisError, RedisClusterException, OSError, trio.TooSlowError) as error:
                refusal = refusal_of(reason(error))
                if self.breaker.up:
                    log.warning(
                        "redis_failed",
                        operation="slots",
                        **describe_refusal(refusal),
                        **describe(reason(error)),
                    )
                denied = refusal is not None and refusal.lasting
                self.breaker.record(Event.DENIED if denied else Event.REFUSED)
            await trio.sleep(TOPOLOGY_PAUSE_SECONDS * random.uniform(0.5, 1.0))
            with trio.move_on_after(TOPOLOGY_AGE_SECONDS):
                await self._doubted.wait()

    async def ask(
        self, node: Node, commands: Sequence[tuple[Script, bytes, Sequence[Any]]]
    ) -> list[Any]:
        """Run scripts at one node, each with one key and its arguments. Asyncio-flavoured.

        Raises:
            RedisError: the first answer that is one; the others were done as far as they could be.
        """
        answers = await self._execute(
            node, [("EVALSHA", script.digest, 1, key, *args) for script, key, args in commands]
        )
        unknown = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:  # the node was started since
            again = [commands[at] for at in unknown]
            told = await self._execute(
                node, [("EVAL", script.text, 1, key, *args) for script, key, args in again]
            )
            for at, answer in zip(unknown, told, strict=True):
                answers[at] = answer
        return _unless_failed(answers)

    async def aclose(self) -> None:
        """Asyncio-flavoured."""
        await self._client.aclose()

    async def _execute(self, node: Node, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Twice, if the connection was lost: it may have been reset while it was idle, which the
        driver finds out by using it. All that we ask may be done twice."""
        for last in (False, True):
            pipeline = self._client.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any]
            try:
                answers = await pipeline.execute(raise_on_error=False)
            except RedisConnectionError as error:
                answers = [error]
            if last or not isinstance(answers[0], RedisConnectionError):
                break
            if (known := self._client.get_node(node_name=node.name)) is not None:
                await known.disconnect_free_connections()
        return answers

    async def ask_for_slots(self) -> None:
        """Asyncio-flavoured."""
        if self.nodes:
            await self._client.nodes_manager.initialize()
        await self._client.initialize()  # the first time, or after it gave up by itself

    def _learn(self) -> None:
        cache = self._client.nodes_manager.slots_cache
        found = {nodes[0].name: nodes[0] for nodes in cache.values() if nodes}  # primaries
        owners = {slot: nodes[0].name for slot, nodes in cache.items() if nodes}
        if owners != self.owners:
            if self.nodes.keys() != found.keys() or len(owners) != len(self.owners):
                log.info("redis_cluster", nodes=len(found), slots=len(owners))
            self.owners = owners
            self.nodes = {
                name: self.nodes.get(name) or self._new_node(node) for name, node in found.items()
            }
            for node in self.nodes.values():
                # (The empty key is in a slot, too.)
                if not node.trial or owners.get(self._client.keyslot(node.trial)) != node.name:
                    node.trial = self._trial_key(node.name)
        self.learned.set()

    def _new_node(self, node: ClusterNode) -> Node:
        breaker = Breaker(f"redis {node.name}", tolerance=2, on_change=self._node_changed)
        breaker.on_suspect = self._node_is_suspect
        return Node(node, breaker)

    def _trial_key(self, name: str) -> bytes:
        for number in range(MAX_TRIALS):
            key = self._keys.trial_for(number)
            if self.owners.get(self._client.keyslot(key)) == name:
                break
        return key

    def _node_is_suspect(self) -> None:
        self.doubt()
        self.breaker.record(Event.FAILED)

    def _node_changed(self, breaker: Breaker) -> None:
        if breaker.up:
            log.info("dependency_recovered", dependency=breaker.name)
        else:
            log.warning("dependency_down", dependency=breaker.name)
            self.doubt()
            self.breaker.record(Event.REFUSED)


def _unless_failed(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


class ClusterMessages:
    """The newest messages of each channel, as `RecentMessages` has them in one server: each channel
    by a script of its own, all that go to one node in one trip, and all nodes at the same time.

    Args:
        size, ttl, seconds: as there; `seconds` for each node.
    """

    def __init__(
        self, cluster: Cluster, keys: Keys, *, size: int, ttl: int, seconds: float
    ) -> None:
        self._cluster = cluster
        self._keys = keys
        self._size = size
        self._ttl = ttl
        self._seconds = seconds
        self._read = Script("read_recent")
        self._write = Script("write_recent")

    def serves(self, channel_id: int) -> bool:
        """Whether it is worth asking for a channel: its node is known and up. Plain."""
        node = self._cluster.node_of(self._keys.recent(channel_id))
        return node is not None and node.breaker.up

    async def read(self, channel_ids: Sequence[int]) -> list[list[Record] | Exception]:
        """What Redis has of each channel, by sequence number; proves nothing.

        Returns:
            `StoreUnavailable` in the place of those whose nodes are down or hang.
        """
        found: dict[int, list[Record]] = {}

        async def read_from(node: Node, part: list[int]) -> None:
            commands = [(self._read, self._keys.recent(channel_id), ()) for channel_id in part]
            with suppress(StoreUnavailable):
                answers = await self._attempt("read", node, self._cluster.ask, node, commands)
                for channel_id, answer in zip(part, answers, strict=True):
                    found[channel_id] = decode_records(answer[0])

        async with trio.open_nursery() as nursery:
            for node, part in self._by_node(channel_ids, lambda channel_id: channel_id).items():
                nursery.start_soon(read_from, node, part)
        return [found.get(channel_id, StoreUnavailable()) for channel_id in channel_ids]

    async def write(self, writes: Sequence[Write]) -> None:
        """Add messages to their sets, trim, and publish; each channel's in order. What a node that
        is down or hangs did not take is counted, and holds no other up for more than `seconds`."""
        left = sum(len(records) for _, records, _ in writes)

        async def write_to(node: Node, part: list[Write]) -> None:
            nonlocal left
            commands = [self._command(write) for write in part]
            with suppress(StoreUnavailable):
                await self._attempt("write", node, self._cluster.ask, node, commands)
                left -= sum(len(records) for _, records, _ in part)

        async with trio.open_nursery() as nursery:
            for node, part in self._by_node(writes, lambda write: write[0]).items():
                nursery.start_soon(write_to, node, part)
        REDIS_WRITES_DROPPED.inc(left)

    async def probe(self) -> bool:
        """Whether each slot has a node that answers and lets us do what we do. Never raises."""
        nodes = list(self._cluster.nodes.values())

        async def probe_node(node: Node) -> None:
            if not node.breaker.up:
                node.breaker.record(Event.PROBING)
            with suppress(StoreUnavailable):
                await self._attempt("probe", node, self.try_out, node, not node.breaker.up)

        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(probe_node, node)
        if not self._cluster.covered or any(node.breaker.suspect for node in nodes):
            self._cluster.doubt()
            return False
        self._cluster.breaker.record(Event.SUCCEEDED)
        return True

    async def try_out(self, node: Node, read: bool = True) -> None:
        """Run the scripts at a node, with all that they do, on a key that is for this alone.
        Asyncio-flavoured.

        Raises:
            RedisError, OSError
        """
        writes = trial_arguments(node.trial, b"SPUBLISH")
        await self._cluster.ask(node, [(self._write, node.trial, args) for args in writes])
        if read:
            await self._cluster.ask(node, [(self._read, node.trial, ())])

    def _command(self, write: Write) -> tuple[Script, bytes, Sequence[Any]]:
        (key,), args = write_arguments(
            [write], keys=self._keys, size=self._size, ttl=self._ttl, publish=b"SPUBLISH"
        )
        return self._write, key, args

    def _by_node(
        self, items: Iterable[Any], channel: Callable[[Any], int]
    ) -> dict[Node, list[Any]]:
        parts: dict[Node, list[Any]] = {}
        for item in items:
            node = self._cluster.node_of(self._keys.recent(channel(item)))
            if node is None:
                self._cluster.doubt()
            elif node.breaker.up:
                parts.setdefault(node, []).append(item)
        return parts

    async def _attempt(self, operation: str, node: Node, *call: Any) -> Any:
        bridge = self._cluster.bridge
        return await attempt(operation, node.breaker, self._seconds, bridge.run, *call)


class NodeFeed(Feed):
    """One node's. It does not know which channels are the node's: who wants them here does."""

    def __init__(self, cluster: Cluster, node: Node, keys: Keys, **listeners: Any) -> None:
        client = cluster.client_of(node)
        super().__init__(cluster.bridge, client, keys, breaker=node.breaker, **listeners)
        self._cluster = cluster
        self.late: set[int] = set()
        """Channels that were somewhere else before, or here, and whose messages nobody heard
        until they are confirmed."""
        self._refused = False
        """The node does not have the slot of some channel that is wanted here."""

    async def serve(self) -> None:
        try:
            await super().serve()
        finally:
            with trio.move_on_after(CLOSE_SECONDS, shield=True), suppress(RedisError, OSError):
                await self._bridge.run(self._client.aclose)

    @property
    def hears_all(self) -> bool:
        return self.connected and not self.late

    def drop(self, channel_id: int) -> None:
        self.late.discard(channel_id)
        super().drop(channel_id)

    def ask_again(self) -> None:
        """For what was refused and is still wanted here. Plain."""
        if self._refused:
            self._refused = False
            again = {each for each, wanted in self._wanted.items() if not wanted.confirmed}
            self.late |= again
            self._pending |= again
            self._changed.set()

    def _name(self, channel_id: int) -> bytes:
        return self._keys.control if channel_id == CONTROL else self._keys.live(channel_id)

    async def _connect(self, pubsub: PubSub) -> None:
        await self._tell(pubsub, pubsub.connect)

    async def _subscribe(self, pubsub: PubSub, channel_ids: list[int]) -> None:
        await self._tell_each(pubsub, "SSUBSCRIBE", channel_ids)

    async def _unsubscribe(self, pubsub: PubSub, channel_ids: list[int]) -> None:
        await self._tell_each(pubsub, "SUNSUBSCRIBE", channel_ids)

    async def _tell_each(self, pubsub: PubSub, command: str, channel_ids: list[int]) -> None:
        """One command for each, for the channels of one must be of one slot."""
        REDIS_ROUND_TRIPS.labels(command.lower()).inc()
        connection: Any = pubsub.connection
        packed = connection.pack_commands([(command, self._name(each)) for each in channel_ids])
        with trio.fail_after(SILENCE_SECONDS):
            await self._bridge.run(connection.send_packed_command, packed)

    async def _read(self, pubsub: PubSub) -> None:
        connection: Any = pubsub.connection
        while True:
            try:
                answer = await connection.read_response(timeout=math.inf, push_request=True)
            except MovedError:
                self._refuse()
                continue
            self._heard = trio.current_time()
            if not isinstance(answer, list):  # of a ping, while nothing is subscribed
                self._take_pong(answer)
                continue
            kind, name, *rest = answer
            if kind == b"smessage":
                self._take(name, rest[0])
            elif kind == b"pong":
                self._take_pong(name)
            elif kind in (b"ssubscribe", b"sunsubscribe"):
                channel_id = CONTROL if name == self._keys.control else self._keys.channel_of(name)
                if (wanted := self._wanted.get(channel_id)) is None:
                    continue
                if kind == b"ssubscribe":
                    wanted.confirm()
                    if channel_id in self.late:
                        self.late.discard(channel_id)
                        self._on_missed()
                elif wanted.confirmed:  # else it is the answer to one of ours
                    wanted.confirmed = False
                    self.late.add(channel_id)
                    self._refuse()

    def _has_tried(self) -> bool:
        return super()._has_tried() or self._refused  # by another node, of which the slot is

    def _refuse(self) -> None:
        self._refused = True
        self._cluster.doubt()


class ClusterFeed:
    """Word of new messages and of evictions from all nodes: see `Feed`, of which each has one."""

    def __init__(
        self,
        cluster: Cluster,
        keys: Keys,
        *,
        on_records: Callable[[Sequence[tuple[int, Record]]], None],
        on_evicted: Callable[[Sequence[Eviction]], None],
        on_missed: Callable[[], None],
    ) -> None:
        self._cluster = cluster
        self._keys = keys
        self._listeners = {
            "on_records": on_records,
            "on_evicted": on_evicted,
            "on_missed": on_missed,
        }
        self._wanted: dict[int, NodeFeed | None] = {CONTROL: None}
        """Where each channel is listened to; nowhere, while its node is not known."""
        self._feeds: dict[str, tuple[NodeFeed, trio.CancelScope]] = {}

    @property
    def connected(self) -> bool:
        """Whether nothing passes unheard: every slot's node is connected, and has its channels."""
        return self._cluster.covered and all(
            name in self._feeds and self._feeds[name][0].hears_all for name in self._cluster.nodes
        )

    def want(self, channel_id: int) -> None:
        """Listen to a channel from now on."""
        if channel_id not in self._wanted:
            self._wanted[channel_id] = None
            self._place(channel_id, late=False)

    def drop(self, channel_id: int) -> None:
        """Listen to it no more."""
        feed = self._wanted.pop(channel_id, None)
        if feed is not None:
            feed.drop(channel_id)

    async def listening(self, channel_id: int, *, seconds: float) -> bool:
        """Wait until a wanted channel is subscribed, at most `seconds`; not at all if its node is
        known to be down, or not known."""
        feed = self._wanted.get(channel_id)
        if feed is not None:
            with trio.move_on_after(seconds):  # its own clock ends with it when its node leaves
                return await feed.listening(channel_id, seconds=seconds)
        return False

    async def serve(self) -> None:
        """Keep a connection to each node until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cluster.serve)
                placed: dict[int, str] = {}
                while True:
                    self._cluster.learned = trio.Event()
                    owners = self._cluster.owners
                    if owners is not placed:
                        self._keep_feeds(nursery)
                        await self._place_all()
                        placed = owners
                    for feed, _ in self._feeds.values():
                        feed.ask_again()
                    await self._cluster.learned.wait()
        finally:
            self._feeds.clear()
            self._wanted = dict.fromkeys(self._wanted)

    def _keep_feeds(self, nursery: trio.Nursery) -> None:
        for name in self._feeds.keys() - self._cluster.nodes.keys():
            self._feeds.pop(name)[1].cancel()
        for name, node in self._cluster.nodes.items():
            if name not in self._feeds:
                feed = NodeFeed(self._cluster, node, self._keys, **self._listeners)
                scope = trio.CancelScope()
                self._feeds[name] = (feed, scope)
                nursery.start_soon(_serve_in, scope, feed)

    async def _place_all(self) -> None:
        for count, channel_id in enumerate(list(self._wanted)):
            if count % PLACE_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if channel_id in self._wanted:
                self._place(channel_id, late=True)

    def _place(self, channel_id: int, *, late: bool) -> None:
        name = self._keys.control if channel_id == CONTROL else self._keys.live(channel_id)
        node = self._cluster.node_of(name)
        feed = None if node is None or node.name not in self._feeds else self._feeds[node.name][0]
        before = self._wanted[channel_id]
        if feed is before:
            return
        self._wanted[channel_id] = feed
        if before is not None:
            before.drop(channel_id)
        if feed is not None:
            feed.want(channel_id)
            if late:
                feed.late.add(channel_id)


async def _serve_in(scope: trio.CancelScope, feed: NodeFeed) -> None:
    with scope:
        await feed.serve()
