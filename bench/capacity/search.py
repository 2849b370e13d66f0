"""The highest load that meets the objectives: steps up, then halves between the last two."""

from collections.abc import Callable, Iterator

import msgspec

from bench.capacity.crowd import Crowd
from bench.capacity.measure import CONNECTIONS, Bench, window
from bench.capacity.meters import Meters
from bench.capacity.objectives import Objectives
from bench.capacity.points import SINGLES, Load
from bench.client import Page, Posts, Refused
from bench.machine import CORES, client_on
from bench.subjects import sottovoce

FIRST = 250.0
STEP = 2.0
HALVINGS = 3
MOST = 20_000.0
RECOVER_SECONDS = 2.0
VALUES = (
    "sends",
    "p50_ms",
    "p99_ms",
    "p999_ms",
    "lost",
    "worker cpu",
    "postgres cpu",
    "client cpu",
)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a search.

    Attributes:
        sends: a second, that were due.
        missed: objectives, in words; empty where all were met.
    """

    workers: int
    streams: int
    sends: float
    values: dict[str, float]
    missed: list[str]


def search(
    workers: int,
    streams: int,
    *,
    seconds: float,
    objectives: Objectives,
    say: Callable[[str], None],
) -> Iterator[Step]:
    """Send rates with so many streams open, to channels of two, and nothing pinned: the workers,
    PostgreSQL, Valkey and this client share the machine as the kernel likes.
    """
    say(f"searching: {workers} worker(s), {streams:,} streams")
    with (
        client_on(CORES),
        sottovoce(workers, pairs=1, pinned=False) as server,
        Meters(server) as meters,
        Crowd(server.addresses, page=Page()) as crowd,
    ):
        server.pairs = server.seed(streams // 2 + SINGLES)
        tried = 0

        def attempt(sends: float) -> Step:
            nonlocal tried
            tried += 1
            load = Load(workers=workers, streams=streams, sends=sends)
            with Posts(server.addresses[0], CONNECTIONS) as posts:
                crowd.watch(posts.fd, posts.read)
                bench.posts = posts
                try:
                    values = window(bench, meters, load, seconds=seconds, seed=tried)
                    missed = objectives.missed(values, sends)
                except Refused as error:  # over its limit it may say 503
                    values, missed = {}, [str(error)]
                finally:
                    crowd.unwatch(posts.fd)
            say(
                f"{sends:,.0f} sends/s: p99 {values.get('p99_ms', 0):,.0f} ms"
                + (f": missed: {', '.join(missed)}" if missed else "")
            )
            if missed:
                bench.driver(Load(), seed=0).run(RECOVER_SECONDS)
            return Step(
                workers=workers,
                streams=streams,
                sends=sends,
                values={name: values[name] for name in VALUES if name in values},
                missed=missed,
            )

        with Posts(server.addresses[0], 1) as posts:
            bench = Bench(server, crowd, posts, [])
            bench.open(streams)
        yield from climb(attempt)


def climb(attempt: Callable[[float], Step]) -> Iterator[Step]:
    """Doubled until one fails, then `HALVINGS` between the last that held and the first that did
    not."""
    good, bad = 0.0, FIRST
    while bad <= MOST:
        step = attempt(bad)
        yield step
        if step.missed:
            break
        good, bad = bad, bad * STEP
    else:
        return
    for _ in range(HALVINGS):
        step = attempt((good + bad) / 2)
        yield step
        if step.missed:
            bad = step.sends
        else:
            good = step.sends


def highest(steps: list[Step], workers: int, streams: int) -> float:
    """Sends a second, of the steps that met all objectives with no failed one below them."""
    mine = [step for step in steps if (step.workers, step.streams) == (workers, streams)]
    failed = min((step.sends for step in mine if step.missed), default=float("inf"))
    return max((step.sends for step in mine if not step.missed and step.sends < failed), default=0)
