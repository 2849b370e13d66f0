"""`idle`: what a quiet stream costs, in memory and in heartbeats, and whether that stays so.

Memory is what the server's processes have grown by since before the first stream, over the
number of streams. The kernel's is of both ends, for the client is on this machine, too. Every
stream of Sottovoce's has somebody else's token; the peers ask for none.

`cost`: the same 500 channels get the same sends while 1,000 and while 18,000 streams are open.
Heartbeats and rechecks are put off in that part: they are measured by themselves.
"""

import time
from collections.abc import Iterator

from bench.client import Meter, Posts, Streams
from bench.machine import kernel_bytes
from bench.results import Sample
from bench.scenarios import Plan
from bench.scenarios.pairs import send_open
from bench.statistics import interleave
from bench.subjects import SUBJECTS, Server, Sottovoce, sottovoce

NAME = "idle"
LEVELS = (1_000, 5_000, 10_000, 18_000)
PEER_LEVELS = (1_000, 10_000)
QUICK_LEVELS = (1_000,)
QUIET_AT = 10_000
SETTLE_SECONDS = 2.0
FIRST_STREAMS = 10
"""Few: what they leave behind is used again by those that are measured."""
COST_LEVELS = (1_000, 18_000)
COST_CHANNELS = 500
COST_SENDS_PER_SECOND = 300
COST = "cost at {} streams"
SUBJECT_NAMES = (
    "sottovoce", "engine", "nchan", "better-sse", "uvicorn", "sse-starlette", "hypercorn",
)  # fmt: skip


def run(plan: Plan) -> Iterator[Sample]:
    """Memory moves little between rounds: one is enough. The cost is repeated."""
    for number, name in interleave(plan.of(*SUBJECT_NAMES), 1):
        plan.say(f"idle: {SUBJECTS[name].label}")
        levels: tuple[int, ...] = LEVELS if name == "sottovoce" else PEER_LEVELS
        if plan.quick:
            levels = QUICK_LEVELS
        yield from plan.guard(f"idle {name}", measure(name, number, levels, plan))
    if "sottovoce" in plan.subjects and not plan.quick:
        plan.say("idle: cost per event with few and with many streams")
        yield from plan.guard("idle cost", measure_cost(plan))


def measure(name: str, number: int, levels: tuple[int, ...], plan: Plan) -> Iterator[Sample]:
    with SUBJECTS[name].start(1) as server:
        requests = _requests(server, max(levels))
        with Streams(server.addresses) as first:  # what is made once is no stream's
            first.open(requests[:FIRST_STREAMS], page=server.page)
        time.sleep(SETTLE_SECONDS)
        rss, kernel = server.rss, kernel_bytes()
        with Streams(server.addresses) as streams:
            for level in levels:
                streams.open(requests[len(streams) : level], page=server.page)
                _read_for(streams, SETTLE_SECONDS)
                values = {
                    "rss_kb": (server.rss - rss) / level / 1000,
                    "kernel_kb": (kernel_bytes() - kernel) / level / 1000,
                }
                if name == "sottovoce" and level == (levels[0] if plan.quick else QUIET_AT):
                    plan.say(f"idle: {level} quiet streams")
                    values["quiet_cores"] = _busy(server, streams, 15 if plan.quick else 30)
                yield Sample(
                    scenario=NAME,
                    subject=name,
                    case=f"{level} streams",
                    round=number,
                    values=values | {"lost": float(streams.lost)},
                )


def measure_cost(plan: Plan) -> Iterator[Sample]:
    settings = {"SOTTOVOCE_HEARTBEAT_SECONDS": "3600", "SOTTOVOCE_RECHECK_SECONDS": "3600"}
    with sottovoce(1, pairs=max(COST_LEVELS) // 2, settings=settings) as server:
        requests = [server.stream_request(p, side) for p in server.pairs for side in (True, False)]
        with Streams(server.addresses) as streams, Posts(server.addresses[0], 64) as posts:
            streams.watch(posts.fd, posts.read)
            pairs = server.pairs[:COST_CHANNELS]
            for level in COST_LEVELS:
                streams.open(requests[len(streams) : level], page=server.page)
                _read_for(streams, SETTLE_SECONDS)
                for number in range(plan.rounds):
                    seconds = 2 * plan.seconds
                    quiet = _busy(server, streams, seconds)
                    began = time.perf_counter()
                    sent = send_open(server, pairs, streams, posts, COST_SENDS_PER_SECOND, seconds)
                    baseline = quiet * (time.perf_counter() - began)
                    cpu = sent["server_cpu_seconds"] - baseline
                    yield Sample(
                        scenario=NAME,
                        subject="sottovoce",
                        case=COST.format(level),
                        round=number,
                        values={
                            "cpu_us_per_event": cpu / sent["delivered"] * 1e6,
                            "quiet_cores": quiet,
                            "lost": sent["lost"],
                        },
                    )


def _requests(server: Server, count: int) -> list[bytes]:
    if not isinstance(server, Sottovoce):
        return server.stream_requests(count)
    pairs = server.seed(count // 2)
    return [server.stream_request(pair, side) for pair in pairs for side in (True, False)]


def _busy(server: Server, streams: Streams, seconds: float) -> float:
    """Cores that it takes while nothing is sent."""
    cpu, meter = server.cpu_seconds, Meter()
    _read_for(streams, seconds)
    return (server.cpu_seconds - cpu) / meter.seconds


def _read_for(streams: Streams, seconds: float) -> None:
    meter = Meter()
    while (left := seconds - meter.seconds) > 0:
        streams.read(left)
