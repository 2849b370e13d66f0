"""`pairs`: 1,000 channels of two streams on the real server. Durable sends per second, and how
long from sending to delivery.

The whole machine takes part: server, PostgreSQL (fsync and synchronous_commit on), Valkey and
this client share its cores as the kernel likes. First the maximum, with a fixed number of
sends under way. Then shares of it at a fixed rate, whatever the server does: each message
carries the moment at which it was due, so that a stall counts for all that it held up.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle

import psycopg

from bench.client import Meter, Posts, Refused, Streams, stamp
from bench.machine import CORES, client_on
from bench.results import Sample
from bench.scenarios import Plan
from bench.statistics import median, percentile
from bench.subjects import Pair, Sottovoce, sottovoce

NAME = "pairs"
CHANNELS = 1_000
QUICK_CHANNELS = 200
IN_FLIGHT = 128
CONNECTIONS = 256
WARM_SECONDS = 1.0
DRAIN_SECONDS = 5.0
LOADS = {"10 % of the maximum": 0.1, "50 % of the maximum": 0.5, "90 % of the maximum": 0.9}
MAXIMUM = "maximum"


def run(plan: Plan) -> Iterator[Sample]:
    if "sottovoce" not in plan.subjects:
        return
    for processes in (1,) if plan.quick else (1, 2):
        yield from plan.guard("pairs", measure(processes, plan))


def measure(processes: int, plan: Plan) -> Iterator[Sample]:
    """The maximum of each round, then all loads of each round at shares of the median."""
    channels = QUICK_CHANNELS if plan.quick else CHANNELS
    with (
        client_on(CORES),
        sottovoce(processes, pairs=channels, pinned=False) as server,
        Streams(server.addresses) as streams,
        Posts(server.addresses[0], CONNECTIONS) as posts,
    ):
        require_durable(server.database_url)
        requests = [server.stream_request(p, side) for p in server.pairs for side in (True, False)]
        streams.open(requests, page=server.page)
        streams.watch(posts.fd, posts.read)
        rates = []
        for number in range(plan.rounds):
            plan.say(f"pairs: the maximum, {processes}, round {number + 1}")
            values = send_closed(server, streams, posts, 2 * plan.seconds)
            rates.append(values["sends_per_second"])
            yield _sample(MAXIMUM, processes, number, values)
        for number in range(plan.rounds):
            for case, share in LOADS.items():
                plan.say(f"pairs: {case}, {processes}, round {number + 1}")
                rate = share * median(rates)
                values = send_open(server, server.pairs, streams, posts, rate, 3 * plan.seconds)
                yield _sample(case, processes, number, values)


def require_durable(database_url: str) -> None:
    """
    Raises:
        Refused: what PostgreSQL acknowledges would not survive a power cut.
    """
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            row = connection.execute(f"SHOW {setting}".encode()).fetchone()
            if row != ("on",):
                raise Refused(f"PostgreSQL has {setting} off")


def send_closed(
    server: Sottovoce, streams: Streams, posts: Posts, seconds: float
) -> dict[str, float]:
    """`IN_FLIGHT` sends under way, always."""
    pairs = cycle(server.pairs)

    def send_for(duration: float) -> Meter:
        meter = Meter()
        while (now := meter.seconds) < duration:
            while posts.waiting < IN_FLIGHT:
                posts.post(server.send_request(next(pairs), stamp(meter.began + now)))
            streams.read_stamps(0.1)
        return meter

    streams.forget()
    answered = posts.answered
    send_for(WARM_SECONDS)
    counted = posts.answered
    meter = send_for(seconds)
    took, client_busy = meter.seconds, meter.busy
    rate = (posts.answered - counted) / took
    _drain(streams, posts)
    return {
        "sends_per_second": rate,
        "client_busy": client_busy,
        "lost": _lost(streams, posts.answered - answered),
    }


def send_open(
    server: Sottovoce,
    pairs: Sequence[Pair],
    streams: Streams,
    posts: Posts,
    rate: float,
    seconds: float,
) -> dict[str, float]:
    """That many sends a second, each at its moment."""
    streams.forget()
    answered, cpu = posts.answered, server.cpu_seconds
    meter = Meter()
    # As late as one poll may be: the first wait is the only one that is not measured.
    due, sent, total = meter.began, 0, int(rate * seconds)
    while sent < total:
        now = meter.began + meter.seconds
        while due <= now and sent < total and posts.free:
            posts.post(server.send_request(pairs[sent % len(pairs)], stamp(due)))
            sent += 1
            due += 1 / rate
        streams.read_stamps(min(0.1, max(0.0, due - now)))
    took, client_busy = meter.seconds, meter.busy
    _drain(streams, posts)
    cpu = server.cpu_seconds - cpu
    latencies = sorted(streams.latencies)
    if not latencies:
        raise Refused("no message arrived")
    return {
        "sends_per_second": sent / took,
        "p50_ms": percentile(latencies, 0.5) * 1000,
        "p99_ms": percentile(latencies, 0.99) * 1000,
        "p999_ms": percentile(latencies, 0.999) * 1000,
        "server_cpu_seconds": cpu,
        "delivered": float(len(latencies)),
        "client_busy": client_busy,
        "lost": _lost(streams, posts.answered - answered),
    }


def _drain(streams: Streams, posts: Posts) -> None:
    meter = Meter()
    while posts.waiting and meter.seconds < DRAIN_SECONDS:
        streams.read_stamps(0.05)
    quiet = Meter()
    while quiet.seconds < 0.5:
        before = streams.events
        streams.read_stamps(0.05)
        if streams.events != before:
            quiet = Meter()


def _lost(streams: Streams, sends: int) -> float:
    """Share of the deliveries that never came."""
    return 1 - len(streams.latencies) / (2 * sends)


def _sample(case: str, processes: int, number: int, values: dict[str, float]) -> Sample:
    return Sample(
        scenario=NAME,
        subject="sottovoce",
        case=case,
        processes=processes,
        round=number,
        values=values,
    )
