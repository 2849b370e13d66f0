"""Measures points: one server at a time, one load after the other, and what each has used.

Each worker has a core; the client, PostgreSQL and Valkey have the other, which of two workers the
second one shares. What is counted is CPU time by process, so that nobody's share is another's.
"""

from collections.abc import Callable, Iterator, Sequence

from bench.capacity.crowd import Channels, Crowd, Driver
from bench.capacity.meters import Counts, Meters
from bench.capacity.points import (
    GROUP_STREAMS,
    GROUPS,
    SINGLES,
    Load,
    Measured,
    Session,
)
from bench.client import Page, Posts, Refused
from bench.scenarios.connect import HISTORY, write_history
from bench.statistics import percentile
from bench.subjects import Pair, Sottovoce, sottovoce

WARM_SECONDS = 2.5
"""Until streams come and go evenly, and every worker has a part in it."""
CONNECTIONS = 128
"""That send: with fewer a slow answer would hold up what is due."""
SETTLE_SECONDS = 2.0
QUIET_SECONDS_AT_LEAST = 8.0


def sessions_seconds(sessions: Sequence[Session], seconds: float) -> float:
    """About how long they take."""
    total = 0.0
    for session in sessions:
        total += 8 + session.most_streams * (1 / 1_500 + 1 / 1_800)
        total += sum(_window_seconds(p.load, seconds) + 3.5 for p in session.points)
    return total


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
        self.grown: dict[int, int] = {}
        self._pools: dict[int, list[Pair]] = {1: [], 2: [], GROUP_STREAMS: []}
        self._fresh = iter(server.pairs)
        self._comers = iter(
            server.stream_request(pair, side) for side in (True, False) for pair in comers
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

    def talking(self, fanout: int) -> int:
        """Channels that a load of this fan-out is spread over."""
        return len(self._pools[fanout])

    def _take(self, fanout: int) -> Pair:
        pair = next(self._fresh)
        self._pools[fanout].append(pair)
        return pair


def measure(
    sessions: Sequence[Session], *, seconds: float, say: Callable[[str], None]
) -> Iterator[Measured]:
    """Every point of every session.

    Args:
        seconds: of one window.

    Raises:
        Refused: a stream or a send was not served; nothing that is measured comes near a limit.
    """
    for session in sessions:
        yield from _measure(session, seconds, say)


def _measure(session: Session, seconds: float, say: Callable[[str], None]) -> Iterator[Measured]:
    settings = {"SOTTOVOCE_HEARTBEAT_SECONDS": str(session.heartbeat)}
    arrivals = sum(
        point.load.connects * (_window_seconds(point.load, seconds) + WARM_SECONDS + 1)
        for point in session.points
    )
    say(f"starting {session.workers} worker(s), heartbeat {session.heartbeat:g} s")
    with sottovoce(session.workers, pairs=1, settings=settings) as server:
        comers = server.seed(int(arrivals * 1.1 / 2) + 10) if arrivals else []
        write_history(server.database_url, HISTORY)  # of those who come; all others have none
        if session.most_streams:
            server.pairs = server.seed(session.most_streams // 2 + SINGLES)
        page = Page(b'"connected"', HISTORY)
        with (
            Meters(server) as meters,
            Crowd(server.addresses, page=page) as crowd,
            Posts(server.addresses[0], CONNECTIONS) as posts,
        ):
            crowd.watch(posts.fd, posts.read)
            bench = Bench(server, crowd, posts, comers)
            meters.checkpoint()
            first: Counts = {}
            for number, point in enumerate(session.points):
                load = point.load
                say(load.name + (" (held out)" if point.held_out else ""))
                bench.open(load.streams)
                bench.driver(Load(), seed=number).run(SETTLE_SECONDS)
                if not first:
                    first = meters.memory()
                memory = meters.memory()
                values = window(bench, meters, load, seconds=seconds, seed=number)
                values |= {name: memory[name] - first[name] for name in memory}
                values["rss before"] = first["rss"]
                yield Measured(load=load, held_out=point.held_out, values=values)
            if session.points[-1].load.streams:
                # The store's own figures, over all that was sent to this server.
                storage = meters.storage()
                say("; ".join(f"{name} {value:,.0f}" for name, value in storage.items()))


def window(
    bench: Bench, meters: Meters, load: Load, *, seconds: float, seed: int
) -> dict[str, float]:
    """One load, kept up until it is even, then measured, then waited for.

    Returns:
        What was used and done, each a second: `worker cpu` (of all) and those of each worker,
        `postgres cpu`, `redis cpu` and `client cpu` in cores; `sends`, `deliveries`, `heartbeats`,
        `connects`; `appends` and `statements` (PostgreSQL's round trips, one commit each), `round
        trips` (Redis'), and what the services count. Besides: `streams` (open, on average),
        `talking` (channels), `p50_ms`, `p99_ms`, `p999_ms` from due to delivered, `page_ms` (p99
        from connecting to the whole page), `lost` (share of deliveries), `turned away` (share of
        connects), `ended` (streams).
    """
    crowd = bench.crowd
    driver = bench.driver(load, seed=seed)
    crowd.forget()
    crowd.turned_away = 0
    ended = crowd.lost
    driver.run(WARM_SECONDS if load.sends or load.connects else 0.5)
    before = meters.read()
    done = (len(crowd.latencies), crowd.heartbeats, len(crowd.came), bench.posts.answered)
    streams = len(crowd)
    meter = driver.run(_window_seconds(load, seconds))
    busy = meter.busy
    streams = (streams + len(crowd)) // 2
    delivered, heartbeats, came, answered = (
        now - then
        for now, then in zip(
            (len(crowd.latencies), crowd.heartbeats, len(crowd.came), bench.posts.answered),
            done,
            strict=True,
        )
    )
    after = meters.read()
    driver.drain()
    took = after["seconds"] - before["seconds"]
    values = {name: (after[name] - before[name]) / took for name in after if name != "seconds"}
    latencies = sorted(crowd.latencies)
    pages = sorted(crowd.came)
    values |= {
        "client cpu": busy,
        "sends": answered / took,
        "deliveries": delivered / took,
        "heartbeats": heartbeats / took,
        "connects": came / took,
        "streams": float(streams),
        "talking": float(bench.talking(load.fanout)),
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


def _window_seconds(load: Load, seconds: float) -> float:
    """A quiet one takes a whole round of heartbeats: streams opened together have theirs so."""
    if load.sends or load.connects:
        return seconds
    return max(QUIET_SECONDS_AT_LEAST, load.heartbeat + 1) if load.streams else seconds
