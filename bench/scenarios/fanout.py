"""`fanout`: one channel, many streams. Events per second that reach them.

Every server gets its messages the same way, by POST. Some are always under way: enough that
the server never waits for the client, few enough that nothing piles up. Where several arrive
together, a server may write them together, and the good ones do. At the main level this is
varied: `one at a time` takes it away, `16 at once` gives it room.
"""

from collections.abc import Iterator, Sequence

from bench.client import Meter, Posts, Refused, Streams
from bench.results import Sample
from bench.scenarios import Plan
from bench.statistics import interleave
from bench.subjects import SUBJECTS, Server

NAME = "fanout"
LEVELS = (1, 10, 100, 1_000, 5_000)
QUICK_LEVELS = (10, 1_000)
MAIN = 1_000
IN_FLIGHT = 4
FEW_STREAMS = 1_000
"""With fewer, four messages are delivered before the next can be there."""
FEW_IN_FLIGHT = 16
MAIN_IN_FLIGHT = (IN_FLIGHT, 1, 16)
WARM_SECONDS = 0.4
DRAIN_SECONDS = 10.0
GATHER_SECONDS = 0.002


def usual_in_flight(streams: int) -> int:
    return FEW_IN_FLIGHT if streams < FEW_STREAMS else IN_FLIGHT


def case_of(streams: int, in_flight: int | None = None) -> str:
    """The name of a case; `in_flight` is said where it is not the usual one."""
    if in_flight in (None, usual_in_flight(streams)):
        return f"{streams} streams"
    return f"{streams} streams, " + ("one at a time" if in_flight == 1 else f"{in_flight} at once")


def run(plan: Plan) -> Iterator[Sample]:
    """Every level on one process; the main level again on two."""
    levels = QUICK_LEVELS if plan.quick else LEVELS
    cases = [
        (level, in_flight)
        for level in levels
        for in_flight in (MAIN_IN_FLIGHT if level == MAIN else (usual_in_flight(level),))
    ]
    for number, name in interleave(plan.subjects, plan.rounds):
        plan.say(f"fanout: {SUBJECTS[name].label}, round {number + 1}")
        yield from plan.guard(f"fanout {name}", measure(name, 1, number, cases, plan.seconds))
    if plan.quick:
        return
    two = [name for name in plan.subjects if not name.startswith("write-")]
    for number, name in interleave(two, plan.rounds):
        plan.say(f"fanout: {SUBJECTS[name].label}, two processes, round {number + 1}")
        yield from plan.guard(
            f"fanout {name} twice",
            measure(name, 2, number, [(MAIN, IN_FLIGHT)], plan.seconds),
        )


def measure(
    name: str, processes: int, number: int, cases: Sequence[tuple[int, int]], seconds: float
) -> Iterator[Sample]:
    """One subject, started for it.

    Args:
        cases: (streams, messages under way); streams are added from one to the next.
    """
    with SUBJECTS[name].start(processes) as server, Streams(server.addresses) as streams:
        for level, in_flight in cases:
            new = server.stream_requests(level)[len(streams) :]
            streams.open(new, page=server.page)
            yield Sample(
                scenario=NAME,
                subject=name,
                case=case_of(level, in_flight),
                processes=processes,
                round=number,
                values=deliver(server, streams, in_flight=in_flight, seconds=seconds),
            )


def deliver(
    server: Server, streams: Streams, *, in_flight: int, seconds: float
) -> dict[str, float]:
    """Publish for that long, and count what arrives.

    Args:
        in_flight: messages that are published before all streams have the first of them.

    Returns:
        events_per_second, bytes_per_event, cpu_us_per_event (of the server), server_busy
        (cores), client_busy (share of its core), lost (share of the events that never came).
    """
    readers, request = len(streams), server.publish_request()
    # One server, or one for each process with its part of the readers: each gets every message.
    publishers = [Posts(address, in_flight) for address in server.addresses]
    for posts in publishers:
        streams.watch(posts.fd, posts.read)
    published = 0
    gather = GATHER_SECONDS if readers * in_flight > 1000 else 0.0

    def publish_for(duration: float) -> Meter:
        nonlocal published
        meter = Meter()
        while meter.seconds < duration:
            while published * readers - streams.events < in_flight * readers and all(
                posts.free for posts in publishers
            ):
                for posts in publishers:
                    posts.post(request)
                published += 1
            streams.read(0.1, gather=gather)
        return meter

    try:
        streams.forget()
        publish_for(WARM_SECONDS)
        events, received, cpu = streams.events, streams.bytes, server.cpu_seconds
        meter = publish_for(seconds)
        took, client_busy = meter.seconds, meter.busy
        events, received = streams.events - events, streams.bytes - received
        server_busy = (server.cpu_seconds - cpu) / took
        _drain(streams, publishers, published * readers)
        missing = published * readers - streams.events
    finally:
        for posts in publishers:
            streams.unwatch(posts.fd)
            posts.close()
    if not events:
        raise Refused("no event arrived")
    return {
        "events_per_second": events / took,
        "bytes_per_event": received / events,
        "cpu_us_per_event": server_busy * took / events * 1e6,
        "server_busy": server_busy,
        "client_busy": client_busy,
        "lost": max(0.0, missing / (published * readers)),
    }


def _drain(streams: Streams, publishers: list[Posts], expected: int) -> None:
    """Let everything arrive that still comes, so that the next measurement starts afresh."""
    meter = Meter()
    before = -1
    quiet = Meter()
    while streams.events < expected or any(posts.waiting for posts in publishers):
        streams.read(0.05)
        if streams.events != before:
            before, quiet = streams.events, Meter()
        if quiet.seconds > 1.0 or meter.seconds > DRAIN_SECONDS:
            return
