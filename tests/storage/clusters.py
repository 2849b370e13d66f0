"""A real cluster of Valkeys, each node a primary with a third of the slots."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from storage.embedded import EmbeddedValkey
from storage.redis import Keys
from tests.storage.test_sentinel import free_ports
from tests.support.chat import eventually
from tests.support.services import Database

SLOTS = 16384
SECONDS = 20.0


class Cluster:
    def __init__(self, nodes: Sequence[EmbeddedValkey]) -> None:
        self.nodes = list(nodes)

    @property
    def url(self) -> str:
        """Names two of the nodes only, the last one first."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:0:-1])
        return f"redis-cluster://:{self.nodes[0].password}@{hosts}"

    @cached_property
    def ids(self) -> list[str]:
        return [self.ask(number, "CLUSTER MYID").decode() for number in range(3)]

    def ask(self, number: int, *command: str | int | bytes) -> Any:
        with redis.Redis.from_url(self.nodes[number].url) as client:
            return client.execute_command(*command)

    def owner(self, slot: int) -> int:
        """The number of the node that it began at."""
        return slot * 3 // SLOTS

    def channels(self, database: Database, candidates: Sequence[int]) -> list[int]:
        """One of the candidates on each node, in the nodes' order."""
        keys = Keys(database.conninfo)
        found: dict[int, int] = {}
        for channel_id in candidates:
            found.setdefault(self.owner(key_slot(keys.live(channel_id))), channel_id)
        return [found[number] for number in range(3)]

    def move(self, slot: int, *, source: int, target: int) -> None:
        """As a resharding tool does (cluster specification, "Live resharding")."""
        password = self.nodes[0].password
        self.ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", self.ids[source])
        self.ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", self.ids[target])
        keys = self.ask(source, "CLUSTER GETKEYSINSLOT", slot, 100)
        to = ("127.0.0.1", self.nodes[target].port, "", 0, 5000, "AUTH", password)
        if keys:
            self.ask(source, "MIGRATE", *to, "KEYS", *keys)
        for number in (target, source, *{0, 1, 2} - {target, source}):
            self.ask(number, "CLUSTER SETSLOT", slot, "NODE", self.ids[target])

    def is_well(self) -> bool:
        """Whether all nodes know each other, and who has which slot."""
        about = [self.ask(number, "CLUSTER INFO") for number in range(3)]
        return all(
            (each["cluster_state"], each["cluster_slots_ok"]) == ("ok", str(SLOTS))
            for each in about
        )


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        nodes: list[EmbeddedValkey] = []
        for number, port in enumerate(free_ports(3)):
            node = EmbeddedValkey(
                folder / f"node-{number}",
                durable=False,
                password=nodes[0].password if nodes else None,
                config={
                    "cluster-enabled": "yes",
                    "cluster-port": port,  # of the bus
                    "cluster-node-timeout": 1000,
                    "cluster-require-full-coverage": "no",  # what is left goes on
                },
            )
            nodes.append(stack.enter_context(node))
        cluster = Cluster(nodes)
        bounds = [-(-SLOTS * number // 3) for number in range(4)]
        for number in range(3):
            cluster.ask(number, "CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            cluster.ask(number, "CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            bus = node._config["cluster-port"]
            cluster.ask(0, "CLUSTER MEET", "127.0.0.1", node.port, bus)
        eventually(cluster.is_well, seconds=SECONDS)
        yield cluster
