"""Measures points: one server at a time, one load after the other, and what each has used.

Each worker has a core; the client, PostgreSQL and Valkey have the other, which of two workers the
second one shares. What is counted is CPU time by process, so that nobody's share is another's.
A window in which the machine was slow is measured again, see `pace`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

from bench.capacity.crowd import Channels, Crowd, Driver
from bench.capacity.meters import Counts, Meters
from bench.capacity.pace import CALM, Pace, Values, slowness
from bench.capacity.points import (
    GROUP_STREAMS,
    GROUPS,
    SINGLES,
    SOON,
    Load,
    Measured,
    Session,
)
from bench.client import Page, Posts, Refused, Streams
from bench.machine import CORES
from bench.scenarios.connect import HISTORY, write_history
from bench.scenarios.idle import FIRST_STREAMS
from bench.statistics import percentile
from bench.subjects import Pair, Sottovoce, sottovoce

WARM_SECONDS = 1.5
CONNECTS_WARM_SECONDS = 2.5
"""Until streams leave as they come."""
CONNECTIONS = 128
"""That send: with fewer a slow answer would hold up what is due."""
TOGETHER = 20
"""Channels whose first people come before their second ones."""
TRIES = 4
"""Of a load in a round, while the machine is slow. Once where it is watched for long."""
LOOK_SECONDS = 1.0
LOOKS = 4
"""At the pace of the machine before anything is measured."""
SETTLE_SECONDS = 2.0
"""After streams were opened: for what that left to do."""
QUIET_TIMES = 7.5
"""As long is a window in which nobody says or opens anything. Little is used there, and not
evenly: 30 s are SOTTOVOCE_RECHECK_SECONDS, in which everything that comes again has come."""


def sessions_seconds(sessions: Sequence[Session], *, seconds: float, rounds: int) -> float:
    """About how long they take: 1,500 streams are seeded and 1,800 opened in a second."""
    total = 0.0
    for session in sessions:
        total += 12 + session.most_streams * (1 / 1_500 + 1 / 1_800)
        total += sum(_window_seconds(point.load, seconds) + 2.5 for point in session.points)
    return rounds * total


class Bench:
    """A server with people on its channels, and more of them as they are asked for.

    Attributes:
        crowd: all streams.
    """

    def __init__(
        self, server: Sottovoce, crowd: Crowd, posts: Posts, comers: Sequence[Pair]
    ) -> None:
        self.server = server
        self.crowd = crowd
        self.posts = posts
        self._pools: dict[int, list[Pair]] = {1: [], 2: [], GROUP_STREAMS: []}
        self._fresh = iter(server.pairs)
        # Of each channel one person comes first, to a page from PostgreSQL, and the other soon
        # after, to one that the worker remembers: as when a node has died.
        self._comers = iter(
            server.stream_request(pair, side)
            for start in range(0, len(comers), TOGETHER)
            for side in (True, False)
            for pair in comers[start : start + TOGETHER]
        )

    def open(self, streams: int) -> None:
        """So many in all: some channels with one, some with several, all others with two."""
        missing = streams - len(self.crowd)
        requests: list[bytes] = []
        if streams and not self._pools[1]:
            for _ in range(SINGLES):
                pair = self._take(1)
                requests.append(self.server.stream_request(pair, True))
            for _ in range(GROUPS):
                pair = self._take(GROUP_STREAMS)
                sides = [device % 2 == 0 for device in range(GROUP_STREAMS)]
                requests += [self.server.stream_request(pair, side) for side in sides]
        while len(requests) < missing:
            pair = self._take(2)
            requests += [self.server.stream_request(pair, side) for side in (True, False)]
        if requests:
            self.crowd.open(requests, page=self.server.page)

    def driver(self, load: Load, *, seed: int) -> Driver:
        return Driver(
            self.server,
            self.crowd,
            self.posts,
            channels=Channels(self._pools[load.fanout], load.fanout),
            sends=load.sends,
            characters=load.characters,
            connects=load.connects,
            comers=self._comers if load.connects else None,
            seed=seed,
        )

    @property
    def channels(self) -> int:
        """All that have streams which stay."""
        return sum(map(len, self._pools.values()))

    def talking(self, fanout: int) -> int:
        """Channels that a load of this fan-out is spread over."""
        return len(self._pools[fanout])

    def _take(self, fanout: int) -> Pair:
        pair = next(self._fresh)
        self._pools[fanout].append(pair)
        return pair


def measure(
    sessions: Sequence[Session],
    *,
    seconds: float,
    rounds: int,
    pace: Pace,
    say: Callable[[str], None],
    stored: Callable[[Counts], None],
) -> Iterator[Measured]:
    """Every point of every session in each round; every second round has the sessions the other
    way round. So what drifts on the machine, over minutes, meets all of them alike.

    Args:
        seconds: of one window.
        stored: gets what each session has left in the stores: `Meters.storage`.

    Raises:
        Refused: a stream or a send was not served; nothing that is measured comes near a limit.
    """
    seen: list[Values] = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        time.sleep(LOOK_SECONDS)
        seen.append(pace.between(began, time.perf_counter()))
    for number in range(rounds):
        for session in sessions if number % 2 == 0 else reversed(sessions):
            yield from _measure(session, seconds, number, pace, seen, say, stored)


def _measure(
    session: Session,
    seconds: float,
    rounds_before: int,
    pace: Pace,
    seen: list[Values],
    say: Callable[[str], None],
    stored: Callable[[Counts], None],
) -> Iterator[Measured]:
    settings = {
        "SOTTOVOCE_HEARTBEAT_SECONDS": str(session.heartbeat),
        "SOTTOVOCE_ACCESS_CACHE_SECONDS": str(SOON),
    }
    arrivals = TRIES * sum(
        point.load.connects * (seconds + CONNECTS_WARM_SECONDS + 0.5) for point in session.points
    )
    say(f"starting {session.workers} worker(s), heartbeat {session.heartbeat:g} s")
    with sottovoce(session.workers, pairs=1, settings=settings) as server:
        # Chance may bring more: five standard deviations.
        comers = (
            server.seed(math.ceil((arrivals + 5 * math.sqrt(arrivals)) / 2)) if arrivals else []
        )
        write_history(server.database_url, HISTORY)  # of those who come; all others have none
        if session.most_streams:
            server.pairs = server.seed(session.most_streams // 2 + SINGLES)
        with (
            Meters(server) as meters,
            Crowd(server.addresses, page=Page(b'"connected"', HISTORY)) as crowd,
            Posts(server.addresses[0], CONNECTIONS) as posts,
        ):
            crowd.watch(posts.fd, posts.read)
            bench = Bench(server, crowd, posts, comers)
            meters.clean()
            crowded = float(session.workers >= len(CORES))
            with Streams(server.addresses) as few:  # what is made once is no stream's
                few.open(server.stream_requests(FIRST_STREAMS), page=server.page)
            kernel = meters.memory()["kernel"]
            most_connects = 0.0
            for number, point in enumerate(session.points):
                load = point.load
                say(load.name + (" (held out)" if point.held_out else ""))
                if load.streams > len(crowd):
                    bench.open(load.streams)
                    bench.driver(Load(), seed=number).run(SETTLE_SECONDS)
                for once in range(TRIES if _window_seconds(load, seconds) == seconds else 1):
                    memory = meters.memory()
                    chance = 100 * (rounds_before * TRIES + once) + number
                    values = window(bench, meters, load, pace=pace, seconds=seconds, seed=chance)
                    slow = slowness(values, seen)
                    seen.append(values)
                    most_connects = max(most_connects, load.connects)
                    if load.connects:  # a worker's memory is at its most when they have come
                        memory = meters.memory()
                    values |= memory | {"kernel": memory["kernel"] - kernel}
                    values |= {"most connects": most_connects, "crowded": crowded}
                    yield Measured(load=load, held_out=point.held_out, values=values)
                    if slow <= CALM:
                        break
                    say(f"the machine was slow, by {slow - 1:.0%}")
            stored(meters.storage())


def window(
    bench: Bench,
    meters: Meters,
    load: Load,
    *,
    seconds: float,
    seed: int,
    pace: Pace | None = None,
) -> dict[str, float]:
    """One load, kept up until it is even, then measured, then waited for.

    Returns:
        What was used and done, each a second: `worker cpu` (of all) and those of each worker,
        `postgres cpu`, `redis cpu` and `client cpu` in cores; `sends`, `deliveries`, `heartbeats`,
        `connects`; `appends` and `statements` (PostgreSQL's round trips, one commit each), `round
        trips` (Redis'), and what the services count. Besides: `streams` (open, on average),
        `talking` and `channels` (in all), `p50_ms`, `p99_ms`, `p999_ms` from due to delivered,
        `page_ms` (p99 from connecting to the whole page), `lost` (share of deliveries), `turned
        away` (share of connects), `ended` (streams), and what `pace` found.
    """
    crowd = bench.crowd
    driver = bench.driver(load, seed=seed)
    crowd.forget()
    crowd.turned_away = 0
    ended = crowd.lost
    driver.run(CONNECTS_WARM_SECONDS if load.connects else WARM_SECONDS if load.sends else 0.5)
    began = time.perf_counter()
    before = meters.read()
    done = _counts(bench)
    streams = len(crowd)
    meter = driver.run(_window_seconds(load, seconds))
    busy = meter.busy
    streams = (streams + len(crowd)) // 2
    now = _counts(bench)
    after = meters.read()
    found = pace.between(began, time.perf_counter()) if pace else {}
    driver.drain()
    took = after["seconds"] - before["seconds"]
    values = {name: (after[name] - before[name]) / took for name in after if name != "seconds"}
    latencies = sorted(crowd.latencies)
    pages = sorted(crowd.came)
    values |= found | {
        "client cpu": busy,
        **{name: (now[name] - done[name]) / took for name in now},
        "streams": float(streams),
        "talking": float(bench.talking(load.fanout)),
        "channels": float(bench.channels),
        "lost": 1 - len(latencies) / driver.expected if driver.expected else 0.0,
        "turned away": crowd.turned_away / len(pages) if pages else 0.0,
        "ended": float(crowd.lost - ended),
    }
    if load.sends and not latencies:
        raise Refused("no message arrived")
    for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999)):
        if latencies:
            values[name] = percentile(latencies, share) * 1000
    if pages:
        values["page_ms"] = percentile(pages, 0.99) * 1000
    return values


def _counts(bench: Bench) -> Counts:
    crowd = bench.crowd
    return {
        "sends": float(bench.posts.answered),
        "deliveries": float(len(crowd.latencies)),
        "heartbeats": float(crowd.heartbeats),
        "connects": float(len(crowd.came)),
        "stream bytes": float(crowd.bytes),
    }


def _window_seconds(load: Load, seconds: float) -> float:
    return seconds if load.sends or load.connects else QUIET_TIMES * seconds
