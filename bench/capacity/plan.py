"""From what users do to what to buy: a pure function of a fit and a deployment.

The rule for headroom is in `Headroom` and is said with every answer. Nothing here measures.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from bench.capacity.model import LIKELY, Estimate, Model
from bench.capacity.points import CHARACTERS, HEARTBEAT_SECONDS, Load

GIGABYTE = 1e9
YEAR_SECONDS = 365 * 86_400.0
PORTS = 28_232
"""From one address to another: net.ipv4.ip_local_port_range is 32768 to 60999 by itself."""
WIDE_PORTS = 64_512
"""The same from 1024 to 65535."""
WORKER_STREAMS = 18_000
"""SOTTOVOCE_MAX_STREAMS."""
WORKER_FILES = 1_000
"""Descriptors of a worker besides its streams' : those who send, and its own."""
DB_CONNECTIONS = 8
"""SOTTOVOCE_DB_CONNECTIONS."""
REDIS_CONNECTIONS = 4
"""Of a worker to each Redis server, at the most: commands in a pool, and one that listens."""
KEPT = 50
"""SOTTOVOCE_HISTORY_SIZE: messages of a channel in Redis."""
MOST_NODES = 100_000
PAGE_BYTES = 8_192
PAGES_PER_SEND = 3
"""Of PostgreSQL's pages that a send touches at random: the channel's row and two indexes of ids.
Each is written to the log as a whole the first time after a checkpoint."""


class Unplannable(ValueError):
    """What was asked makes no sense, or cannot be had."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What users do at the busiest moment, and what a node is.

    Attributes:
        clients: streams open.
        sends_per_second: over all of them.
        reconnect_within: seconds in which the clients of a dead node come back.
        cores, memory_gb: of a node; each core has a worker.
        fanout: streams that hear of a message.
        heartbeat: seconds, SOTTOVOCE_HEARTBEAT_SECONDS.
        stay_seconds: that a stream lasts. Not clients but sessions decide: a Clerk token lives for
            a minute, and its stream 270 to 300 s longer (SOTTOVOCE_SESSION_LEASE_SECONDS).
        characters: of a message.
        mean_share: of the year's mean rates in those of the busiest moment.
    """

    clients: int
    sends_per_second: float
    reconnect_within: float = 60.0
    cores: int = 8
    memory_gb: float = 32.0
    fanout: int = 2
    heartbeat: float = HEARTBEAT_SECONDS
    stay_seconds: float = 315.0
    characters: int = CHARACTERS
    mean_share: float = 0.3

    def __post_init__(self) -> None:
        """
        Raises:
            Unplannable: a figure is none, or out of the question.
        """
        for name, least, most in (
            ("clients", 1, 1e9),
            ("sends_per_second", 0, 1e9),
            ("reconnect_within", 1, 86_400),
            ("cores", 1, 1_024),
            ("memory_gb", 0.5, 65_536),
            ("fanout", 1, 1_000),
            ("heartbeat", 1, 3_600),
            ("stay_seconds", 10, 14_400),
            ("characters", 1, 8_000),
            ("mean_share", 0.001, 1),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise Unplannable(f"{name} is {value:g}: it must be {least:g} to {most:g}")


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """Shares that may be used. The worst hour's leave room for what no measurement has seen.

    Attributes:
        postgres_most_cores: of the largest machine that one would buy for the one primary; more
            messages than that carries need several deployments.
    """

    normal_cpu: float = 0.60
    worst_cpu: float = 0.85
    memory: float = 0.75
    streams: float = 0.90
    redis_cpu: float = 0.50
    postgres_cpu: float = 0.50
    postgres_most_cores: int = 64

    def __str__(self) -> str:
        return (
            f"workers at most {self.normal_cpu:.0%} of their cores, {self.worst_cpu:.0%} while a "
            f"dead node's clients return; memory {self.memory:.0%} and {self.streams:.0%} of "
            f"{WORKER_STREAMS:,} streams per worker with a node gone; Redis {self.redis_cpu:.0%} "
            f"of its one core and PostgreSQL {self.postgres_cpu:.0%} of its cores meanwhile"
        )


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes at rest, as measured.

    Attributes:
        message_row: in PostgreSQL, with indexes, of a message of `characters`.
        audit_row: with indexes; a send has one, a stream two.
        redis_message: of one kept message of `characters`.
        redis_channel: of a channel's key, besides its messages.
        redis_subscription: of a channel that a worker listens to.
    """

    characters: float
    message_row: float
    audit_row: float
    redis_message: float
    redis_channel: float
    redis_subscription: float


class Range(NamedTuple):
    """A whole number, and what it might be by the fit's errors."""

    low: int
    value: int
    high: int

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:,}"
        return f"{self.value:,} ({self.low:,} to {self.high:,})"


class Saturation(NamedTuple):
    """Something that can be full.

    Attributes:
        used: share of its limit in the worst hour.
        allowed: by the headroom rule.
    """

    what: str
    used: float
    allowed: float


class Answer(NamedTuple):
    """What to buy. Rates are of the busiest moment; those of `worst_…` with a node gone and its
    clients on their way back.
    """

    deployment: Deployment
    headroom: Headroom
    nodes: Range
    workers: int
    streams_per_worker: float
    normal_cpu: Estimate
    node_memory: Estimate
    connects: float
    egress: Estimate

    returning: int
    worst_connects: float
    worst_streams_per_worker: float
    worst_cpu: Estimate
    worst_memory: Estimate
    fastest_return: float
    everybody_back: float

    redis_commands: Estimate
    redis_in: Estimate
    redis_out: Estimate
    redis_cpu: Estimate
    redis_shards: Range
    redis_memory: float

    commits: Estimate
    postgres_cpu: Estimate
    postgres_cores: Range
    wal: Estimate
    wal_most: float
    message_storage: float
    audit_storage: float
    postgres_connections: int

    load_balancer_connections: int
    ports_per_node: int
    addresses_per_node: int
    files_per_worker: int
    saturations: list[Saturation]
    extrapolated: list[str]


class Known(NamedTuple):
    """How far was measured: the most of each, in one deployment."""

    workers: int
    streams_per_worker: float
    sends_per_worker: float
    connects_per_worker: float
    redis_commands: float
    commits: float


def plan(
    model: Model,
    storage: Storage,
    deployment: Deployment,
    *,
    known: Known | None = None,
    headroom: Headroom | None = None,
) -> Answer:
    """What it takes.

    Args:
        known: to say what is beyond it.

    Raises:
        Unplannable: no number of such nodes carries it.
    """
    rule = headroom or Headroom()
    machine = _Machine(model, storage, deployment, rule)
    low, value, high = (machine.nodes(sigmas) for sigmas in (-LIKELY, 0.0, LIKELY))
    nodes = Range(low, value, high)
    workers = value * deployment.cores
    survivors = (value - 1) * deployment.cores
    normal = machine.load(value)
    worst = machine.load(value - 1, lost_of=value)
    worst_redis = model.predict("redis cpu", worst)
    shards = machine.shards(worst_redis)
    worst_postgres = model.predict("postgres cpu", worst)
    sends, characters = deployment.sends_per_second, deployment.characters
    wal = model.predict("wal bytes", normal)
    year = YEAR_SECONDS * deployment.mean_share
    message = storage.message_row + characters - storage.characters
    redis_cpu = model.predict("redis cpu", normal)
    answer = Answer(
        deployment=deployment,
        headroom=rule,
        nodes=nodes,
        workers=workers,
        streams_per_worker=deployment.clients / workers,
        normal_cpu=_shared(model.predict("worker cpu", normal), workers),
        node_memory=machine.node_memory(value),
        connects=normal.connects,
        egress=model.predict("stream bytes", normal),
        returning=math.ceil(deployment.clients / value),
        worst_connects=worst.connects,
        worst_streams_per_worker=deployment.clients / survivors,
        worst_cpu=_shared(model.predict("worker cpu", worst), survivors),
        worst_memory=machine.node_memory(value - 1, connects=worst.connects),
        fastest_return=machine.fastest(
            lambda seconds: machine.load(value - 1, lost_of=value, within=seconds), survivors
        ),
        everybody_back=machine.fastest(
            lambda seconds: machine.load(value, lost_of=1, within=seconds), workers
        ),
        redis_commands=model.predict("redis commands", normal),
        redis_in=model.predict("redis bytes in", normal),
        redis_out=model.predict("redis bytes out", normal),
        redis_cpu=redis_cpu,
        redis_shards=shards,
        redis_memory=machine.redis_memory(workers),
        commits=model.predict("statements", normal),
        postgres_cpu=model.predict("postgres cpu", normal),
        postgres_cores=Range(
            *(
                max(1, math.ceil(worst_postgres.at(sigmas) / rule.postgres_cpu))
                for sigmas in (-LIKELY, 0.0, LIKELY)
            )
        ),
        wal=wal,
        wal_most=wal.value + sends * PAGES_PER_SEND * PAGE_BYTES,
        message_storage=sends * message * year,
        audit_storage=(sends + 2 * normal.connects) * storage.audit_row * year,
        postgres_connections=workers * DB_CONNECTIONS,
        load_balancer_connections=2 * deployment.clients,
        ports_per_node=math.ceil(deployment.clients / (value - 1)),
        addresses_per_node=math.ceil(deployment.clients / (value - 1) / PORTS),
        files_per_worker=math.ceil(deployment.clients / survivors) + WORKER_FILES,
        saturations=[],
        extrapolated=[],
    )
    return answer._replace(
        saturations=_saturations(answer, worst_redis, shards.value, worst_postgres),
        extrapolated=_beyond(answer, worst, known) if known else [],
    )


class _Machine:
    """The questions that need the model, for one deployment."""

    def __init__(
        self,
        model: Model,
        storage: Storage,
        deployment: Deployment,
        rule: Headroom,
    ) -> None:
        self._model = model
        self._storage = storage
        self._deployment = deployment
        self._rule = rule

    def load(self, nodes: int, *, lost_of: int | None = None, within: float | None = None) -> Load:
        """On so many nodes.

        Args:
            lost_of: one of so many nodes has died, and its clients return.
            within: seconds; by default what the deployment says.
        """
        deployment = self._deployment
        connects = deployment.clients / deployment.stay_seconds
        if lost_of is not None:
            connects += deployment.clients / lost_of / (within or deployment.reconnect_within)
        return Load(
            workers=nodes * deployment.cores,
            streams=deployment.clients,
            heartbeat=deployment.heartbeat,
            sends=deployment.sends_per_second,
            fanout=deployment.fanout,
            connects=connects,
            characters=deployment.characters,
        )

    def nodes(self, sigmas: float) -> int:
        """The fewest; at least two, for one may die.

        Args:
            sigmas: standard errors that every prediction is off by.
        """
        enough = 2
        while not self._carry(enough, sigmas):
            enough *= 2
            if enough > MOST_NODES:
                raise Unplannable("no number of such nodes carries it")
        short = enough // 2
        while enough - short > 1:
            middle = (short + enough) // 2
            if middle >= 2 and self._carry(middle, sigmas):
                enough = middle
            else:
                short = middle
        return max(2, enough)

    def _carry(self, nodes: int, sigmas: float) -> bool:
        deployment, rule = self._deployment, self._rule
        workers, survivors = nodes * deployment.cores, (nodes - 1) * deployment.cores
        worst = self.load(nodes - 1, lost_of=nodes)
        cpu = self._model.predict
        return (
            cpu("worker cpu", self.load(nodes)).at(sigmas) <= rule.normal_cpu * workers
            and cpu("worker cpu", worst).at(sigmas) <= rule.worst_cpu * survivors
            and deployment.clients <= rule.streams * WORKER_STREAMS * survivors
            and self.node_memory(nodes - 1, connects=worst.connects).at(sigmas)
            <= rule.memory * deployment.memory_gb * GIGABYTE
        )

    def node_memory(self, nodes: int, *, connects: float | None = None) -> Estimate:
        """Bytes of workers and the kernel's sockets on one node."""
        load = self.load(nodes)
        if connects is not None:
            load = msgspec.structs.replace(load, connects=connects)
        rss, kernel = self._model.predict("rss", load), self._model.predict("kernel", load)
        return Estimate(
            (rss.value + kernel.value) / nodes,
            math.hypot(rss.error, kernel.error) / nodes,
        )

    def fastest(self, load: Callable[[float], Load], workers: int) -> float:
        """Seconds in which they can all be back with the workers at what the worst hour allows."""
        most = self._rule.worst_cpu * workers
        low, high = 0.01, 86_400.0
        if self._model.predict("worker cpu", load(high)).value > most:
            return math.inf
        for _ in range(60):
            middle = math.sqrt(low * high)
            if self._model.predict("worker cpu", load(middle)).value > most:
                low = middle
            else:
                high = middle
        return high

    def shards(self, worst: Estimate) -> Range:
        return Range(
            *(
                max(1, math.ceil(worst.at(sigmas) / self._rule.redis_cpu))
                for sigmas in (-LIKELY, 0.0, LIKELY)
            )
        )

    def redis_memory(self, workers: int) -> float:
        """Bytes: the newest messages of every channel, and who listens to it."""
        deployment, storage = self._deployment, self._storage
        channels = deployment.clients / deployment.fanout
        message = storage.redis_message + deployment.characters - storage.characters
        listening = workers * (1 - (1 - 1 / workers) ** deployment.fanout)
        return channels * (
            storage.redis_channel + KEPT * message + listening * storage.redis_subscription
        )


def _shared(estimate: Estimate, workers: int) -> Estimate:
    return Estimate(estimate.value / workers, estimate.error / workers)


def _saturations(
    answer: Answer, worst_redis: Estimate, shards: int, worst_postgres: Estimate
) -> list[Saturation]:
    """Fullest first, by what the rule allows."""
    rule, deployment = answer.headroom, answer.deployment
    found = [
        Saturation("workers' CPU, as a rule", answer.normal_cpu.value, rule.normal_cpu),
        Saturation("workers' CPU, worst hour", answer.worst_cpu.value, rule.worst_cpu),
        Saturation(
            "nodes' memory, worst hour",
            answer.worst_memory.value / (deployment.memory_gb * GIGABYTE),
            rule.memory,
        ),
        Saturation(
            "streams per worker, worst hour",
            answer.worst_streams_per_worker / WORKER_STREAMS,
            rule.streams,
        ),
        Saturation(
            "Redis' CPU (each shard), worst hour", worst_redis.value / shards, rule.redis_cpu
        ),
        Saturation(
            f"PostgreSQL's CPU (of {rule.postgres_most_cores} cores), worst hour",
            worst_postgres.value / rule.postgres_most_cores,
            rule.postgres_cpu,
        ),
    ]
    return sorted(found, key=lambda each: -each.used / each.allowed)


def _beyond(answer: Answer, worst: Load, known: Known) -> list[str]:
    """What was not measured as far as this goes."""
    survivors = worst.workers
    beyond = []
    for what, here, measured in (
        ("workers", answer.workers, known.workers),
        ("streams per worker", answer.worst_streams_per_worker, known.streams_per_worker),
        ("sends/s per worker", worst.sends / survivors, known.sends_per_worker),
        ("new streams/s per worker", worst.connects / survivors, known.connects_per_worker),
        ("Redis commands/s", answer.redis_commands.value, known.redis_commands),
        ("PostgreSQL commits/s", answer.commits.value, known.commits),
    ):
        if here > measured:
            beyond.append(f"{what}: {_short(here)}, measured up to {_short(measured)}")
    return beyond


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
